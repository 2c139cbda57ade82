"""LoRA: a projection W is left alone and gets a trained A B beside it (Hu et al., 2021, arXiv:2106.09685, section 4).

The adapter is four more arrays beside a projection's `kernel`, which `models.layers.Einsum` adds to what it computes:
`lora_a` [..., R], `lora_b` [R, ...], and `lora_scale` and `lora_dropout`, which are never trained.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.distributed.sharding import path_of
from gptjax.training.state import gather

TRAINED = r"/lora_[ab]$"
NEVER_TRAINED = r"/lora_(scale|dropout)$"


def num_axes(path: str) -> tuple[int, int]:
    """Of the kernel of the projection at `path`: its axes in front that stack layers, and those that are summed over."""
    return int("blocks/" in path), 2 if path.endswith("attention/out") else 1


def add(params: Params, key: Array, *, projections: str, rank: int, alpha: float, dropout: float) -> Params:
    """Puts adapters beside projections; as B is zero they change nothing yet.

    Args:
      params: of a model.
      key: to draw A from.
      projections: regex on paths, such as 'attention/(query|value)$'.
      rank: R.
      alpha: A B is multiplied by alpha / R.
      dropout: rate of what goes into A.

    Raises:
      ValueError: the regex finds no projection, or experts, whose kernels have no place for an adapter.
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    modules = [path.removesuffix("/kernel") for path in leaves if path.endswith("/kernel")]
    found = [path for path in modules if re.search(projections, path)]
    if not found or any(re.search("experts_|router", path) for path in found):
        usable = [path for path in modules if not re.search("experts_|router", path)]
        raise ValueError(f"lora.projections {projections!r} must find some of, and only: {', '.join(usable)}")
    adapters: dict[str, Array] = {}
    for path, one in zip(found, jax.random.split(key, len(found)), strict=True):
        shape, (stack, inputs) = leaves[f"{path}/kernel"].shape, num_axes(path)
        layers, read, written = shape[:stack], shape[stack : stack + inputs], shape[stack + inputs :]
        bound = math.prod(read) ** -0.5
        adapters |= {
            f"{path}/lora_a": jax.random.uniform(one, (*layers, *read, rank), minval=-bound, maxval=bound),
            f"{path}/lora_b": jnp.zeros((*layers, rank, *written)),
            f"{path}/lora_scale": jnp.full(layers, alpha / rank),
            f"{path}/lora_dropout": jnp.full(layers, dropout),
        }
    return put(params, adapters)


def put(params: Params, arrays: Mapping[str, Array]) -> Params:
    """`params` with arrays by path, such as `interop.peft.read` gives them, added or in place of its own."""
    whole = gather((params,))
    for path, array in arrays.items():
        *names, last = path.split("/")
        node = whole
        for name in names:
            node = node.setdefault(name, {})
        node[last] = array
    return whole


def merge(params: Params) -> Params:
    """Adds each adapter to its kernel: the parameters of a model without adapters, that computes the same."""
    if not isinstance(params, dict):
        return params
    rest = {name: merge(value) for name, value in params.items() if not name.startswith("lora_")}
    if "lora_a" in params:
        kernel, a, b, scale = (params[name] for name in ("kernel", "lora_a", "lora_b", "lora_scale"))
        rank, layers = a.shape[-1], scale.shape
        product = a.reshape(*layers, -1, rank) @ b.reshape(*layers, rank, -1)
        rest["kernel"] = kernel + (scale[..., None, None] * product).reshape(kernel.shape)
    return rest
