"""The experts of a mixture, applied to the tokens that chose them; each device of a mesh works on its own part."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.array_types import Array
from gptjax.distributed.sharding import BATCH, HIDDEN, divides
from gptjax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS

Kernels = tuple[
    Array, Array | None, Array
]  # up and gate [E, D, F], down [E, F, D]; gate None for an ungated activation


def mix_experts(x: Array, weights: Array, chosen: Array, kernels: Kernels, activation: str) -> Array:
    """The weighted sum of what each token's experts make of it; no token is dropped.

    On a mesh each device gathers the tokens of its group along `expert`, applies the experts it holds, and gives back sums:
    the compiler by itself would sort the tokens of all devices on every one of them.

    Args:
      x: [B, T, D].
      weights, chosen: [B, T, k], of each token's experts and which they are.
      kernels: see `Kernels`.
      activation: a name in `layers.ACTIVATIONS` or `GATED_ACTIVATIONS`.

    Returns:
      [B, T, D] in the dtype of `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not divides(mesh, x.shape, HIDDEN):
        return _mix(x, weights, chosen, kernels, activation, 0)
    groups, parts = mesh.shape["expert"], mesh.shape["tensor"]

    def own_part(x: Array, weights: Array, chosen: Array, kernels: Kernels) -> Array:
        first: Array | int = 0
        if groups > 1:
            x, weights, chosen = (jax.lax.all_gather(y, "expert", axis=0, tiled=True) for y in (x, weights, chosen))
            first = jax.lax.axis_index("expert") * kernels[0].shape[0]
        mixed = _mix(x, weights, chosen, kernels, activation, first)
        if parts > 1:
            mixed = jax.lax.psum(mixed, "tensor")
        return jax.lax.psum_scatter(mixed, "expert", scatter_dimension=0, tiled=True) if groups > 1 else mixed

    tokens, into, out_of = P(*BATCH, None), P("expert", None, "tensor"), P("expert", "tensor", None)
    return jax.shard_map(
        own_part, in_specs=(tokens, tokens, tokens, (into, into, out_of)), out_specs=tokens, check_vma=False
    )(x, weights, chosen, kernels)


def _mix(x: Array, weights: Array, chosen: Array, kernels: Kernels, activation: str, first: Array | int) -> Array:
    """Of the experts `first` and on, as many as the kernels hold; what others would add is left out."""
    up, gate, down = kernels
    count, dim, repeats = up.shape[0], x.shape[-1], chosen.shape[-1]
    # Every (token, expert) pair is a row; sorted by expert, each expert's rows lie together, those of others at the end.
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=count + 1)[:count]
    rows = x.reshape(-1, dim)[order // repeats]
    hidden = jax.lax.ragged_dot(rows, up, sizes)
    if gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden *= GATED_ACTIVATIONS[activation](jax.lax.ragged_dot(rows, gate, sizes))
    rows = jax.lax.ragged_dot(hidden, down, sizes)
    rows = jnp.where((jnp.arange(len(rows)) < jnp.sum(sizes))[:, None], rows, 0)
    by_token = jnp.zeros_like(rows).at[order].set(rows).reshape(*chosen.shape, dim)
    return jnp.einsum("btkd,btk->btd", by_token, weights.astype(rows.dtype))
