"""Sharding as a table: ordered (regex on the parameter path -> PartitionSpec), first match wins."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Block parameters carry a leading [L], never split. Shapes in the legend of array_types.
RULES: tuple[tuple[str, P], ...] = (
    (r"token_embedding/embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"position_embedding/embedding$", P(None, "fsdp")),  # [T, D]
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),  # [L, D, H, K]
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),  # [L, H, K]
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # [L, H, K, D]
    (r"mlp/up/kernel$", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"mlp/up/bias$", P(None, "tensor")),  # [L, F]
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"head/kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"(out|down)/bias$|norm/(scale|bias)$", P()),
    (r"^key$|ns_coeffs$", P()),  # the random key; Muon's polynomial
)
BATCH = P(("data", "fsdp"), "context")  # [B, T]


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
            names = () if axes is None else (axes,) if isinstance(axes, str) else axes
            ways = math.prod(mesh.shape[name] for name in names)
            if size % ways:
                raise ValueError(
                    f"parameter {path} {leaf.shape}: {size} is not divisible by mesh.{'*'.join(names)}={ways}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch [B, T] lies on the mesh: rows over data and fsdp, positions over context."""
    return NamedSharding(mesh, BATCH)
