"""PEFT's LoRA adapters, read and written: adapter_config.json beside adapter_model.safetensors.

Both sides keep A and B apart from the weight; theirs are [R, in] and [out, R] of one layer each, ours are described in
`finetuning.lora`.
"""

import json
import math
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gptjax.array_types import Array, Params
from gptjax.interop.families import FAMILIES, their_config
from gptjax.interop.huggingface import read_json
from gptjax.interop.rules import Rule, axis_sizes, leaves_by_path, regroup, their_tensor
from gptjax.models import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HEADS = ("head/labels/kernel", "head/labels/bias")  # trained whole, as PEFT's modules_to_save


def write(folder: str | pathlib.Path, model: Model, params: Params, *, base: str) -> None:
    """Writes a model's adapters, and its classification or span head, which was trained with them.

    Args:
      folder: made if need be; files of the same names are overwritten.
      model: as it is without adapters.
      params: with adapters.
      base: the model that they are for, as Transformers would load it.

    Raises:
      ValueError: there are no adapters, or beside a projection that is not one for them (GPT-2's query, key and value), or
        of several ranks, scales or dropouts.
    """
    folder, leaves = pathlib.Path(folder), leaves_by_path(params)
    rules = _rules(model)
    paths = [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]
    foreign = [path for path in paths if f"{path}/kernel" not in rules]
    if foreign or not paths:
        raise ValueError(f"PEFT has no adapter for {', '.join(foreign)}" if foreign else "there is no adapter to write")
    tensors: dict[str, np.ndarray] = {}
    numbers: set[tuple[int, float, float]] = set()
    for path in paths:
        rule = rules[f"{path}/kernel"]
        a, b, scale, rate = (np.asarray(leaves[f"{path}/lora_{n}"]) for n in ("a", "b", "scale", "dropout"))
        rank = a.shape[-1]
        numbers.add((rank, round(float(scale.max()) * rank, 6), round(float(rate.max()), 6)))
        for layer, (one_a, one_b) in enumerate(zip(a, b, strict=True) if rule.stacked else [(a, b)]):
            key = _key(rule, layer)
            tensors[f"{key}A.weight"] = one_a.reshape(-1, rank).T
            tensors[f"{key}B.weight"] = one_b.reshape(rank, -1).T
    if len(numbers) > 1:
        raise ValueError(f"PEFT's adapters have one rank, alpha and dropout, and these have {sorted(numbers)}")
    heads = [rules[path] for path in _HEADS if path in leaves]
    tensors |= {_PREFIX + rule.name: their_tensor(model.config, leaves, [rule], 0) for rule in heads}
    ((rank, alpha, dropout),) = numbers
    modules = [re.escape(rules[f"{path}/kernel"].name.removesuffix(".weight")) for path in paths]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        # A pattern of whole names: BERT's "dense" alone would be three projections.
        "target_modules": "|".join(name.replace(r"\{\}", r"\d+") for name in modules),
        "modules_to_save": sorted({rule.name.split(".")[0] for rule in heads}) or None,
        "fan_in_fan_out": their_config(model)["model_type"] == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read(folder: str | pathlib.Path, model: Model) -> dict[str, Array]:
    """Reads the adapters of a model, and the head that was trained with them, by path; layers without one get zeros.

    Args:
      folder: with PEFT's two files.
      model: that they are for.

    Raises:
      ValueError: settings that ours lack, tensors of projections that the model has not, or of other shapes.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / CONFIG)
    only = {"peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for name, value in only.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{folder / CONFIG}: {name} {config[name]!r} is not supported, only {value!r}")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    try:
        tensors = safetensors.numpy.load_file(str(folder / WEIGHTS))
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
    sizes = axis_sizes(model.config)
    found: dict[str, Array] = {}
    for rule in _rules(model).values():
        if rule.path in _HEADS:
            if _PREFIX + rule.name in tensors:
                found[rule.path] = jnp.asarray(
                    regroup(tensors.pop(_PREFIX + rule.name), rule.their_axes, rule.axes, sizes)
                )
            continue
        stack = (_num_layers(model, rule),) if rule.stacked else ()
        keys = [_key(rule, layer) for layer in range(stack[0] if stack else 1)]
        if not any(f"{key}A.weight" in tensors for key in keys):
            continue
        lengths = [math.prod(sizes[letter] for letter in axis) for axis in rule.axes.split()]
        read, written = lengths[: _num_read(rule)], lengths[_num_read(rule) :]
        a, b = np.zeros((len(keys), math.prod(read), rank)), np.zeros((len(keys), rank, math.prod(written)))
        for i, key in enumerate(keys):
            if f"{key}A.weight" in tensors:
                theirs = [tensors.pop(f"{key}{name}.weight").T for name in "AB"]
                if [x.shape for x in theirs] != [a[i].shape, b[i].shape]:
                    raise ValueError(f"{folder / WEIGHTS}: {key}A and B have not the shapes of {rule.path}")
                a[i], b[i] = theirs
        path = rule.path.removesuffix("kernel")
        found |= {
            f"{path}lora_a": jnp.asarray(a.reshape(*stack, *read, rank), jnp.float32),
            f"{path}lora_b": jnp.asarray(b.reshape(*stack, rank, *written), jnp.float32),
            f"{path}lora_scale": jnp.full(stack, scale, jnp.float32),
            f"{path}lora_dropout": jnp.full(stack, config.get("lora_dropout", 0.0), jnp.float32),
        }
    if tensors:
        raise ValueError(f"{folder / WEIGHTS} has tensors of nothing in the model: {', '.join(sorted(tensors)[:3])}")
    return found


def _rules(model: Model) -> dict[str, Rule]:
    """The family's rules of what may have an adapter, and of heads, by path, with the names that PEFT sees."""
    config = their_config(model)
    family = FAMILIES[config["model_type"]]
    prefix = family.prefix if config["architectures"] == ["BertModel"] else ""
    return {
        rule.path: rule._replace(name=rule.name.removeprefix(prefix))
        for rule in family.rules(model.config)
        if rule.path in _HEADS or (rule.path.endswith("/kernel") and rule.part is None)
    }


def _key(rule: Rule, layer: int) -> str:
    return f"{_PREFIX}{rule.name.removesuffix('.weight').format(layer)}.lora_"


def _num_layers(model: Model, rule: Rule) -> int:
    c = model.config
    return c.num_encoder_layers if rule.path.startswith("encoder_blocks") else c.num_layers


def _num_read(rule: Rule) -> int:
    """How many axes of a kernel are summed over."""
    return 2 if rule.path.endswith("attention/out/kernel") else 1
