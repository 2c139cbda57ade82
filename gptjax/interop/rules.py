"""What ties a foreign file's tensors to a model's parameters: rules that are read in both directions."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.array_types import Array, Params
from gptjax.distributed.sharding import path_of, tree_shardings
from gptjax.models import Model, init_params
from gptjax.models.config import TransformerConfig


class Rule(NamedTuple):
    """One parameter and the tensor of a file that holds it.

    Axes are letters of array_types' legend, and P max_seq_len, U token_types, N num_labels, B relative_buckets, E a second
    embed_dim; K is also 'rk', the two halves that rotary positions turn into each other. Letters with no space between
    them are one axis: ours 'D H K' and theirs 'HK D' is a transposition, with the heads side by side.

    Attributes:
      path: of the parameter; parameters in stacks of blocks have [L] in front, which the axes leave out.
      axes: of the parameter.
      name: of the tensor, '{}' standing for the number of the layer.
      their_axes: of the tensor.
      part: which third of the tensor's last axis, where query, key and value are one tensor.
    """

    path: str
    axes: str
    name: str
    their_axes: str
    part: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter is a stack over layers."""
        return "{}" in self.name


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """How long each letter's axis is."""
    c = config
    num_labels = 2 if c.head == "span" else c.num_labels
    return dict(
        V=c.vocab_size, D=c.embed_dim, H=c.num_heads, G=c.num_kv_heads, K=c.head_dim, F=c.mlp_dim, P=c.max_seq_len,
        U=c.token_types, N=num_labels, B=c.relative_buckets, E=c.embed_dim, r=2, k=c.head_dim // 2,
    )  # fmt: skip


def regroup(x: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Brings `x` from the axes `source` to the axes `target`: splits, transposes and joins."""
    letters = source.replace(" ", "")
    x = x.reshape([sizes[letter] for letter in letters])
    x = x.transpose([letters.index(letter) for letter in target.replace(" ", "")])
    return x.reshape([math.prod(sizes[letter] for letter in group) for group in target.split()])


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def used_rules(model: Model, rules: Iterable[Rule]) -> list[tuple[Rule, int]]:
    """The rules of the parameters that `model` has, each with its number of layers, 1 if it is not stacked."""
    by_path: dict[str, list[Rule]] = {}
    for rule in rules:
        by_path.setdefault(rule.path, []).append(rule)
    used = []
    for path, leaf in leaves_by_path(_shapes(model)).items():
        (rule,) = by_path[path]
        used.append((rule, leaf.shape[0] if rule.stacked else 1))
    return used


def their_shapes(model: Model, rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that a file of `model` holds, by name."""
    sizes = axis_sizes(model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, num_layers in used_rules(model, rules):
        shape = [math.prod(sizes[letter] for letter in group) for group in rule.their_axes.split()]
        if rule.part is not None:
            shape[-1] *= 3
        shapes |= {rule.name.format(i): tuple(shape) for i in range(num_layers)}
    return shapes


def check_tensors(found: Mapping[str, Sequence[int]], needed: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises ValueError if a file's tensors are not, by name and shape, those that its model needs."""
    for problem, names in (("lacks", needed.keys() - found.keys()), ("has unknown", found.keys() - needed.keys())):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{where} {problem} tensor{'s' * (len(names) > 1)} {listed}")
    for name, shape in needed.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(f"{where}: tensor {name} has shape {list(found[name])}, its config needs {list(shape)}")


def load_params(
    model: Model, rules: Iterable[Rule], read: Callable[[str], np.ndarray], mesh: Mesh | None = None
) -> Params:
    """Makes the parameters of `model` from a file, one tensor at a time in memory besides what is loaded already.

    Args:
      model: whose parameters.
      rules: of the file; exactly one for each parameter.
      read: gives a tensor by name, in the shape of `their_shapes`.
      mesh: where each parameter goes as `distributed.sharding` says; None for the default device.
    """
    sizes = axis_sizes(model.config)
    shapes = _shapes(model)
    shardings = leaves_by_path(tree_shardings(shapes, mesh)) if mesh is not None else {}
    abstract = leaves_by_path(shapes)

    def tensor(rule: Rule, layer: int) -> np.ndarray:
        x = read(rule.name.format(layer))
        if rule.part is not None:
            x = np.split(x, 3, axis=-1)[rule.part]
        return np.ascontiguousarray(regroup(x, rule.their_axes, rule.axes, sizes), np.float32)

    params: dict[str, Array] = {}
    for rule, num_layers in used_rules(model, rules):
        sharding = shardings.get(rule.path)
        if rule.stacked:
            leaf = jnp.zeros(abstract[rule.path].shape, jnp.float32, device=sharding)
            for layer in range(num_layers):
                leaf = _set_layer(leaf, tensor(rule, layer), layer)
        else:
            leaf = jax.device_put(tensor(rule, 0), sharding)
        params[rule.path] = leaf
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path_of(path)], shapes)


def their_tensor(
    config: TransformerConfig, params: Mapping[str, Array], rules: Sequence[Rule], layer: int
) -> np.ndarray:
    """The inverse of reading: a tensor from parameters by path and the rules of its name, in order of parts."""
    sizes = axis_sizes(config)

    def part(rule: Rule) -> np.ndarray:
        x = _get_layer(params[rule.path], layer) if rule.stacked else params[rule.path]
        return regroup(np.asarray(x), rule.axes, rule.their_axes, sizes)

    return np.concatenate([part(rule) for rule in rules], axis=-1) if len(rules) > 1 else part(rules[0])


@functools.lru_cache(maxsize=8)
def _shapes(model: Model) -> Params:
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(leaf: Array, layer: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, layer, index, 0)


@jax.jit
def _get_layer(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)
