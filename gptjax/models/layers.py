"""Projections, embeddings and norms: the parts that hold parameters, as Flax modules."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.array_types import Array
from gptjax.models.dropout import dropout
from gptjax.models.narrow import contract, product

PRODUCT = "product"  # what rematerialisation knows products of kernels by, whose derivative is written out
INIT_STD = 0.02  # GPT-2; residual projections divide it by sqrt(2 * num_layers)


def sum_over_tokens(x: Array) -> Array:
    """Sums [B, T, ...] over B and T in float32.

    In two stages: XLA:CPU computes one long reduction on one core, several times slower.
    """
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(x, axis=1, dtype=jnp.float32)), axis=0)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """`x` [B, T, ...] + `bias` [...], in the dtype of `x`."""
    return x + bias.astype(x.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), lambda _, g: (g, sum_over_tokens(g)))


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
        if self.is_initializing():
            # Drawn as a matrix: the same numbers, which XLA:CPU compiles up to ten times faster than a short last axis.
            matrix = (self.shape[0], math.prod(self.shape[1:]))
            self.param("kernel", lambda key: nn.initializers.normal(self.std)(key, matrix).reshape(self.shape))
        # Not what self.param returns, for generation may have put a narrow kernel in its place.
        y = checkpoint_name(product(equation, x, self.get_variable("params", "kernel")), PRODUCT)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapter(equation, x)
        if self.bias_shape is not None:
            return add_bias(y, self.param("bias", nn.initializers.zeros, self.bias_shape))
        # XLA:CPU would move what follows into the product, which then takes half as long again.
        return jax.lax.optimization_barrier(y)

    def _adapter(self, equation: str, x: Array) -> Array:
        """What `finetuning.lora` has put beside the kernel: scale * B A dropout(x)."""
        names = ("lora_a", "lora_b", "lora_scale", "lora_dropout")
        arrays: list[Array] = [self.get_variable("params", name).astype(x.dtype) for name in names]
        a, b, scale, rate = arrays
        x = dropout(x, rate if self.has_rng("dropout") else None, lambda: self.make_rng("dropout"))
        read, kernel, written = re.split(",|->", equation)
        summed = "".join(axis for axis in kernel if axis not in written)
        rest = "".join(axis for axis in read if axis not in summed)
        # In the derivatives of both the thin array comes first, or XLA:CPU would compute all before the wide one again,
        # entry by entry, to transpose it: a step of MiniLM took up to three times as long.
        low = scale * jnp.einsum(f"{read},{summed}z->{rest}z", x, a)
        return contract(f"{rest}z,z{kernel[len(summed) :]}->{written}", low, b)


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
        """Scores `x` [B, T, D] against every entry; returns [B, T, N]."""
        return jnp.einsum("btd,vd->btv", x, self.embedding.astype(x.dtype))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis (Ba et al., 2016, arXiv:1607.06450)."""

    epsilon: float
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else jnp.zeros(shape)
        return layer_norm(x, scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """The function of `LayerNorm`, for x [B, T, D]; its derivative keeps `x` and two numbers a token."""
    return _layer_norm_fwd(x, scale, bias, epsilon)[0]


def _layer_norm_fwd(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, tuple[Array, ...]]:
    # Statistics in float32: in bfloat16 the variance of a wide vector loses all its digits.
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    rsqrt = jax.lax.rsqrt(jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True) + epsilon)
    return ((x32 - mean) * rsqrt * scale + bias).astype(x.dtype), (x, mean, rsqrt, scale)


def _layer_norm_bwd(epsilon: float, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, mean, rsqrt, scale = residuals
    g = g.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * rsqrt
    scaled = g * scale
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    dx = (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normed * along) * rsqrt
    return dx.astype(x.dtype), sum_over_tokens(g * normed), sum_over_tokens(g)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang & Sennrich, 2019, arXiv:1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.param("scale", nn.initializers.ones, (x.shape[-1],))).astype(x.dtype)


# Activations by name.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
# Of a gate, which multiplies a second projection (Shazeer, 2020, arXiv:2002.05202).
GATED_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swiglu": jax.nn.silu, "geglu": ACTIVATIONS["gelu"]}
