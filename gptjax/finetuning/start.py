"""Starting from another model's parameters: which of them are taken, and which are new."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gptjax.array_types import Array, Params
from gptjax.distributed.sharding import path_of
from gptjax.models import Model, init_params
from gptjax.training.optimizers import Factors, factor_of


class Start(NamedTuple):
    """What a model takes from another.

    Attributes:
      taken: arrays by path.
      new: paths of its parameters that the other lacks, or has in another shape, as a head of other labels.
      left: paths of the other's that it has no use for.
    """

    taken: dict[str, Array]
    new: list[str]
    left: list[str]


def start_from(model: Model, params: Params) -> Start:
    """Sorts another model's parameters by what `model` takes of them."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    needed = {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    taken = {path: leaf for path, leaf in found.items() if needed.get(path) == leaf.shape}
    return Start(taken, sorted(needed.keys() - taken.keys()), sorted(found.keys() - taken.keys()))


def put_in(drawn: Params, taken: dict[str, Array]) -> Params:
    """`drawn` parameters with those of `taken` in their place."""
    return jax.tree_util.tree_map_with_path(lambda path, drawn: taken.get(path_of(path), drawn), drawn)


def frozen(factors: Factors) -> Callable[[str], bool]:
    """Whether a parameter is left as it is, by its path."""
    return lambda path: factor_of(path, factors) == 0
