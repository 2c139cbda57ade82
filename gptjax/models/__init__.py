"""Models as stateless Flax modules: `init_params(model, key) -> params`, `model.apply({"params": params}, ...)`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.models.gpt import GPT
from gptjax.models.transformer import TransformerConfig

FAMILIES = {"gpt": GPT}


def make_model(family: str, **sizes: Any) -> GPT:
    """Builds a model from its constructor arguments, as `model.json` holds them.

    Raises:
      ValueError: an unknown family, or arguments that `TransformerConfig` refuses.
    """
    if family not in FAMILIES:
        raise ValueError(f"model.family {family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[family](TransformerConfig(**sizes))


def model_arguments(model: GPT) -> dict[str, Any]:
    """The inverse of `make_model`: `make_model(**model_arguments(model))` is the same model."""
    family = next(name for name, kind in FAMILIES.items() if type(model) is kind)
    return {"family": family, **dataclasses.asdict(model.config)}


def init_params(model: GPT, key: Array, scale: Array | float = 1.0) -> Params:
    """Draws initial parameters.

    Args:
      model: a module of this package.
      key: a random key.
      scale: multiplies the initial deviation of kernels and embeddings; may be traced.

    Returns:
      A nested dict of float32 arrays.
    """
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p * scale if path[-1].key in ("kernel", "embedding") else p, params
    )
