"""Dropout (Srivastava et al., 2014) by a hash of each entry's place, which costs little more than a copy.

JAX's own generator takes some hundred operations a number, on CPU in passes over memory: 60 times as long as this for the
inputs of a LoRA adapter, two fifths of that training step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.array_types import Array


def dropout(x: Array, rate: Array | float | None, key: Callable[[], Array]) -> Array:
    """Zeroes entries of `x` with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      x: any shape.
      rate: a scalar, possibly traced, so that a sweep may vary it without recompiling; None means no dropout at all.
      key: called for a random key when there is dropout.
    """
    if rate is None:
        return x
    kept = keep_mask(key(), rate, x.shape)
    return jnp.where(kept, x / (1.0 - jnp.asarray(rate, x.dtype)), jnp.zeros_like(x))


def keep_mask(key: Array, rate: Array | float, shape: tuple[int, ...]) -> Array:
    """Bools of a shape, True with probability 1 - `rate`, the same however the array is sharded.

    The key and a row's number give the row two words, which with an entry's place in the row give its number, so that rows
    and keys have sequences of their own. `rate` counts in steps of 2 ** -24.
    """
    first, second = jax.random.key_data(key).reshape(-1)[:2]
    row = jnp.zeros((*shape[:-1], 1), jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis)
    one = _hash(row, first, second)
    # The barrier keeps them from being computed again for each entry.
    one, other = jax.lax.optimization_barrier((one, _hash(one, second, first)))
    drawn = _hash(jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1), one, other)
    return (drawn >> 8).astype(jnp.float32) * jnp.float32(2**-24) < 1.0 - rate


def _hash(x: Array, first: Array, second: Array) -> Array:
    """uint32 that look random out of ones that count: lowbias32 (Wellons, Hash Prospector, 2018), keyed twice."""
    x = x + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15) ^ second) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
