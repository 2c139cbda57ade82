"""Models as stateless Flax modules: `init_params(model, key) -> params`, `model.apply({"params": params}, ...)`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.models.bert import BERT
from gptjax.models.config import TransformerConfig
from gptjax.models.encoder_decoder import EncoderDecoder
from gptjax.models.gpt import GPT

Model = GPT | BERT | EncoderDecoder
FAMILIES: dict[str, type[Model]] = {"gpt": GPT, "bert": BERT, "encoder_decoder": EncoderDecoder}


def make_model(family: str, **arguments: Any) -> Model:
    """Builds a model from its constructor arguments, as `model.json` holds them.

    Raises:
      ValueError: an unknown family, arguments that `TransformerConfig` refuses, or that the family has no use for.
    """
    if family not in FAMILIES:
        raise ValueError(f"model.family {family!r} is not one of {', '.join(FAMILIES)}")
    config = TransformerConfig(**arguments)
    has_encoder = config.num_encoder_layers > 0
    if has_encoder != (family == "encoder_decoder"):
        rule = "must be at least 1" if family == "encoder_decoder" else "must be 0"
        raise ValueError(f"model.num_encoder_layers {config.num_encoder_layers} {rule} for model.family {family!r}")
    if family != "gpt" and config.prefix_lm:
        raise ValueError(f"model.prefix_lm is for model.family 'gpt', not {family!r}")
    if family != "bert" and (config.token_types or config.pooler or config.head == "masked_lm"):
        field = "token_types" if config.token_types else "pooler" if config.pooler else "head 'masked_lm'"
        raise ValueError(f"model.{field} is for model.family 'bert', not {family!r}")
    if family == "bert" and config.head == "language_model":
        raise ValueError("model.head 'language_model' is not for model.family 'bert'; use 'masked_lm'")
    if family == "encoder_decoder" and config.head not in ("language_model", "none"):
        raise ValueError(f"model.head {config.head!r} is not for model.family 'encoder_decoder'")
    if family == "gpt" and config.head in ("sequence_classification", "embedding") and config.pooling == "first":
        raise ValueError("model.pooling 'first' is not for model.family 'gpt', whose first token sees no other")
    return FAMILIES[family](config)


def model_arguments(model: Model) -> dict[str, Any]:
    """The inverse of `make_model`: `make_model(**model_arguments(model))` is the same model."""
    family = next(name for name, kind in FAMILIES.items() if type(model) is kind)
    return {"family": family, **dataclasses.asdict(model.config)}


def init_params(model: Model, key: Array, scale: Array | float = 1.0) -> Params:
    """Draws initial parameters.

    Args:
      model: a module of this package.
      key: a random key.
      scale: multiplies the initial deviation of kernels and embeddings; may be traced.

    Returns:
      A nested dict of float32 arrays.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    source: Any = {"encoder_tokens": tokens} if isinstance(model, EncoderDecoder) else {}
    params = model.init(key, tokens, **source)["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p * scale if path[-1].key.endswith(("kernel", "embedding")) else p, params
    )
