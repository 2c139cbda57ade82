"""Choosing the next token from logits; every number is an array, so one compiled program serves every request."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array


class Sampling(NamedTuple):
    """How to sample; each a scalar for all rows, or [B].

    Attributes:
      temperature: logits are divided by it; 0 is greedy.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens that together reach this probability (Holtzman et al., 2019, arXiv:1904.09751).
      min_p: only tokens at least this share as likely as the likeliest (Nguyen et al., 2024, arXiv:2407.01082).
      repetition_penalty: positive logits of tokens seen before, in the prompt or the answer, are divided by it, negative
        ones multiplied (Keskar et al., 2019, arXiv:1909.05858); 1 for none.
      presence_penalty: subtracted from the logits of tokens in the answer, once.
      frequency_penalty: subtracted for each time that a token is in the answer.
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0
    min_p: Array | float = 0.0
    repetition_penalty: Array | float = 1.0
    presence_penalty: Array | float = 0.0
    frequency_penalty: Array | float = 0.0


# (least, greatest) of each number, both allowed.
_RANGES = {
    "temperature": (0.0, np.inf),
    "top_k": (0, np.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, np.inf),
    "presence_penalty": (-np.inf, np.inf),
    "frequency_penalty": (-np.inf, np.inf),
}


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for numbers out of range."""
    for name, (least, greatest) in _RANGES.items():
        value = getattr(sampling, name)
        if not least <= value <= greatest or abs(value) == np.inf:
            rule = f"from {least:g} to {greatest:g}" if greatest < np.inf else f"at least {least:g}, and finite"
            raise ValueError(f"{name} {value} must be {rule if least > -np.inf else 'a finite number'}")
    for name in ("top_p", "repetition_penalty"):
        if getattr(sampling, name) == 0:
            raise ValueError(f"{name} {getattr(sampling, name)} must be above 0")


def penalize(logits: Array, sampling: Sampling, seen: Array, counts: Array) -> Array:
    """Lowers the logits of tokens that were there before.

    Args:
      logits: [B, V] float32.
      sampling: the penalties.
      seen: bool [B, V], tokens of the prompt and the answer.
      counts: int32 [B, V], how often each token is in the answer.

    Returns:
      [B, V] float32.
    """
    repetition, presence, frequency = (
        _column(x) for x in (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    return logits - presence * (counts > 0) - frequency * counts


def truncate(logits: Array, sampling: Sampling) -> Array:
    """Leaves the tokens that top-k, top-p and min-p allow, each applied to what the one before left; others become -inf.

    Nothing is sorted: the least logit that stays is found by bisection over the 32 bits of a float, which is exact. Tokens
    that are exactly as likely as the last one allowed stay too.

    Args:
      logits: [B, V] float32, after temperature.
      sampling: the limits.

    Returns:
      [B, V] float32.
    """
    vocab_size = logits.shape[-1]
    top_k, top_p, min_p = (_column(x) for x in (sampling.top_k, sampling.top_p, sampling.min_p))
    top_k = jnp.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    ordered = _ordered_bits(logits)

    def keep_top_k(logits: Array) -> Array:
        least = _bisect(lambda least: jnp.sum(ordered >= least, axis=-1, keepdims=True) >= top_k, logits)
        return jnp.where(ordered >= least, logits, -jnp.inf)

    def keep_top_p(logits: Array) -> Array:
        probability = jax.nn.softmax(logits, axis=-1)

        def enough(least: Array) -> Array:
            return jnp.sum(jnp.where(ordered >= least, probability, 0.0), axis=-1, keepdims=True) >= top_p

        # Rounding may leave the whole sum a little below a top_p near 1: then all stay.
        least = jnp.where(enough(jnp.zeros_like(ordered[:, :1])), _bisect(enough, logits), 0)
        return jnp.where((ordered >= least) | (top_p >= 1), logits, -jnp.inf)

    logits = jax.lax.cond(jnp.any(top_k < vocab_size), keep_top_k, lambda x: x, logits)
    logits = jax.lax.cond(jnp.any(top_p < 1), keep_top_p, lambda x: x, logits)
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """The distribution [B, V] float32 that `sample` draws from."""
    temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature), logits.shape[:1])[:, None]
    scaled = truncate(logits / jnp.maximum(temperature, 1e-6), sampling)
    greedy = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[1])
    return jnp.where(temperature == 0, greedy, jax.nn.softmax(scaled, axis=-1))


def sample(keys: Array, logits: Array, sampling: Sampling) -> Array:
    """Draws one token for each row.

    Args:
      keys: random keys [B], one a row, so that a row's token does not depend on the others.
      logits: [B, V], penalties applied.
      sampling: temperature and limits.

    Returns:
      [B] int32.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1)
    temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature), greedy.shape)

    def draw(logits: Array) -> Array:
        scaled = truncate(logits / jnp.maximum(temperature, 1e-6)[:, None], sampling)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled)
        return jnp.where(temperature == 0, greedy, drawn)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, logits).astype(jnp.int32)


def _column(x: Array | float) -> Array:
    """A scalar as it is, [B] as [B, 1]."""
    x = jnp.asarray(x)
    return x[:, None] if x.ndim else x


def _ordered_bits(x: Array) -> Array:
    """uint32 in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(holds: Callable[[Array], Array], like: Array) -> Array:
    """The greatest uint32 [B, 1] for which `holds`, which is true up to some number and false above it."""

    def add_bit(i: Array, least: Array) -> Array:
        candidate = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, least)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((like.shape[0], 1), jnp.uint32))
