"""From a config to the objects it describes: the only reader of config fields besides the commands themselves."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.cli import UserError, load_config

# The model that each objective trains; where there are several, a tuple.
MODEL_OF_OBJECTIVE: dict[str, dict[str, Any]] = {
    "sft": {"family": "gpt", "head": "language_model", "prefix_lm": False},
    "dpo": {"family": "gpt", "head": "language_model", "prefix_lm": False},
    "classification": {"family": ("bert", "gpt"), "head": "sequence_classification", "prefix_lm": False},
    "question_answering": {"family": ("bert", "gpt"), "head": "span", "prefix_lm": False},
    "causal": {"family": "gpt", "head": "language_model", "prefix_lm": False},
    "prefix": {"family": "gpt", "head": "language_model", "prefix_lm": True},
    "fim": {"family": "gpt", "head": "language_model", "prefix_lm": False},
    "masked": {"family": "bert", "head": "masked_lm"},
    "span": {"family": "encoder_decoder", "head": "language_model"},
    "seq2seq": {"family": "encoder_decoder", "head": "language_model"},
}
# Fields of `model` that are the config's whatever model training starts from.
NOT_OF_INIT = (
    *("head", "num_labels", "pooling", "attention", "attention_dropout", "dtype", "scan_layers", "remat"),
    *("balance_loss", "router_z_loss"),
)


def check(config: ConfigDict) -> None:
    """Refuses numbers out of range, before anything heavy is imported.

    Raises:
      UserError: names the field, its value and the rule.
    """
    at_least: dict[str, float] = {
        "train.num_train_steps": 1,
        "train.batch_size": 1,
        "train.accumulation_steps": 1,
        "train.log_every_steps": 0,
        "train.max_minutes": 0,
        "train.z_loss": 0,
        "train.skip_spikes": 0,
        "eval.every_steps": 0,
        "eval.max_batches": 0,
        "eval.num_samples": 0,
        "eval.sample_tokens": 1,
        "checkpoint.every_steps": 0,
        "checkpoint.keep": 1,
        "optimizer.learning_rate": 0,
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0,
        "optimizer.clip_norm": 0,
        "data.span_length": 1,
        "data.fim_rate": 0,
        "data.seq_len": 0,
        "train.dpo_beta": 0,
        "lora.rank": 0,
        "lora.alpha": 0,
        "init.scale": 0,
        "seed": 0,
    }
    for name, least in at_least.items():
        value = _field(config, name)
        if not value >= least:
            raise UserError(f"config.{name}={value} must be at least {least}")
    below_one = ("model.dropout", "lora.dropout", "train.ema_decay", "train.label_smoothing")
    for name in (*below_one, "optimizer.beta1", "optimizer.beta2", "optimizer.momentum"):
        value = _field(config, name)
        if not 0 <= value < 1:
            raise UserError(f"config.{name}={value} must be at least 0 and below 1")
    if not 0 <= config.optimizer.final_fraction <= 1:
        raise UserError(f"config.optimizer.final_fraction={config.optimizer.final_fraction} must be from 0 to 1")
    if not 0 < config.data.mask_rate < 1:
        raise UserError(f"config.data.mask_rate={config.data.mask_rate} must be above 0 and below 1")
    if config.data.fim_rate > 1:
        raise UserError(f"config.data.fim_rate={config.data.fim_rate} must be at most 1")
    known = {
        "data.objective": tuple(MODEL_OF_OBJECTIVE),
        "optimizer.name": ("adamw", "muon"),
        "optimizer.schedule": ("cosine", "linear", "wsd", "rsqrt", "constant"),
        "mesh.platform": ("any", "cpu", "gpu", "tpu"),
    }
    for name, names in known.items():
        if _field(config, name) not in names:
            raise UserError(f"config.{name}={_field(config, name)!r} is not one of {', '.join(names)}")
    if config.train.batch_size % config.train.accumulation_steps:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} is not divisible by "
            f"config.train.accumulation_steps={config.train.accumulation_steps}"
        )
    if config.model.mup and config.optimizer.name != "adamw":
        raise UserError(f"config.model.mup is for config.optimizer.name='adamw', not {config.optimizer.name!r}")
    if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "the environment names a WANDB_PROJECT, but wandb is missing: pip install 'gptjax[wandb]', or unset it"
        )
    profile_steps(config)
    _check_regexes(config)
    if not config.init.model:  # else its fields are not known yet
        check_model(config)


def _check_regexes(config: ConfigDict) -> None:
    o = config.optimizer
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 and float(pair[1]) >= 0 for pair in o.factors):
        raise UserError(f"config.optimizer.factors={o.factors!r} must be pairs of a regex and a factor of at least 0")
    regexes = [("lora.projections", config.lora.projections), ("optimizer.decayed", o.decayed)]
    for name, pattern in [*regexes, *(("optimizer.factors", pattern) for pattern, _ in o.factors)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.{name}: {pattern!r} is not a regex: {error}") from error


def check_model(config: ConfigDict) -> None:
    """Refuses a model that is not one, or cannot learn the objective.

    Raises:
      UserError: names the field, its value and the rule.
    """
    model_sizes(config, vocab_size=max(1, config.data.vocab_size))
    d, m = config.data, config.model
    for name, value in MODEL_OF_OBJECTIVE[d.objective].items():
        if m[name] not in (value if isinstance(value, tuple) else (value,)):
            needed = " or ".join(map(repr, value if isinstance(value, tuple) else (value,)))
            raise UserError(
                f"config.data.objective={d.objective!r} needs config.model.{name}={needed}, not {m[name]!r}"
            )
    if d.seq_len > m.max_seq_len and m.position == "learned":
        raise UserError(
            f"config.data.seq_len={d.seq_len} is more than the {m.max_seq_len} learned positions of the model"
        )
    if d.objective == "classification" and m.num_labels < 2:
        raise UserError(
            f"config.model.num_labels={m.num_labels} must be at least 2 for config.data.objective={d.objective!r}"
        )
    if d.cross_document and d.objective != "causal":
        raise UserError(f"config.data.cross_document is for config.data.objective='causal', not {d.objective!r}")


def _field(config: ConfigDict, name: str) -> Any:
    section, _, leaf = name.rpartition(".")
    return config[section][leaf] if section else config[leaf]


def model_sizes(config: ConfigDict, vocab_size: int) -> dict[str, Any]:
    """The model's constructor arguments, zeros replaced by what they stand for."""
    sizes = config.model.to_dict() | {"vocab_size": vocab_size}
    del sizes["dropout"]  # a number of the state, not of the model
    for name in ("num_kv_heads", "head_dim", "mlp_dim"):
        if sizes[name] < 0:
            raise UserError(f"config.model.{name}={sizes[name]} must be at least 1, or 0 for its default")
    if sizes["num_heads"] < 1 or sizes["embed_dim"] < 1:
        raise UserError("config.model.num_heads and config.model.embed_dim must be at least 1")
    if not sizes["head_dim"] and sizes["embed_dim"] % sizes["num_heads"]:
        raise UserError(
            f"config.model.embed_dim={sizes['embed_dim']} is not divisible by config.model.num_heads={sizes['num_heads']}"
        )
    sizes["head_dim"] = sizes["head_dim"] or sizes["embed_dim"] // sizes["num_heads"]
    sizes["num_kv_heads"] = sizes["num_kv_heads"] or sizes["num_heads"]
    sizes["mlp_dim"] = sizes["mlp_dim"] or 4 * sizes["embed_dim"]
    return sizes


def with_model(config: ConfigDict, arguments: Mapping[str, Any]) -> ConfigDict:
    """The config with the fields of a model to start from in place of its own.

    Args:
      arguments: the model's constructor arguments.

    Raises:
      UserError: the config asks for another value of such a field than its default and the model's.
    """
    default = load_config("configs/default.py")
    merged = ConfigDict(config.to_dict())
    for name, value in arguments.items():
        section = "data" if name == "vocab_size" else "model"
        asked = config[section][name]
        if name in NOT_OF_INIT:
            continue
        if asked not in (default[section][name], value):
            raise UserError(
                f"config.{section}.{name}={asked!r} is not what config.init.model={config.init.model!r} has, {value!r}; "
                "leave it at its default"
            )
        merged[section][name] = type(asked)(value)
    check_model(merged)
    return merged.lock()


def initial_model(config: ConfigDict, mesh: Any = None) -> tuple[ConfigDict, Any, Any]:
    """Loads `init.model`: returns the config with its fields, its tokenizer and its parameters; None without one."""
    if not config.init.model:
        return config, None, None
    from gptjax.loading import load
    from gptjax.models import model_arguments

    model, params, tokenizer = load(config.init.model, mesh=mesh)
    return with_model(config, model_arguments(model)), tokenizer, params


def vocab_size(config: ConfigDict, tokenizer: Any) -> int:
    """V: the tokenizer's, or that of the model to start from, which may be larger."""
    return config.data.vocab_size if config.init.model else tokenizer.vocab_size


def seq_len(config: ConfigDict) -> int:
    """T, the tokens of a row."""
    return config.data.seq_len or config.model.max_seq_len


def profile_steps(config: ConfigDict) -> tuple[int, int] | None:
    """The steps to trace."""
    if not config.profile.steps:
        return None
    try:
        first, last = (int(part) for part in config.profile.steps.split(":"))
        if not 1 <= first <= last < config.train.num_train_steps:
            raise ValueError
    except ValueError:
        raise UserError(
            f"config.profile.steps={config.profile.steps!r} must be FIRST:LAST, within the steps before the last"
        ) from None
    return first, last


def hyperparameters(config: ConfigDict) -> Any:
    """The numbers that live in the state."""
    from gptjax.training.optimizers import Hyperparameters

    o = config.optimizer
    numbers = {name: o[name] for name in Hyperparameters._fields if name != "dropout"}
    scalars: dict[str, Any] = {k: np.float32(v) for k, v in (numbers | {"dropout": config.model.dropout}).items()}
    return Hyperparameters(**scalars)


def step_settings(config: ConfigDict) -> Any:
    """What is compiled into the step."""
    from gptjax.training.step import StepSettings

    return StepSettings(
        optimizer=config.optimizer.name,
        schedule=config.optimizer.schedule,
        num_train_steps=config.train.num_train_steps,
        accumulation_steps=config.train.accumulation_steps,
        clip_norm=config.optimizer.clip_norm,
        z_loss=config.train.z_loss,
        ema_decay=config.train.ema_decay,
        skip_spikes=config.train.skip_spikes,
        use_dropout=config.model.dropout > 0 or (config.lora.rank > 0 and config.lora.dropout > 0),
        label_smoothing=config.train.label_smoothing,
        factors=factors(config),
        decayed=config.optimizer.decayed,
    )


def factors(config: ConfigDict) -> tuple[tuple[str, float], ...]:
    """What learning rates are multiplied by: the config's, and with adapters 0 for all but them and a new task's head."""
    from gptjax.finetuning import lora

    asked = tuple((pattern, float(factor)) for pattern, factor in config.optimizer.factors)
    if not config.lora.rank:
        return asked
    return ((lora.NEVER_TRAINED, 0.0), *asked, (rf"{lora.TRAINED}|^head/labels/", 1.0), ("", 0.0))


def initial_state(config: ConfigDict, model: Any) -> Any:
    """The function (seed, scale, hyperparameters, arrays by path to take in place of drawn ones) -> state of step 0."""
    import functools

    from gptjax.finetuning import lora
    from gptjax.finetuning.start import frozen, put_in
    from gptjax.training.state import init_state

    settings = step_settings(config)

    def start(params: Any, key: Any, taken: Any) -> Any:
        params = put_in(params, taken)
        if not config.lora.rank:
            return params
        numbers = {name: config.lora[name] for name in ("rank", "alpha", "dropout", "projections")}
        return lora.add(params, key, **numbers)

    def init(seed: Any, scale: Any, hyper: Any, taken: Any) -> Any:
        return init_state(
            model,
            settings.optimizer,
            hyper,
            seed,
            scale,
            ema=settings.ema_decay > 0,
            change=functools.partial(start, taken=taken),
            is_frozen=frozen(settings.factors),
        )

    return init


def loss(config: ConfigDict) -> Any:
    """What is lowered; None for cross entropy."""
    if config.data.objective != "dpo":
        return None
    from gptjax.finetuning.preference import preference_loss

    return preference_loss(config.train.dpo_beta)


def loop_settings(config: ConfigDict) -> Any:
    """When the loop does what."""
    from gptjax.training.loop import LoopSettings

    return LoopSettings(
        num_train_steps=config.train.num_train_steps,
        log_every_steps=config.train.log_every_steps,
        eval_every_steps=config.eval.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        eval_at_start=bool(config.init.model),
        max_minutes=config.train.max_minutes,
        profile_steps=profile_steps(config),
    )


def mesh(config: ConfigDict, make: Callable[[dict[str, int]], Any] | None = None) -> Any:
    """The mesh, by `make` in place of `make_mesh`, after the platform that the config demands has been found."""
    import jax

    from gptjax.distributed.mesh import AXES, make_mesh

    platform = jax.default_backend()
    if config.mesh.platform not in ("any", platform):
        raise UserError(
            f"config.mesh.platform={config.mesh.platform!r} but JAX found only {platform}; install the extra "
            f"gptjax[{config.mesh.platform}] or set --config.mesh.platform=any"
        )
    return (make or make_mesh)({axis: config.mesh[axis] for axis in AXES})


def check_division(config: ConfigDict, made: Any) -> None:
    """Refuses rows that the mesh does not divide."""
    from gptjax.data.objectives import target_len

    ways = made.shape["data"] * made.shape["fsdp"] * made.shape["expert"]
    rows = config.train.batch_size // config.train.accumulation_steps
    if rows % ways:
        raise UserError(
            f"config.train.batch_size={config.train.batch_size} over config.train.accumulation_steps="
            f"{config.train.accumulation_steps} gives {rows} rows, "
            f"not divisible by the {ways} devices of mesh data x fsdp x expert"
        )
    for name, length in (
        ("config.data.seq_len or model.max_seq_len", seq_len(config)),
        (
            f"the target length of config.data.objective={config.data.objective!r}",
            target_len(objective(config.data), seq_len(config)),
        ),
    ):
        if length % made.shape["context"]:
            raise UserError(f"{name}, {length} tokens, is not divisible by config.mesh.context={made.shape['context']}")


def objective(data: Mapping[str, Any]) -> Any:
    """The objective that the section `data` of a config describes; a workdir older than a field has its default."""
    from gptjax.data.objectives import Objective

    names = {"name": "objective"} | {name: name for name in Objective._fields if name != "name"}
    return Objective(**{name: data[field] for name, field in names.items() if field in data})


def prepare_data(config: ConfigDict, tokenizer: Any = None) -> Any:
    """The corpus as packed rows, prepared if it is not yet; `tokenizer` is that of the model to start from.

    Raises:
      UserError: a label that the model has no output for.
    """
    from gptjax import platform
    from gptjax.data.pipeline import prepare

    d = config.data
    goal = objective(d)
    data = prepare(
        corpus=d.corpus,
        files=d.files,
        validation_files=d.validation_files,
        text_field=d.text_field,
        tokenizer=tokenizer or d.tokenizer,
        vocab_size=d.vocab_size,
        validation_fraction=d.validation_fraction,
        seq_len=seq_len(config),
        cache_dir=platform.cache_dir() / "data",
        objective=goal,
        target_field=d.target_field if goal.name == "seq2seq" else None,
        too_long=d.too_long,
    )
    if goal.name == "classification" and data.largest_target >= config.model.num_labels:
        raise UserError(
            f"data.files: label {data.largest_target} is out of range: config.model.num_labels={config.model.num_labels}"
        )
    return data
