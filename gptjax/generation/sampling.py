"""Choosing the next token from logits; every number is an array, so one compiled program serves every request."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array


class Sampling(NamedTuple):
    """How to sample.

    Attributes:
      temperature: logits are divided by it; 0 is greedy.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens that together reach this probability (Holtzman et al., 2019, arXiv:1904.09751).
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for numbers out of range."""
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature {sampling.temperature} must be at least 0")
    if sampling.top_k < 0:
        raise ValueError(f"top_k {sampling.top_k} must be at least 0")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p {sampling.top_p} must be above 0 and at most 1")


def sample(key: Array, logits: Array, sampling: Sampling) -> Array:
    """Draws one token for each row.

    Args:
      key: a random key.
      logits: [B, V].
      sampling: scalars.

    Returns:
      [B] int32.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    descending = -jnp.sort(-scaled, axis=-1)
    top_k = jnp.where(jnp.asarray(sampling.top_k) > 0, sampling.top_k, logits.shape[-1])
    probability = jax.nn.softmax(descending, axis=-1)
    # A token stays if the likelier ones have not reached top_p yet, so the likeliest always stays.
    rank = jnp.arange(logits.shape[-1])
    kept = (jnp.cumsum(probability, axis=-1) - probability < sampling.top_p) & (rank < top_k)
    least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))
    return jnp.where(jnp.asarray(sampling.temperature) == 0, greedy, drawn).astype(jnp.int32)
