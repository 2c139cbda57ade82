"""Every shipped config builds, whole, without memory, and says what it is."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import build, cli
from gptjax.models import init_params, make_model
from gptjax.training.state import init_state
from gptjax.training.step import make_train_step
from gptjax.training.throughput import num_params

CONFIGS = sorted(p.stem for p in pathlib.Path(cli.CONFIGS).glob("*.py") if p.stem != "__init__")
PARAMETERS = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
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
    shape = (config.train.batch_size, config.model.max_seq_len)
    batch = {k: jax.ShapeDtypeStruct(shape, jnp.int32) for k in ("inputs", "targets", "segment_ids", "positions")}
    batch["loss_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    new_state, metrics = jax.eval_shape(make_train_step(model, settings), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    if name in PARAMETERS:
        assert num_params(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))) == PARAMETERS[name]


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
