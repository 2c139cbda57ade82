"""Sharding as a table: ordered (regex on the parameter path -> PartitionSpec), first match wins."""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Block parameters carry a leading [L], never split. Shapes in the legend of array_types.
RULES: tuple[tuple[str, P], ...] = (
    (r"token_embedding/embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"(position|type)_embedding/embedding$", P(None, "fsdp")),  # [T, D], and [2, D]
    (r"relative_bias/embedding$", P(None, "tensor")),  # [buckets, H]
    (r"attention/value_embedding$", P(None, None, "tensor", None)),  # [L, V, G, K]
    (r"attention/sinks$", P(None, "tensor")),  # [L, H]
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),  # [L, D, H, K]
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),  # [L, H, K]
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # [L, H, K, D]
    (r"mlp/(up|gate)/kernel$", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"mlp/(up|gate)/bias$", P(None, "tensor")),  # [L, F]
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"mlp/router/kernel$", P(None, "fsdp", None)),  # [L, D, E]
    (r"mlp/experts_(up|gate)/kernel$", P(None, "expert", "fsdp", "tensor")),  # [L, E, D, F]
    (r"mlp/experts_down/kernel$", P(None, "expert", "tensor", "fsdp")),  # [L, E, F, D]
    (r"head/scores/kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"head/bias$", P("tensor")),  # [V]
    (r"(pooler/dense|head/transform|head/labels)/kernel$", P("fsdp", None)),  # [D, D], and [D, labels]
    (r"/lora_(a|b|scale|dropout)$", P()),  # adapters, small
    (r"(out|down|dense|transform|labels)/bias$|norm/(scale|bias)$|residual_scales$", P()),
    (r"^key$|ns_coeffs$", P()),  # the random key; Muon's polynomial
)
BATCH = P(("data", "fsdp", "expert"), "context")  # [B, T]
HIDDEN = P(*BATCH, None)  # [B, T, D]
LOGITS = P(*BATCH, "tensor")  # [B, T, V]
HEADS = P(*BATCH, "tensor", None)  # [B, T, H, K]


def path_of(key_path: tuple[Any, ...]) -> str:
    """A key path as the regexes see it: 'blocks/attention/query/kernel'."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a training state or of parameters.

    Optimizer moments have the paths of their parameters as endings, so the same rules serve them; scalars are replicated.

    Args:
      tree: arrays or shapes.
      mesh: a mesh with the axes of `mesh.AXES`.

    Raises:
      ValueError: an array that no rule matches, or whose axis the mesh does not divide.
    """

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, P())
        path = path_of(key_path)
        spec = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
        if spec is None:
            raise ValueError(f"parameter {path} {leaf.shape} matches no sharding rule")
        for size, axes in zip(leaf.shape, spec, strict=False):
            if size % _ways(mesh, axes):
                names = axes if isinstance(axes, str) else "*".join(axes)
                raise ValueError(
                    f"parameter {path} {leaf.shape}: {size} is not divisible by mesh.{names}={_ways(mesh, axes)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch [B, T] lies on the mesh: rows over data, fsdp and expert, positions over context."""
    return NamedSharding(mesh, BATCH)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Fixes how an activation lies on the mesh that `jax.set_mesh` has set; without a mesh, nothing.

    Left to itself the compiler lets the embedding's D over fsdp spread to the residual stream, and every device computes
    every row. Where the mesh does not divide `x`, as in generation, it may choose.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, spec) if mesh.size > 1 and divides(mesh, x.shape, spec) else x


def divides(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], spec: P) -> bool:
    """Whether the mesh can split an array of `shape` evenly as `spec` says."""
    return not any(size % _ways(mesh, axes) for size, axes in zip(shape, spec, strict=True))


def _ways(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts the mesh splits an array's axis."""
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
