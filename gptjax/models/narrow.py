"""Weights kept in fewer bits than the computation, for generation: bfloat16 and int8."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.mesh import target_platform

_ROWS_AT_ONCE = 8  # rows of a kernel that one pass of a matrix-vector product adds up on CPU


class Int8(NamedTuple):
    """A kernel as `values * scale`, a scale for each output (absmax; Dettmers et al., 2022, arXiv:2208.07339, section 2.1).

    Attributes:
      values: int8, of the kernel's shape.
      scale: float32, of its output dimensions.
    """

    values: Array
    scale: Array


def quantize(kernel: Array, num_inputs: int) -> Int8:
    """Rounds a kernel, the first `num_inputs` of whose dimensions are summed over, to int8."""
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=tuple(range(num_inputs))), 1e-12) / 127
    return Int8(jnp.round(kernel / scale).astype(jnp.int8), scale)


def product(equation: str, x: Array, kernel: Array | Int8) -> Array:
    """einsum(equation, x, kernel) in the dtype of `x`, of a kernel in any format.

    Args:
      equation: sums over all dimensions of `x` but the first two, which are the kernel's first.
      x: [B, T, ...].
      kernel: float32, bfloat16 or `Int8`.

    Returns:
      [B, T, ...].
    """
    values = kernel.values if isinstance(kernel, Int8) else kernel
    rows = x.shape[0] * x.shape[1]
    narrow = values.dtype.itemsize < x.dtype.itemsize
    if not narrow or target_platform() != "cpu":
        y = jnp.einsum(equation, x, values.astype(x.dtype))
    elif rows == 1 or (values.dtype == jnp.int8 and rows <= _ROWS_AT_ONCE):
        y = _streamed(x, values)
    elif values.dtype == jnp.int8:
        y = jnp.einsum(equation, x, values.astype(jnp.float32))
    else:
        y = jnp.einsum(equation, x.astype(values.dtype), values, preferred_element_type=x.dtype)
    return y * kernel.scale.astype(y.dtype) if isinstance(kernel, Int8) else y


def _streamed(x: Array, values: Array) -> Array:
    """The product of few rows, as one loop that reads each narrow weight once.

    XLA:CPU widens the whole kernel before a matrix-vector product and takes ten times as long. Some rows are added up
    before the sum is stored, else the loop waits for its own stores.
    """
    batch, length, inputs = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    outputs = values.shape[x.ndim - 2 :]
    unroll = math.gcd(inputs, _ROWS_AT_ONCE)
    # Tied to `x`, or the compiler would widen the kernel before a loop over tokens.
    x, values = jax.lax.optimization_barrier((x, values))
    x = x.reshape(batch * length, inputs // unroll, unroll)
    values = values.reshape(1, inputs // unroll, unroll, -1)
    terms = (x[:, :, i, None] * values[:, :, i].astype(x.dtype) for i in range(unroll))
    total = next(terms)
    for term in terms:
        total = total + term
    return jnp.sum(total, axis=1).reshape(batch, length, *outputs)
