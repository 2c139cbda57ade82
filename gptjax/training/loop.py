"""The training loop: steps, logged metrics, checkpoints and evaluations, and a clean stop at any moment.

It steps one run, or N in lockstep (`training.lockstep`); what a run keeps is its own either way.
"""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gptjax.array_types import Array, Batch, Metrics
from gptjax.training.profile import start_trace
from gptjax.training.state import TrainState
from gptjax.training.stop_signals import StopSignals
from gptjax.training.throughput import peak_memory_bytes

if TYPE_CHECKING:  # slow to import, which a run does while it compiles
    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.metrics import MetricsWriter


class LoopSettings(NamedTuple):
    """When things happen. A period of 0 is never, but the last step always logs, saves and evaluates.

    Attributes:
      num_train_steps, log_every_steps, eval_every_steps, checkpoint_every_steps: in steps.
      eval_at_start: evaluate before the first step too.
      max_minutes: stop, with the state saved, after this long; 0 for no limit.
      profile_steps: (first, last) steps to trace, or None.
    """

    num_train_steps: int
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    eval_at_start: bool
    max_minutes: float
    profile_steps: tuple[int, int] | None

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps happens after this one."""
        return step == self.num_train_steps or (every > 0 and step % every == 0)


class Totals(NamedTuple):
    """What a run has used so far; continues over resumes."""

    tokens: int = 0
    seconds: float = 0.0


class Diverged(Exception):
    """The loss is no longer finite."""


class Functions(NamedTuple):
    """What the loop calls.

    Attributes:
      train_step: (state, batch) -> (state, metrics), compiled, its state donated; of N runs all are [N, ...].
      probe: (state, batch) -> for each run the loss of a part of its batch; a state is saved only if it is finite.
      evaluate: state -> for each run {"eval/...": number}.
      split: state -> that of each run.
      progress: called with (step, line of each run that goes on) after each step.
      give_up: called with (run, error) where a run cannot go on; raises, or the others go on without it.
      vote: (wish, a metric of the step) -> whether any process wished, see `processes.make_vote`; here, to stop.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    probe: Callable[[TrainState, Batch], Sequence[float]]
    evaluate: Callable[[TrainState], list[dict[str, float]]]
    split: Callable[[TrainState], Sequence[TrainState]]
    progress: Callable[[int, list[dict[str, float]]], None]
    give_up: Callable[[int, Exception], None]
    vote: Callable[[bool, Array], bool]


class Logbook:
    """What one run keeps: its metrics, checkpoints and totals.

    Args:
      settings: when things happen.
      checkpoints, writer: where states and metrics go.
      record: what `Checkpoints.restore` returned, or {} at the start.
      flops_per_token, peak_flops: for `perf/flops` and `perf/mfu`.
    """

    def __init__(
        self,
        settings: LoopSettings,
        checkpoints: "Checkpoints",
        writer: "MetricsWriter",
        record: dict[str, Any],
        *,
        flops_per_token: int,
        peak_flops: float,
    ):
        self.settings, self.checkpoints, self.writer, self.record = settings, checkpoints, writer, record
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.totals = Totals(**record.get("totals", {}))
        self.seen = self.totals  # at the last logged line, for the throughput since
        self.clock = time.perf_counter()

    def begin(self, results: dict[str, float]) -> None:
        """Writes what an evaluation says before the first step."""
        if 0 not in self.writer.steps:
            self.writer.write(0, {"train/tokens": 0, "time/seconds": 0.0, "perf/flops": 0.0} | results)

    def settle(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """The line of a step that has ended, whose tokens it counts; refuses a loss that is not finite."""
        now = time.perf_counter()
        tokens = self.totals.tokens + int(values.pop("tokens"))
        self.totals = Totals(tokens, self.totals.seconds + now - self.clock)
        self.clock = now
        line = {f"train/{name}": value for name, value in values.items()}
        line["train/tokens"] = tokens
        rate = (tokens - self.seen.tokens) / max(self.totals.seconds - self.seen.seconds, 1e-9)
        line |= {
            "time/seconds": self.totals.seconds,
            "perf/tokens_per_second": rate,
            "perf/mfu": rate * self.flops_per_token / self.peak_flops,
            "perf/flops": float(tokens * self.flops_per_token),
            "perf/peak_memory_bytes": peak_memory_bytes(),
        }
        if not math.isfinite(values["loss"]):
            self.writer.write(step, line)
            raise Diverged(f"the loss of step {step} is {values['loss']}")
        return line

    def log(self, step: int, line: dict[str, float]) -> None:
        """Writes a step's line if it is time."""
        if self.settings.is_due(step, self.settings.log_every_steps):
            self.writer.write(step, line)
            self.seen = self.totals

    def save(self, step: int, state: TrainState, loss: float, line: dict[str, float]) -> None:
        """Saves, unless the loss with the new parameters is not finite."""
        if not math.isfinite(loss):
            self.writer.write(step, line | {"train/loss_after": loss})
            raise Diverged(f"the loss after step {step} is {loss}")
        self.checkpoints.save(step, state, {"totals": self.totals._asdict(), "line": line})

    def finish(self, step: int, line: dict[str, float], evaluate: Callable[[], dict[str, float]]) -> None:
        """Evaluates if it is time, after the save of this step and before its line; a resume may come here again."""
        if self.settings.is_due(step, self.settings.eval_every_steps):
            results = evaluate()
            self.checkpoints.wait()
            if math.isfinite(results["eval/loss"]):
                self.checkpoints.record_best(step, results["eval/loss"])
            self.writer.write(step, line | results)
            self.seen = self.totals
        else:
            self.log(step, line)


def train(
    logbooks: Sequence[Logbook],
    functions: Functions,
    state: TrainState,
    batches: Iterator[Batch],
    trace_dir: str,
) -> tuple[TrainState, int]:
    """Trains until the last step, a signal, or the time limit; whatever it ends with is saved.

    Args:
      logbooks: of each run, with the same settings; all runs are at one step.
      functions: what to call.
      state: donated; of N runs in lockstep [N, ...].
      batches: global batches on the devices, the first being number `state.step`; of N runs [N, ...].
      trace_dir: where a profile goes.

    Returns:
      (the last state, 0 or the number of the signal that stopped it; SIGTERM's for the time limit).
    """
    s = logbooks[0].settings
    going = dict(enumerate(logbooks))
    deadline = time.monotonic() + s.max_minutes * 60 if s.max_minutes else math.inf
    step = int(np.ravel(state.step)[0])
    pending: tuple[int, Metrics] | None = None
    stop = tracing = False

    @contextlib.contextmanager
    def alone(run: int) -> Iterator[None]:
        """What goes wrong within it is this run's, and the end of it."""
        try:
            yield
        except Exception as error:
            functions.give_up(run, error)
            del going[run]

    def restart_clocks() -> None:
        for logbook in going.values():
            logbook.clock = time.perf_counter()  # evaluation is not training time

    def profile(step: int) -> None:
        """Starts or ends the trace before `step`, when the step before has ended."""
        nonlocal tracing
        first, last = s.profile_steps or (0, 0)
        wanted = first <= step <= last
        if wanted != tracing:
            jax.block_until_ready(pending)
            start_trace(trace_dir) if wanted else jax.profiler.stop_trace()
            tracing = wanted

    def settle(step: int, metrics: Metrics) -> dict[int, dict[str, float]]:
        """Waits for a step's metrics: the line of each run."""
        values = {name: np.ravel(value).tolist() for name, value in jax.device_get(metrics).items()}
        lines = {}
        for run, logbook in list(going.items()):
            with alone(run):
                lines[run] = logbook.settle(step, {name: of_runs[run] for name, of_runs in values.items()})
        functions.progress(step, list(lines.values()))
        return lines

    def save(step: int, batch: Batch, lines: dict[int, dict[str, float]]) -> None:
        losses = functions.probe(state, batch)
        for run, logbook in list(going.items()):
            with alone(run):
                logbook.checkpoints.wait()  # for all, before any saves: none is ever two saves ahead of another
        states = functions.split(state)
        for run, logbook in list(going.items()):
            with alone(run):
                logbook.save(step, states[run], float(losses[run]), lines[run])

    def begin() -> None:
        for run, results in enumerate(functions.evaluate(state)):
            with alone(run):
                going[run].begin(results)
        restart_clocks()

    def finish(step: int, lines: dict[int, dict[str, float]]) -> None:
        results = functools.cache(lambda: functions.evaluate(state))
        for run, line in lines.items():
            if run in going:
                with alone(run):
                    going[run].finish(step, line, lambda run=run: results()[run])  # type: ignore[misc]
        restart_clocks()

    with StopSignals() as signals:
        try:
            # Killed between the save of this step and its line.
            unwritten = {run: logbook.record.get("line") for run, logbook in going.items()}
            if lines := {run: line for run, line in unwritten.items() if line and step not in going[run].writer.steps}:
                finish(step, lines)
            if step == 0 and s.eval_at_start:
                begin()
            # Asked once a step, below: a signal after the question must not end the loop before a save.
            while step < s.num_train_steps and not stop and going:
                batch = next(batches)
                profile(step + 1)
                state, metrics = functions.train_step(state, batch)
                step += 1
                # The step before is looked at while this one runs, so that the device never waits for the log.
                if pending is not None:
                    for run, line in settle(*pending).items():
                        with alone(run):
                            going[run].log(step - 1, line)
                pending = step, metrics
                wish = bool(signals.received) or time.monotonic() > deadline
                stop = functions.vote(wish, metrics["loss"])
                if stop or s.is_due(step, s.checkpoint_every_steps) or s.is_due(step, s.eval_every_steps):
                    lines = settle(*pending)
                    pending = None
                    save(step, batch, lines)
                    finish(step, lines)
        finally:
            profile(s.num_train_steps)
            for run, logbook in list(going.items()):
                with alone(run):
                    logbook.checkpoints.wait()
            if getattr(batches, "close", None):
                batches.close()  # type: ignore[attr-defined]
    return state, 0 if step == s.num_train_steps or not going else signals.received or signal.SIGTERM
