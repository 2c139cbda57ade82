"""Maximal update parametrisation: sizes do not depend on the width, at the start and after steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, cli
from gptjax.models import init_params, make_model
from gptjax.models.attention import BlockInputs
from gptjax.models.attention_ops import row_mask
from gptjax.training.optimizers import Hyperparameters, make_optimizer
from tests.models.variants import SIZES

WIDTHS = (32, 256)
HYPER = Hyperparameters(*map(np.float32, (1e-2, 0, 1, 0, 0.9, 0.95, 0.95, 0)))
TOKENS = np.random.default_rng(0).integers(0, 23, (8, 9))


def model_of(width, **change):
    heads = {"num_heads": width // 16, "num_kv_heads": width // 16, "head_dim": 16}
    return make_model(
        "gpt", **(SIZES | heads | {"embed_dim": width, "mlp_dim": 4 * width, "mup_base_dim": 32} | change)
    )


def stream(model, tokens):
    """What the blocks give, before the final norm divides its size out."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.embedder(tokens, positions)
    return model.blocks(x, BlockInputs(positions, row_mask(tokens, None, causal=True), tokens, x))[0]


def growth(steps=4, **change):
    """Exponents of the width in the change of the residual stream and of the logits by some steps of AdamW."""
    sizes = []
    for width in WIDTHS:
        model = model_of(width, num_layers=1, **change)
        optimizer = make_optimizer("adamw", 1e-2, HYPER, width=model.config.width)

        def look(params, model=model):
            return [model.apply({"params": params}, TOKENS[:, :-1], **method) for method in ({"method": stream}, {})]

        def loss(params, look=look):
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(look(params)[1]), TOKENS[:, 1:, None], -1))

        def step(_, carry, optimizer=optimizer, loss=loss):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        @jax.jit
        def changes(key, model=model, optimizer=optimizer, step=step, look=look):
            params = init_params(model, key)
            trained, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
            return [jnp.sqrt(jnp.mean(jnp.square(a - b))) for a, b in zip(look(trained), look(params), strict=True)]

        sizes.append([float(x) for x in changes(jax.random.key(0))])
    return np.polyfit(np.log(WIDTHS), np.log(sizes), 1)[0]


def test_coordinate_check():
    """Yang et al., 2022, appendix D.1: with muP nothing grows with the width, without it what training adds does."""
    assert (np.abs(growth(mup=True)) < 0.15).all()
    assert (growth() > 0.4).all()


def test_at_its_base_it_is_the_standard_parametrisation():
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    models = [model_of(32, mup=mup, **heads) for mup in (False, True)]
    params = [jax.jit(lambda key, m=m: init_params(m, key))(jax.random.key(0)) for m in models]
    jax.tree.map(np.testing.assert_array_equal, *params)
    a, b = (jax.jit(m.apply)({"params": params[0]}, TOKENS[:, :-1]) for m in models)
    np.testing.assert_array_equal(a, b)
    assert models[1].config.width == 1


def test_hidden_kernels_start_and_move_less_and_decay_the_same():
    models = [model_of(128, mup=mup) for mup in (True, False)]
    wide, standard = (jax.jit(lambda key, m=m: init_params(m, key))(jax.random.key(0)) for m in models)
    ratios = jax.tree.map(lambda a, b: np.std(a) / np.std(b) if np.std(b) else 1.0, wide, standard)
    kernels = {"attention": {name: {"kernel": 0.5} for name in ("query", "key", "value", "out")}}
    kernels["mlp"] = {name: {"kernel": 0.5} for name in ("up", "down")}

    def expected(path, _):
        leaf = kernels
        for key in path[1:]:
            leaf = leaf.get(key.key, {}) if isinstance(leaf, dict) else {}
        return leaf or 1.0

    exponents = jax.tree_util.tree_map_with_path(expected, wide)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ratios, exponents)

    decaying = HYPER._replace(weight_decay=np.float32(0.1))
    standard = jax.tree.map(np.asarray, standard)
    grads = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), standard)
    moved = []
    for hyper, width in ((HYPER, 1.0), (HYPER, 4.0), (decaying, 1.0), (decaying, 4.0)):
        optimizer = make_optimizer("adamw", 1.0, hyper, width=width)
        update = jax.jit(lambda optimizer=optimizer: optimizer.update(grads, optimizer.init(standard), standard)[0])
        moved.append(jax.tree.map(np.asarray, update()))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(b, a * c**2, rtol=1e-5), *moved[:2], exponents)
    decay = [jax.tree.map(np.subtract, moved[i + 2], moved[i]) for i in (0, 1)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *decay)


@pytest.mark.parametrize("change", [{"scale_logits": True}, {"embed_scale": 0.0}, {"num_experts": 4}, {"head": "none"}])
def test_what_would_scale_otherwise_is_refused(change):
    with pytest.raises(ValueError, match=r"model.mup is for"):
        model_of(32, mup=True, **change)


def test_other_optimizers_are_refused():
    fields = [("model.mup", "true"), ("optimizer.name", "muon")]
    with pytest.raises(cli.UserError, match=r"adamw.*, not .muon"):
        build.check(cli.load_config("configs/default.py", fields))
