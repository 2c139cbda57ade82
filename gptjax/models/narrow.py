"""Products with weights, which generation may keep in fewer bits than it computes in: bfloat16, int8 and int4."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.mesh import apart, target_platform

_ROWS_AT_ONCE = 8  # rows of a kernel that one pass of a matrix-vector product adds up on CPU
_GROUP = 32  # inputs that share a scale and a minimum in int4


class Int8(NamedTuple):
    """A kernel as `values * scale`, a scale for each output (absmax; Dettmers et al., 2022, arXiv:2208.07339, section 2.1).

    Attributes:
      values: int8, of the kernel's shape.
      scale: float32, of its output dimensions.
    """

    values: Array
    scale: Array


class Int4(NamedTuple):
    """A kernel as `values * scale + minimum` in groups of 32 inputs, 5 bits a weight: llama.cpp's Q4_1, but for the dtype.

    Attributes:
      words: int32 [I / 8, outputs]; a word holds the values, 0 to 15, of 8 inputs that follow one another, the first in its
        lowest bits. I is the number of inputs, in multiples of 32.
      scale, minimum: bfloat16 [I / 32, outputs].
    """

    words: Array
    scale: Array
    minimum: Array


def quantize(kernel: Array, num_inputs: int, weights: str) -> Int8 | Int4:
    """Rounds a kernel, the first `num_inputs` of whose dimensions are summed over, to 'int8' or 'int4'."""
    if weights == "int4":
        inputs, outputs = math.prod(kernel.shape[:num_inputs]), kernel.shape[num_inputs:]
        kernel = kernel.reshape(inputs, -1)
        groups = jnp.pad(kernel, ((0, -inputs % _GROUP), (0, 0)), mode="edge").reshape(-1, _GROUP, kernel.shape[1])
        minimum = jnp.min(groups, axis=1).astype(jnp.bfloat16)
        scale = (jnp.maximum(jnp.max(groups, axis=1) - minimum, 1e-12) / 15).astype(jnp.bfloat16)
        values = jnp.clip(jnp.round((groups - minimum[:, None]) / scale[:, None].astype(jnp.float32)), 0, 15)
        nibbles = values.astype(jnp.int32).reshape(-1, 8, kernel.shape[1]) << _shifts()
        # Their bits do not meet, so the sum is their union.
        return Int4(*(x.reshape(-1, *outputs) for x in (jnp.sum(nibbles, axis=1), scale, minimum)))
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=tuple(range(num_inputs))), 1e-12) / 127
    return Int8(jnp.round(kernel / scale).astype(jnp.int8), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: Array, kernel: Array) -> Array:
    """einsum(equation, x, kernel), whose derivative for the kernel puts `x` first, as the kernel lies in memory.

    JAX puts the cotangent first, which XLA:CPU then transposes for oneDNN: 4.2 ms in place of 2.9 for `mlp/up` of GPT-2
    and 1,024 tokens.
    """
    return jnp.einsum(equation, x, kernel)


def _contract_bwd(equation: str, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    of_x, of_kernel, of_y = re.split(",|->", equation)
    x = apart(x)  # or XLA would compute it again (a GELU, a norm) entry by entry, in the order of its transposition
    return jnp.einsum(f"{of_y},{of_kernel}->{of_x}", g, kernel), jnp.einsum(f"{of_x},{of_y}->{of_kernel}", x, g)


contract.defvjp(lambda equation, x, kernel: (contract(equation, x, kernel), (x, kernel)), _contract_bwd)


def product(equation: str, x: Array, kernel: Array | Int8 | Int4) -> Array:
    """einsum(equation, x, kernel) in the dtype of `x`, of a kernel in any format.

    Args:
      equation: sums over all dimensions of `x` but the first two, which are the kernel's first.
      x: [B, T, ...].
      kernel: float32, bfloat16, `Int8` or `Int4`.

    Returns:
      [B, T, ...].
    """
    rows = x.shape[0] * x.shape[1]
    on_cpu = target_platform() == "cpu"
    if isinstance(kernel, Int4):
        if on_cpu and rows <= _ROWS_AT_ONCE:
            return _streamed(x, kernel)
        return jnp.einsum(equation, x, widen(kernel, x.shape[2:]).astype(x.dtype))
    values = kernel.values if isinstance(kernel, Int8) else kernel
    narrow = values.dtype.itemsize < x.dtype.itemsize
    if not narrow or not on_cpu:
        y = contract(equation, x, values.astype(x.dtype))
    elif rows == 1 or (values.dtype == jnp.int8 and rows <= _ROWS_AT_ONCE):
        y = _streamed(x, values)
    elif values.dtype == jnp.int8:
        y = jnp.einsum(equation, x, values.astype(jnp.float32))
    else:
        y = jnp.einsum(equation, x.astype(values.dtype), values, preferred_element_type=x.dtype)
    return y * kernel.scale.astype(y.dtype) if isinstance(kernel, Int8) else y


def widen(kernel: Int4, inputs: tuple[int, ...]) -> Array:
    """The kernel in float32, of `inputs` and its outputs' dimensions."""
    outputs = kernel.words.shape[1:]
    values = (kernel.words.reshape(-1, 1, math.prod(outputs)) >> _shifts()) & 15
    scale, minimum = (x.reshape(-1, 1, math.prod(outputs)) for x in (kernel.scale, kernel.minimum))
    wide = values.reshape(-1, _GROUP, math.prod(outputs)) * scale.astype(jnp.float32) + minimum
    return wide.reshape(-1, math.prod(outputs))[: math.prod(inputs)].reshape(*inputs, *outputs)


def _shifts() -> Array:
    """By how many bits the 8 values of a word are shifted."""
    return 4 * jnp.arange(8)[:, None]


def _streamed(x: Array, kernel: Array | Int4) -> Array:
    """The product of few rows, as one loop that reads each narrow weight once.

    XLA:CPU widens the whole kernel before a matrix-vector product and takes ten times as long. Some rows are added up
    before the sum is stored, else the loop waits for its own stores.
    """
    batch, length, num_inputs = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    outputs = kernel.words.shape[1:] if isinstance(kernel, Int4) else kernel.shape[x.ndim - 2 :]
    width = math.prod(outputs)
    # Tied to `x`, or the compiler would widen the kernel before a loop over tokens.
    x, kernel = jax.lax.optimization_barrier((x.reshape(batch * length, num_inputs), kernel))
    if isinstance(kernel, Int4):
        at_once = _GROUP // 2  # with a whole group XLA:CPU uses no vectors, and takes ten times as long
        x = jnp.pad(x, ((0, 0), (0, -num_inputs % _GROUP)))
        words = kernel.words.reshape(1, -1, 2, width)
        columns = [(words[:, :, i // 8] >> 4 * (i % 8)) & 15 for i in range(at_once)]
    else:
        at_once = math.gcd(num_inputs, _ROWS_AT_ONCE)
        values = kernel.reshape(1, -1, at_once, width)
        columns = [values[:, :, i] for i in range(at_once)]
    x = x.reshape(batch * length, -1, at_once)
    terms = (x[:, :, i, None] * column.astype(x.dtype) for i, column in enumerate(columns))
    total = functools.reduce(jnp.add, terms)
    if isinstance(kernel, Int4):
        scale, minimum = (
            jnp.broadcast_to(y.reshape(-1, 1, width), (len(y), 2, width)).reshape(1, -1, width).astype(x.dtype)
            for y in (kernel.scale, kernel.minimum)
        )
        total = total * scale + jax.lax.optimization_barrier(jnp.sum(x, axis=2))[:, :, None] * minimum
    return jnp.sum(total, axis=1).reshape(batch, length, *outputs)
