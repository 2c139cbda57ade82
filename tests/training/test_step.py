"""Properties of the training step: equal computations are equal, and numbers that vary are not compiled in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.distributed.sharding import RULES, path_of
from gptjax.models import init_params, make_model
from gptjax.training.losses import cross_entropy
from gptjax.training.optimizers import Hyperparameters, decay_mask, learning_rate, parameter_labels
from gptjax.training.state import init_state
from gptjax.training.step import StepSettings, make_train_step, skip_spike
from tests.models.variants import ALL, model_of

HYPER = Hyperparameters(*(np.float32(x) for x in (1e-2, 2, 0.1, 0.1, 0.9, 0.99, 0.95, 0.1)))
SETTINGS = StepSettings("adamw", "cosine", 20, 1, 1.0, 0.0, 0.0, 0.0, False)


def state_of(model, settings=SETTINGS, seed=0, hyper=HYPER):
    return jax.jit(
        lambda seed: init_state(model, settings.optimizer, hyper, seed, jnp.float32(1), ema=settings.ema_decay > 0)
    )(np.uint32(seed))


def batch_of(sizes, rows=8, seed=0):
    """Packed rows with documents of random lengths and uneven padding, so that rows hold unequal counts of targets."""
    rng = np.random.default_rng(seed)
    length = sizes["max_seq_len"]
    segments = np.cumsum(rng.random((rows, length)) < 0.15, axis=1, dtype=np.int32) + 1
    for row, padding in enumerate(rng.integers(0, length - 2, rows)):
        segments[row, length - padding :] = 0
    positions = np.zeros((rows, length), np.int32)
    for t in range(1, length):
        positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    return {
        "inputs": rng.integers(0, sizes["vocab_size"], (rows, length), np.int32),
        "targets": rng.integers(0, sizes["vocab_size"], (rows, length), np.int32),
        "segment_ids": segments,
        "positions": positions,
        "loss_weights": (segments > 0).astype(np.float32),
    }


def test_varying_numbers_does_not_recompile_and_vmaps_over_runs(sizes):
    model = make_model("gpt", **sizes)
    settings = SETTINGS._replace(use_dropout=True)
    step = jax.jit(make_train_step(model, settings))
    batch = batch_of(sizes)
    hypers = [HYPER, HYPER._replace(learning_rate=np.float32(1e-3), dropout=np.float32(0.3), beta1=np.float32(0.8))]
    states = [state_of(model, settings, seed, hyper) for seed, hyper in enumerate(hypers)]
    alone = [step(state, batch) for state in states]
    assert step._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    _, metrics = jax.jit(jax.vmap(make_train_step(model, settings), in_axes=(0, None)))(stacked, batch)
    for run, (_, alone_metrics) in enumerate(alone):
        np.testing.assert_allclose(metrics["loss"][run], alone_metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"][run], alone_metrics["learning_rate"], rtol=1e-6)
    assert alone[0][1]["loss"] != alone[1][1]["loss"]


def test_adamw_equals_optax_with_a_schedule(sizes):
    """The whole step against a reference written with optax's own adamw, clip and schedule."""
    model = make_model("gpt", **sizes)
    batch, state = batch_of(sizes), state_of(model)
    step = jax.jit(make_train_step(model, SETTINGS))
    schedule = optax.join_schedules(
        [optax.linear_schedule(1e-2 / 2, 1e-2, 1), optax.cosine_decay_schedule(1e-2, 17, alpha=0.1)], [1]
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lambda n: schedule(n), 0.9, 0.99, weight_decay=0.1, mask=decay_mask)
    )

    @jax.jit
    def reference(params, opt_state):
        def loss(params):
            logits = model.apply(
                {"params": params}, batch["inputs"], positions=batch["positions"], segment_ids=batch["segment_ids"]
            )
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return jnp.sum(nll * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, tx.init(state.params)
    for n in range(4):
        value, params, opt_state = reference(params, opt_state)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
        if n < 1:
            np.testing.assert_allclose(metrics["learning_rate"], schedule(n), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(sizes, optimizer):
    model = make_model("gpt", **sizes)
    settings = SETTINGS._replace(optimizer=optimizer, num_train_steps=40)
    state, batch = state_of(model, settings), batch_of(sizes)
    step = jax.jit(make_train_step(model, settings), donate_argnums=0)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2


def parameters_by_path(model):
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_parameter_has_a_sharding_rule_of_its_shape(family, name):
    for path, leaf in parameters_by_path(model_of(family, name)).items():
        specs = [spec for pattern, spec in RULES if re.search(pattern, path)]
        assert specs, path
        assert not any(specs[0]) or len(specs[0]) == leaf.ndim, (path, leaf.shape, specs[0])


ATTENTION = "query/kernel key/kernel value/kernel out/kernel"
MLP = "up/kernel gate/kernel down/kernel"
EXPERT = "experts_up/kernel experts_gate/kernel experts_down/kernel"
# By family: all of its fields at once, then what Muon updates, and what weight decay passes over besides biases.
FAMILIES = {
    "gpt": (
        {"num_experts": 4, "attention_sinks": True, "tie_embeddings": False, "position": "relative"},
        {"blocks/attention/": ATTENTION, "blocks/mlp/": EXPERT},
        {"blocks/": "attention_norm/scale mlp_norm/scale attention/sinks residual_scales", "": "final_norm/scale"},
    ),
    "bert": (
        {"token_types": 2, "pooler": True, "head": "masked_lm", "embed_norm": True, "norm_position": "post"},
        {"blocks/attention/": ATTENTION, "blocks/mlp/": MLP},
        {
            "blocks/": "attention_norm/scale mlp_norm/scale residual_scales",
            "": "embed_norm/scale head/transform_norm/scale",
        },
    ),
    "encoder_decoder": (
        {"num_encoder_layers": 2, "position": "relative", "qk_norm": True},
        {
            "blocks/attention/": ATTENTION,
            "blocks/cross_attention/": ATTENTION,
            "blocks/mlp/": MLP,
            "encoder_blocks/attention/": ATTENTION,
            "encoder_blocks/mlp/": MLP,
        },
        {
            "blocks/": "attention_norm/scale cross_attention_norm/scale mlp_norm/scale residual_scales",
            "encoder_blocks/": "attention_norm/scale mlp_norm/scale residual_scales",
            "": "final_norm/scale encoder_norm/scale",
            **{
                f"{part}/{norm}/": "scale"
                for part in ("blocks/attention", "blocks/cross_attention", "encoder_blocks/attention")
                for norm in ("query_norm", "key_norm")
            },
        },
    ),
}


def listed(names):
    return {prefix + name for prefix, group in names.items() for name in group.split()}


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_updates_hidden_matrices_only_and_decay_spares_norms(sizes, family):
    """Experts, gates and cross-attention are matrices; tables, the router, heads, sinks and scales are AdamW's."""
    change, matrices, spared = FAMILIES[family]
    common = {"activation": "swiglu", "value_embeddings": True, "residual_scales": True}
    if family == "bert":
        common["activation"] = "geglu"
    model = make_model(family, **(sizes | common | change))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def chosen(tree, value):
        return {path_of(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf == value}

    assert chosen(parameter_labels(shapes), "muon") == listed(matrices)
    not_decayed = chosen(decay_mask(shapes), False)
    assert {path for path in not_decayed if not path.endswith("/bias")} == listed(spared)
    assert {path for path in parameters_by_path(model) if path.endswith("/bias")} <= not_decayed
    tables = {"token_embedding/embedding", "blocks/attention/value_embedding"}
    assert tables <= chosen(decay_mask(shapes), True) & chosen(parameter_labels(shapes), "adamw")


def test_muon_orthogonalises_each_expert_as_one_matrix(sizes):
    model = make_model("gpt", **(sizes | {"num_experts": 2, "embed_dim": 16, "mlp_dim": 16, "num_layers": 2}))
    settings = SETTINGS._replace(optimizer="muon", clip_norm=0.0)
    hyper = HYPER._replace(weight_decay=np.float32(0), warmup_steps=np.float32(0))
    state = state_of(model, settings, hyper=hyper)
    new, metrics = jax.jit(make_train_step(model, settings))(state, batch_of(sizes))
    updates = (a["blocks"]["mlp"]["experts_up"]["kernel"] for a in (new.params, state.params))
    scale = 0.2 * 16**0.5 * float(metrics["learning_rate"])
    singular = np.linalg.svd(np.subtract(*updates) / scale, compute_uv=False)  # [L, E, 16]
    assert singular.max() < 1.3 and (np.median(singular, axis=-1) > 0.6).all()


def test_muon_orthogonalises_each_layer_as_one_matrix(sizes):
    model = make_model("gpt", **(sizes | {"num_kv_heads": 4}))
    # No decay, one step: the update is the orthogonalised gradient, scaled by 0.2 sqrt(max(m, n)) times the rate.
    settings = SETTINGS._replace(optimizer="muon", clip_norm=0.0)
    hyper = HYPER._replace(weight_decay=np.float32(0), warmup_steps=np.float32(0))
    state = state_of(model, settings, hyper=hyper)
    new, metrics = jax.jit(make_train_step(model, settings))(state, batch_of(sizes))
    update = (
        new.params["blocks"]["attention"]["query"]["kernel"] - state.params["blocks"]["attention"]["query"]["kernel"]
    )
    for layer in np.asarray(update):
        matrix = layer.reshape(sizes["embed_dim"], -1) / (
            0.2 * sizes["embed_dim"] ** 0.5 * float(metrics["learning_rate"])
        )
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() < 1.3 and np.median(singular) > 0.6


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_at_their_corners(schedule):
    hyper = HYPER._replace(learning_rate=np.float32(1), warmup_steps=np.float32(10), final_fraction=np.float32(0.1))
    rates = np.array([learning_rate(step, schedule, 101, hyper) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10], 1, rtol=1e-6)
    np.testing.assert_allclose(rates[100], 1 if schedule == "constant" else 0.1, rtol=1e-5)
    assert (np.diff(rates[10:]) <= 1e-7).all()
    if schedule == "wsd":
        np.testing.assert_allclose(rates[10:80], 1)


def test_cross_entropy_equals_optax_and_masked_targets_have_no_gradient():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    targets = rng.integers(0, 7, (2, 5))
    weights = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], np.float32)
    loss, nll = cross_entropy(logits, targets, weights)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    np.testing.assert_allclose(nll, (expected * weights).sum(), rtol=1e-6)
    assert loss == nll
    gradient = jax.grad(lambda x: cross_entropy(x, targets, weights, 1e-2)[0])(jnp.asarray(logits))
    assert (np.asarray(gradient)[weights == 0] == 0).all()
    assert (np.abs(np.asarray(gradient)[weights == 1]).max(-1) > 0).all()

    def wanted(x):
        nll = optax.softmax_cross_entropy_with_integer_labels(x, targets)
        return jnp.sum((nll + 1e-2 * jnp.square(jax.nn.logsumexp(x, -1))) * weights)

    np.testing.assert_allclose(gradient, jax.grad(wanted)(jnp.asarray(logits)), atol=1e-6)
    z_loss = cross_entropy(logits, targets, weights, 1e-2)[0] - nll
    np.testing.assert_allclose(z_loss, 1e-2 * (np.square(jax.nn.logsumexp(logits, -1)) * weights).sum(), rtol=1e-4)


def test_ema_follows_the_parameters(sizes):
    model = make_model("gpt", **sizes)
    settings = SETTINGS._replace(ema_decay=0.9)
    state = state_of(model, settings)
    new, _ = jax.jit(make_train_step(model, settings))(state, batch_of(sizes))
    for old, changed, mean in zip(*map(jax.tree.leaves, (state.params, new.params, new.ema)), strict=True):
        assert np.any(old != changed) and np.any(mean != old)
        np.testing.assert_allclose(mean, 0.9 * old + 0.1 * changed, atol=1e-6 * np.abs(changed).max())


def test_a_loss_spike_is_passed_over(sizes):
    model = make_model("gpt", **sizes)
    old = state_of(model)._replace(step=jnp.int32(500), loss_mean=jnp.float32(2), loss_variance=jnp.float32(0.01))
    new = old._replace(step=jnp.int32(501), params=jax.tree.map(lambda p: p + 1, old.params))
    kept, skipped = skip_spike(old, new, jnp.float32(3), 5.0)
    assert skipped == 1 and kept.step == 501 and kept.loss_mean == 2
    jax.tree.map(np.testing.assert_array_equal, kept.params, old.params)
    taken, skipped = skip_spike(old, new, jnp.float32(2.1), 5.0)
    assert skipped == 0
    np.testing.assert_allclose(taken.loss_mean, 2.001, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, taken.params, new.params)


def test_label_smoothing_is_optax_s():
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.standard_normal((2, 5, 7)), jnp.float32), rng.integers(0, 7, (2, 5))
    weights = jnp.asarray(rng.random((2, 5)) < 0.6, jnp.float32)

    def wanted(logits):
        labels = optax.smooth_labels(jax.nn.one_hot(targets, 7), 0.1)
        return jnp.sum(optax.softmax_cross_entropy(logits, labels) * weights)

    def ours(logits):
        return cross_entropy(logits, targets, weights, 0.0, 0.1)[0]

    np.testing.assert_allclose(ours(logits), wanted(logits), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(wanted)(logits), atol=1e-6)
    assert cross_entropy(logits, targets, weights, 0.0, 0.1)[1] == cross_entropy(logits, targets, weights)[1]
