"""Runs that differ only in numbers, trained in lockstep: one program steps all of them.

States and batches have a leading axis of N runs, which lies over the devices as far as it divides them; what a run keeps,
its metrics, checkpoints and totals, is its own `loop.Logbook`'s, as if it trained alone.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.distributed.mesh import make_mesh

if TYPE_CHECKING:  # slow to import
    from gptjax.training.checkpoints import Checkpoints

RUNS = "runs"  # the mesh axis


class Axis(NamedTuple):
    """What becomes of one run's functions and arrays where there are N runs.

    Attributes:
      over: of a function of one run's arrays, one of all runs'.
      lies: of how an array of one run lies on the mesh, how those of all lie.
      stack: of a tree of each run, one of all.
      split: its inverse.
    """

    over: Callable[[Callable[..., Any]], Callable[..., Any]]
    lies: Callable[[NamedSharding], NamedSharding]
    stack: Callable[[Sequence[Any]], Any]
    split: Callable[[Any], Sequence[Any]]


def side_by_side(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one run, for N runs, as one of N times as much."""
    return jax.vmap(function, spmd_axis_name=RUNS)


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but for one after another of the runs that lie on a device."""

    def own(*stacked: Any) -> Any:
        return jax.lax.map(lambda one: function(*one), stacked)

    return jax.shard_map(own, in_specs=P(RUNS), out_specs=P(RUNS), axis_names={RUNS}, check_vma=False)


def over_runs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of one run, for N: accelerators want much to do at once, a core what fits into its cache."""
    return (in_turn if jax.default_backend() == "cpu" else side_by_side)(function)


def with_runs(sharding: NamedSharding) -> NamedSharding:
    """How N of what lies so in one run lie."""
    return NamedSharding(sharding.mesh, P(RUNS, *sharding.spec))


def _split(tree: Any) -> list[Any]:
    tree = jax.device_get(tree)
    num_runs = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda x, run=run: np.asarray(x[run]), tree) for run in range(num_runs)]


ALONE = Axis(lambda function: function, lambda sharding: sharding, lambda trees: trees[0], lambda tree: [tree])
TOGETHER = Axis(over_runs, with_runs, lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees), _split)


def make_mesh_of_runs(sizes: Mapping[str, int], num_runs: int) -> Mesh:
    """The mesh of `distributed.mesh` with an axis of runs before the others: the most ways that divide runs and devices.

    Args:
      sizes: of the other axes; of -1, what the runs leave: on CPU, whose devices are cores of one machine, nothing.
    """
    devices = jax.devices()
    is_cpu = devices[0].platform == "cpu"
    fixed = math.prod(size for size in sizes.values() if size > 0)
    room = max(1, len(devices) // fixed)
    ways = max(n for n in range(1, room + 1) if num_runs % n == 0 and (is_cpu or room % n == 0))
    one = make_mesh(sizes, devices[: fixed if is_cpu else len(devices) // ways])
    shape, names = (ways, *one.shape.values()), (RUNS, *one.axis_names)
    return jax.make_mesh(shape, names, devices=devices[: math.prod(shape)], axis_types=(AxisType.Auto,) * len(names))


def common_steps(checkpoints: Sequence["Checkpoints"]) -> list[tuple[int, list[int]]]:
    """(step, runs that go on from it) of runs that may have stopped apart: the latest step that the most of them have.

    A run without checkpoints starts at step 0.

    Raises:
      ValueError: all checkpoints of a run are damaged.
    """
    steps = {}
    for run, own in enumerate(checkpoints):
        steps[run] = set(own.whole_steps())
        if own.steps() and not steps[run]:
            raise ValueError(f"every checkpoint in {own.path} is damaged")
        steps[run] = steps[run] or {0}
    groups = []
    while steps:
        counts = collections.Counter(step for own in steps.values() for step in own)
        best = max(counts, key=lambda step: (counts[step], step))
        groups.append((best, [run for run, own in steps.items() if best in own]))
        steps = {run: own for run, own in steps.items() if best not in own}
    return groups
