"""How a token's place enters the model: sinusoidal, rotary, ALiBi, T5's relative bias. Learned ones are an embedding."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from gptjax.array_types import Array

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "relative", "none")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")

# (query_index [B or 1, T], key_index [B or 1, S]) -> what is added to the scores, [B or 1, H, T, S] float32. A pytree, for
# its arrays go with it where each device computes its own part.
Bias = Callable[[Array, Array], Array]


def sinusoidal(positions: Array, embed_dim: int) -> Array:
    """sin and cos of positions at geometric wavelengths (Vaswani et al., 2017, arXiv:1706.03762, section 3.5).

    Args:
      positions: [B, T].
      embed_dim: D; even.

    Returns:
      [B, T, D] float32, the sines in the first half and the cosines in the second.
    """
    inverse = jnp.asarray(10000.0 ** (-np.arange(0, embed_dim, 2) / embed_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Rope(NamedTuple):
    """The numbers of rotary positions, as checkpoints state them.

    Attributes:
      theta: the longest wavelength is 2 pi theta, before scaling.
      scaling: 'none'; 'linear' divides positions by `factor`; 'llama3' (Grattafiori et al., 2024, arXiv:2407.21783) and
        'yarn' (Peng et al., 2023, arXiv:2309.00071) divide only the long wavelengths by it, with a ramp between.
      factor: how many times longer than `original_len` the context is meant to be.
      original_len: the context of pretraining.
      low, high: where the ramp begins and ends, in turns within `original_len`: llama3's low_freq_factor and
        high_freq_factor, yarn's beta_slow and beta_fast.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_len: int = 0
    low: float = 1.0
    high: float = 4.0

    def inverse_wavelengths(self, head_dim: int) -> np.ndarray:
        """Radians a position, [K / 2] float32."""
        inverse = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            inverse = inverse / self.factor
        if self.scaling == "llama3":
            turns = self.original_len * inverse / (2 * math.pi)
            kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
            inverse = kept * inverse + (1 - kept) * inverse / self.factor
        if self.scaling == "yarn":
            # Its ramp is linear in the number of the dimension, between those that make `high` and `low` turns.
            def dimension(turns: float) -> float:
                return head_dim * math.log(self.original_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

            first = max(math.floor(dimension(self.high)), 0)
            last = min(math.ceil(dimension(self.low)), head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
            inverse = ramp * inverse / self.factor + (1 - ramp) * inverse
        return inverse.astype(np.float32)

    @property
    def amplitude(self) -> float:
        """Multiplies rotated queries and keys: yarn's 0.1 ln(factor) + 1, else 1."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0

    def rotate(self, x: Array, positions: Array) -> Array:
        """Turns each pair of channels (i, i + K/2) by an angle that grows with the position (Su et al., 2021, RoFormer,
        arXiv:2104.09864, section 3.2; the pairing is GPT-NeoX's and Llama's).

        Args:
          x: [B, T, H, K].
          positions: [B, T].

        Returns:
          [B, T, H, K] in the dtype of `x`.
        """
        angles = positions[:, :, None, None].astype(jnp.float32) * self.inverse_wavelengths(x.shape[-1])
        sin, cos = jnp.sin(angles) * self.amplitude, jnp.cos(angles) * self.amplitude
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """[H] float32, geometric from 2^(-8/n) for n a power of two; other counts interleave those of 2n (Press et al., 2021,
    arXiv:2108.12409, section 3, and its published code)."""

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    n = 2 ** int(math.log2(num_heads))
    return np.array(powers(n) + powers(2 * n)[::2][: num_heads - n], np.float32)


def alibi_bias(num_heads: int) -> Bias:
    """Minus slope times distance; on both sides of the query, so that it also serves attention without a causal mask."""
    slopes = alibi_slopes(num_heads)[:, None, None]

    def bias(query_index: Array, key_index: Array) -> Array:
        distance = jnp.abs(query_index[:, :, None] - key_index[:, None, :])
        return jnp.asarray(-slopes) * distance[:, None].astype(jnp.float32)

    return Partial(bias)


def relative_bucket(distance: Array, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Array:
    """The bucket of key index - query index: one for each small distance, logarithmic ones up to `max_distance`
    (Raffel et al., 2020, T5, arXiv:1910.10683, section 2.1, and its published code)."""
    offset: Array | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


def relative_bias(table: Array, *, bidirectional: bool, max_distance: int) -> Bias:
    """Looks up a learned bias by bucket of distance; `table` is [num_buckets, H]."""

    def bias(table: Array, query_index: Array, key_index: Array) -> Array:
        distance = key_index[:, None, :] - query_index[:, :, None]
        bucket = relative_bucket(
            distance, bidirectional=bidirectional, num_buckets=table.shape[0], max_distance=max_distance
        )
        return jnp.take(table, bucket, axis=0).transpose(0, 3, 1, 2)

    return Partial(bias, table)
