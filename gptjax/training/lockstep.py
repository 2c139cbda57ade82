"""Runs that differ only in numbers, trained in lockstep: one program steps all of them, vmapped over runs.

States and batches have a leading axis of N runs, which lies over the devices as far as it divides them; what a run keeps,
its metrics, checkpoints and totals, is its own `Loop`'s, as if it trained alone.
"""

import collections
import contextlib
import functools
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.array_types import Batch, Metrics
from gptjax.distributed.mesh import make_mesh
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.loop import Diverged, Loop, StopSignals
from gptjax.training.state import TrainState

RUNS = "runs"  # the mesh axis


class Functions(NamedTuple):
    """What the runs share.

    Attributes:
      train_step: (states, batches) -> (states, metrics), all [N, ...], compiled, the states donated.
      probe: (states, batches) -> losses [N] of a part of each batch.
      evaluate: states -> {"eval/...": number} of each run.
      take: (states, n) -> the state of run n.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    probe: Callable[[TrainState, Batch], np.ndarray]
    evaluate: Callable[[TrainState], list[dict[str, float]]]
    take: Callable[[TrainState, int], TrainState]


def over_runs(function: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    """`function` of one run, for N runs."""
    return jax.vmap(function, in_axes=in_axes, spmd_axis_name=RUNS)


def make_mesh_of_runs(sizes: Mapping[str, int], num_runs: int) -> Mesh:
    """The mesh of `distributed.mesh` with an axis of runs before the others: the most ways that divide runs and devices.

    Args:
      sizes: of the other axes; of -1, what the runs leave.
    """
    devices = jax.devices()
    fixed = math.prod(size for size in sizes.values() if size > 0)
    ways = math.gcd(num_runs, max(1, len(devices) // fixed))
    one = make_mesh(sizes, devices[: len(devices) // ways])
    shape, names = (ways, *one.shape.values()), (RUNS, *one.axis_names)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def with_runs(sharding: NamedSharding) -> NamedSharding:
    """How N of what lies so in one run lie."""
    return NamedSharding(sharding.mesh, P(RUNS, *sharding.spec))


def common_steps(checkpoints: Sequence[Checkpoints]) -> list[tuple[int, list[int]]]:
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


def train(
    loops: Sequence[Loop],
    functions: Functions,
    states: TrainState,
    batches: Iterator[Batch],
    records: Sequence[dict[str, Any]],
) -> tuple[TrainState, dict[int, str], int]:
    """Trains all runs until the last step, a signal, or the time limit; whatever they end with is saved.

    A run that diverges, or whose files cannot be written, is left alone from there on; the others train on.

    Args:
      loops: of each run, all with the same settings; of their functions only `progress` is called.
      states, batches, records: as `Loop.run` takes them, of all runs, which are at one step.

    Returns:
      (the last states, 'diverged' or 'crashed' by the number of each run that was, and the signal that stopped them or 0).
    """
    s = loops[0].settings
    going = dict(enumerate(loops))
    lost: dict[int, str] = {}
    for loop, record in zip(loops, records, strict=True):
        loop.start(record)
    deadline = time.monotonic() + s.max_minutes * 60 if s.max_minutes else math.inf
    step = int(states.step[0])
    pending: tuple[int, Metrics] | None = None
    lines: dict[int, dict[str, float]] = {}
    stop = False

    @contextlib.contextmanager
    def alone(run: int) -> Iterator[None]:
        """What goes wrong within it is this run's, and the end of it."""
        try:
            yield
        except Exception as error:
            lost[run] = "diverged" if isinstance(error, Diverged) else "crashed"
            del going[run]
            print(f"{loops[run].writer.path.parent}: {lost[run]}: {error}", file=sys.stderr)
            if lost[run] == "crashed":
                traceback.print_exc()

    def settle(step: int, metrics: Metrics) -> None:
        values = jax.device_get(metrics)
        for run, loop in list(going.items()):
            with alone(run):
                _, lines[run] = loop.settle(step, {name: value[run] for name, value in values.items()})

    def save(step: int, batch: Batch) -> None:
        losses = functions.probe(states, batch)
        for run, loop in list(going.items()):
            with alone(run):
                loop.checkpoints.wait()  # for all, before any saves: none is ever two saves ahead of another
        for run, loop in list(going.items()):
            with alone(run):
                loop.save(step, functions.take(states, run), float(losses[run]), lines[run])

    def finish(step: int) -> None:
        results = functools.cache(lambda: functions.evaluate(states))
        for run in [run for run in going if run in lines]:
            with alone(run):
                loops[run].finish(step, lines[run], functools.partial(lambda run: results()[run], run))
        for loop in loops:
            loop.clock = time.perf_counter()  # what other runs took is not training time either

    with StopSignals() as signals:
        try:
            # Killed between the save of this step and its line.
            lines = {run: records[run]["line"] for run in going if records[run] and step not in loops[run].writer.steps}
            if lines:
                finish(step)
            while step < s.num_train_steps and not stop and going:
                batch = next(batches)
                states, metrics = functions.train_step(states, batch)
                step += 1
                # The step before is looked at while this one runs, so that the devices never wait for the log.
                if pending is not None:
                    settle(*pending)
                    for run, loop in going.items():
                        loop.log(step - 1, lines[run])
                pending = step, metrics
                stop = bool(signals.received) or time.monotonic() > deadline
                if stop or s.is_due(step, s.checkpoint_every_steps) or s.is_due(step, s.eval_every_steps):
                    settle(*pending)
                    pending = None
                    save(step, batch)
                    finish(step)
        finally:
            for run, loop in list(going.items()):
                with alone(run):
                    loop.checkpoints.wait()
            batches.close()  # type: ignore[attr-defined]
    stopped = 0 if step == s.num_train_steps or not going else signals.received or signal.SIGTERM
    return states, lost, stopped
