"""The mixture of experts: each token through its best experts, none dropped, and the two losses of the router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import make_model
from gptjax.models.transformer import ExpertMLP
from gptjax.training.step import loss_sum, make_eval_step
from tests.models.variants import draw_parameters

E, D, F = 4, 6, 5


def config_of(**change):
    sizes = dict(vocab_size=11, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, embed_dim=D, mlp_dim=F)
    experts = dict(num_experts=E, balance_loss=0.3, router_z_loss=0.2, max_seq_len=8)
    return make_model("gpt", **(sizes | experts | change)).config


def draw(config, router_scale=1.0):
    rng = np.random.default_rng(0)
    names = ["up", "down"] + (["gate"] if config.activation == "swiglu" else [])
    params = {f"experts_{n}": {"kernel": rng.normal(size=(E, *((F, D) if n == "down" else (D, F))))} for n in names}
    params["router"] = {"kernel": router_scale * rng.normal(size=(D, E))}
    return jax.tree.map(np.float32, params), rng.normal(size=(2, 7, D)).astype(np.float32)


def reference(config, params, x):
    """Token by token and expert by expert, in float64: (output, losses)."""
    kernels = {name: p["kernel"].astype(np.float64) for name, p in params.items()}
    tokens = x.reshape(-1, D).astype(np.float64)
    logits = tokens @ kernels["router"]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed, counts = np.zeros_like(tokens), np.zeros(E)
    for i, token in enumerate(tokens):
        chosen = np.argsort(-probabilities[i])[: config.experts_per_token]
        for e in chosen:
            hidden = token @ kernels["experts_up"][e]
            if config.activation == "swiglu":
                gate = token @ kernels["experts_gate"][e]
                hidden = hidden * gate / (1 + np.exp(-gate))
            else:
                hidden = np.maximum(hidden, 0)
            mixed[i] += probabilities[i, e] / probabilities[i, chosen].sum() * (hidden @ kernels["experts_down"][e])
            counts[e] += 1
    balance = E * np.sum(counts / counts.sum() * probabilities.mean(0))
    z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    return mixed.reshape(x.shape), config.balance_loss * balance + config.router_z_loss * z


@pytest.mark.parametrize(
    "change",
    [{"activation": "swiglu"}, {"activation": "relu", "experts_per_token": 1}, {"experts_per_token": 4}],
    ids=str,
)
def test_output_and_losses_are_those_of_each_expert_alone(change):
    config = config_of(**({"activation": "relu"} | change))
    params, x = draw(config)
    apply = jax.jit(lambda params, x: ExpertMLP(config).apply({"params": params}, x))
    y, loss = apply(params, x)
    expected, expected_loss = reference(config, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)


def test_every_token_is_served_when_all_go_to_one_expert():
    config = config_of(activation="relu", experts_per_token=1)
    params, x = draw(config)
    x = np.abs(x)
    params["router"]["kernel"][:, 2] += 50  # every token's best
    y, loss = jax.jit(lambda params, x: ExpertMLP(config).apply({"params": params}, x))(params, x)
    expected, expected_loss = reference(config, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
    assert (np.abs(y).max(-1) > 0).all()


def test_the_losses_reach_the_step_and_the_router():
    """What a step lowers is cross entropy plus the mean over layers of the router's losses; what it reports is not."""
    models = [
        make_model("gpt", **dict(vars(config_of(balance_loss=b, router_z_loss=z)))) for b, z in ((0, 0), (0.3, 0.2))
    ]
    params = draw_parameters(models[0])
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 11, (2, 8)) for name in ("inputs", "targets")}
    batch["loss_weights"] = (rng.random((2, 8)) < 0.7).astype(np.float32)

    def losses(model):
        derive = jax.value_and_grad(lambda params: loss_sum(model, params, batch), has_aux=True)
        (loss, reported), grads = jax.jit(derive)(params)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        return float(loss), float(reported["loss"]), grads["blocks"]["mlp"]

    (plain, plain_nll, plain_grads), (loss, nll, grads) = map(losses, models)
    assert plain == plain_nll == nll
    _, sown = jax.jit(lambda: models[1].apply({"params": params}, batch["inputs"], mutable=["losses"]))()
    (router,) = jax.tree.leaves(sown)
    np.testing.assert_allclose(loss - nll, router * batch["loss_weights"].sum(), rtol=1e-3)
    # At an even load the balance loss is its coefficient; it is never much below.
    assert router > 0.3 * 0.9
    assert np.abs(grads["router"]["kernel"] - plain_grads["router"]["kernel"]).max() > 1e-3
    # The losses are the router's: given its input, experts feel them only through earlier layers.
    last = jax.tree.map(lambda g: g[-1], (grads["experts_up"], plain_grads["experts_up"]))
    np.testing.assert_allclose(*(tree["kernel"] for tree in last), atol=1e-5)
    evaluated = jax.jit(make_eval_step(models[1]))(params, batch)
    np.testing.assert_allclose(evaluated["loss_sum"], nll, rtol=1e-6)


def test_runs_with_experts_can_be_mapped_over():
    """A sweep's runs share one program: parameters with a leading axis of runs."""
    config = config_of(activation="swiglu")
    params, x = draw(config)
    x = jnp.asarray(x)
    runs = jax.tree.map(lambda p: np.stack([p, 2 * p]), params)

    def gradient(params):
        return jax.grad(lambda params: jnp.sum(ExpertMLP(config).apply({"params": params}, x)[0] ** 2))(params)

    mapped = jax.jit(jax.vmap(gradient))(runs)
    alone = jax.jit(gradient)(jax.tree.map(lambda p: p[1], runs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-3), mapped, alone)


@pytest.mark.parametrize("experts_per_token", [0, 5])
def test_more_experts_a_token_than_there_are_is_refused(experts_per_token):
    with pytest.raises(ValueError, match=f"model.experts_per_token {experts_per_token} must be from 1 to"):
        config_of(experts_per_token=experts_per_token)
