"""Every shipped config builds, whole, without memory, and says what it is."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import build, cli
from experiments.describe import abstract_batch
from gptjax.distributed.mesh import AXES
from gptjax.distributed.sharding import tree_shardings
from gptjax.models import make_model
from gptjax.training.optimizers import learning_rate
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step
from gptjax.training.throughput import num_params

# Those that start from a model take its sizes; tests/finetuning has them.
CONFIGS = sorted(
    p.stem
    for p in pathlib.Path(cli.CONFIGS).glob("*.py")
    if p.stem != "__init__" and "--config.init.model=" not in p.read_text()
)
# Without the head: of all but BERT it shares the token embedding, and has no more.
PARAMETERS = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "bert_base": 109_482_240,
    "t5_small": 60_506_624,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_and_steps_under_eval_shape(name):
    config = cli.load_config(f"configs/{name}.py")
    build.check(config)
    model = make_model(**build.model_sizes(config, config.data.vocab_size))
    settings = build.step_settings(config)
    hyper = build.hyperparameters(config)
    state = jax.eval_shape(
        lambda seed: init_state(model, settings.optimizer, hyper, seed, jnp.float32(1), ema=settings.ema_decay > 0),
        jax.ShapeDtypeStruct((), jnp.uint32),
    )
    batch = abstract_batch(config, config.train.batch_size)
    new_state, metrics = jax.eval_shape(make_train_step(model, settings), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    tree_shardings(state, jax.sharding.AbstractMesh((1,) * len(AXES), AXES))
    if name in PARAMETERS:
        params = dict(state.params)
        params.pop("head", None)
        assert num_params(params) == PARAMETERS[name]


def test_transformer_base_has_the_learning_rate_of_the_paper():
    """Vaswani et al., 2017, equation 3: D^-0.5 * min(n^-0.5, n * 4000^-1.5)."""
    config = cli.load_config("configs/transformer_base.py")
    hyper = build.hyperparameters(config)
    for n in (1, 1000, 4000, 4001, 20_000, 100_000):
        rate = learning_rate(n - 1, config.optimizer.schedule, config.train.num_train_steps, hyper)
        assert float(rate) == pytest.approx(512**-0.5 * min(n**-0.5, n * 4000**-1.5), rel=2e-3)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_config_header_has_the_command(name):
    header = (cli.CONFIGS / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m experiments.train --config configs/{name}.py" in header


def test_every_field_has_a_comment_and_no_config_adds_one():
    default = cli.flatten(cli.load_config("configs/default.py"))
    assert set(cli.field_comments()) == set(default)
    for name in CONFIGS:
        assert set(cli.flatten(cli.load_config(f"configs/{name}.py"))) == set(default)


def test_overrides_are_typed_and_reach_the_config():
    overrides = [("model.num_layers", "7"), ("optimizer.learning_rate", "3e-4"), ("model.use_bias", "false")]
    config = cli.load_config("configs/default.py", overrides)
    assert (config.model.num_layers, config.optimizer.learning_rate, config.model.use_bias) == (7, 3e-4, False)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.num_layer", "3", "unknown config field config.model.num_layer; did you mean config.model.num_layers?"),
        ("learning_rate", "3", "did you mean config.optimizer.learning_rate?"),
        ("model", "{}", "it is a section"),
        ("model.num_layers", "x", "config.model.num_layers='x' is not an integer"),
        ("model.num_layers", "1e3", "is not an integer"),
        ("optimizer.learning_rate", "fast", "is not a number"),
        ("model.use_bias", "maybe", "is not true or false"),
    ],
)
def test_bad_overrides_name_the_field(field, value, words):
    with pytest.raises(cli.UserError) as error:
        cli.load_config("configs/default.py", [(field, value)])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.num_heads", "3", "config.model.embed_dim=256 is not divisible by config.model.num_heads=3"),
        ("train.accumulation_steps", "3", "config.train.batch_size=16 is not divisible"),
        ("train.num_train_steps", "0", "config.train.num_train_steps=0 must be at least 1"),
        ("model.dropout", "1", "must be at least 0 and below 1"),
        ("optimizer.learning_rate", "nan", "must be at least 0"),
        ("optimizer.name", "sgdd", "is not one of adamw, muon"),
        ("profile.steps", "9", "must be FIRST:LAST"),
        ("model.head_dim", "-1", "config.model.head_dim=-1 must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(field, value, words):
    with pytest.raises(cli.UserError) as error:
        build.check(cli.load_config("configs/default.py", [(field, value)]))
    assert words in str(error.value)
