"""Projections, embeddings, norms and dropout: the parts that hold parameters, as Flax modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array

INIT_STD = 0.02  # GPT-2; residual projections divide it by sqrt(2 * num_layers)


class Einsum(nn.Module):
    """A projection `einsum(equation, x, kernel) + bias`; the equation is its shape documentation.

    Own layer instead of `nn.Dense`: attention kernels keep their head axis, [D, H, K], so that sharding rules can name it.

    Attributes:
      shape: shape of the kernel.
      bias_shape: shape of the bias, None for none.
      std: standard deviation of the kernel's initial values.
    """

    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    std: float = INIT_STD

    @nn.compact
    def __call__(self, equation: str, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), self.shape)
        y = jnp.einsum(equation, x, kernel.astype(x.dtype))
        if self.bias_shape is not None:
            y += self.param("bias", nn.initializers.zeros, self.bias_shape).astype(x.dtype)
        return y


class Embedding(nn.Module):
    """A table [N, D] of vectors; `attend` scores against all of them (the tied head).

    Attributes:
      shape: (N, D), the number of entries and their width.
    """

    shape: tuple[int, int]

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(INIT_STD), self.shape)

    def __call__(self, index: Array, dtype: Any) -> Array:
        """Looks up `index` [B, T]; returns [B, T, D] in `dtype`."""
        return jnp.take(self.embedding, index, axis=0).astype(dtype)

    def attend(self, x: Array) -> Array:
        """Scores `x` [B, T, D] against every entry; returns [B, T, N] in float32."""
        return jnp.einsum("btd,vd->btv", x, self.embedding.astype(x.dtype), preferred_element_type=jnp.float32)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis (Ba et al., 2016, arXiv:1607.06450)."""

    epsilon: float
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Statistics in float32: in bfloat16 the variance of a wide vector loses all its digits.
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.epsilon)
        y *= self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang & Sennrich, 2019, arXiv:1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.param("scale", nn.initializers.ones, (x.shape[-1],))).astype(x.dtype)


# Ungated activations by name.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form, as GPT-2 has it
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def dropout(x: Array, rate: Array | float | None, key: Callable[[], Array]) -> Array:
    """Zeroes entries of `x` with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      x: any shape.
      rate: a scalar, possibly traced, so that a sweep may vary it without recompiling; None means no dropout at all.
      key: called for a random key when there is dropout.
    """
    if rate is None:
        return x
    keep = jax.random.bernoulli(key(), 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - jnp.asarray(rate, x.dtype)), jnp.zeros_like(x))
