"""Runs that train together: each has a loop of its own, in a thread, and their steps are one program over all of them."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax.array_types import Batch, Metrics
from gptjax.training.state import TrainState


class Lockstep:
    """The states of N runs as one, stacked along a first axis; a step waits until every run that goes on has its batch.

    Args:
      train_step: (state, batch) -> (state, metrics), all stacked: `jax.vmap` of a run's own.
      states: stacked.
      num_runs: N.
    """

    def __init__(
        self,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
        states: TrainState,
        num_runs: int,
    ):
        self.states, self._train_step = states, train_step
        self._going_on = set(range(num_runs))
        self._num_runs = num_runs
        self._batches: dict[int, Batch] = {}
        self._metrics: Metrics = {}
        self._turn = 0
        self._error: BaseException | None = None
        self._condition = threading.Condition()

    def train_step(self, row: "Row", batch: Batch) -> tuple["Row", Metrics]:
        """One step of one run, together with the others; called by its thread."""
        with self._condition:
            self._batches[row.index] = batch
            turn = self._turn
            self._step_if_ready()
            self._condition.wait_for(lambda: self._turn > turn or self._error)
            if self._error:
                raise RuntimeError("the step that the runs share has failed") from self._error
            return row, {name: value[row.index] for name, value in self._metrics.items()}

    def leave(self, index: int) -> None:
        """Ends a run; the others do not wait for it any more."""
        with self._condition:
            self._going_on.discard(index)
            self._step_if_ready()

    def _step_if_ready(self) -> None:
        if self._error or not self._going_on or not self._going_on <= self._batches.keys():
            return
        some = next(iter(self._batches.values()))  # for runs that are over, whose states nobody looks at
        batches = [self._batches.get(index, some) for index in range(self._num_runs)]
        try:
            self.states, metrics = self._train_step(self.states, jax.tree.map(lambda *x: np.stack(x), *batches))
            self._metrics = jax.device_get(metrics)
        except BaseException as error:
            self._error = error
        self._batches = {}
        self._turn += 1
        self._condition.notify_all()


class Row:
    """One run's state in a `Lockstep`; only while its thread is not in a step."""

    def __init__(self, lockstep: Lockstep, index: int):
        self.index, self._lockstep = index, lockstep

    @property
    def step(self) -> Any:
        """The number of updates made."""
        return self._lockstep.states.step[self.index]

    def get(self) -> TrainState:
        """A copy of its own."""
        return jax.tree.map(lambda x: x[self.index], self._lockstep.states)
