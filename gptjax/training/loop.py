"""The training loop: steps, logged metrics, checkpoints and evaluations, and a clean stop at any moment."""

import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.array_types import Array, Batch, Metrics
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.metrics import MetricsWriter
from gptjax.training.profile import start_trace
from gptjax.training.state import TrainState
from gptjax.training.throughput import peak_memory_bytes


class LoopSettings(NamedTuple):
    """When things happen. A period of 0 is never, but the last step always logs, saves and evaluates.

    Attributes:
      num_train_steps, log_every_steps, eval_every_steps, checkpoint_every_steps: in steps.
      max_minutes: stop, with the state saved, after this long; 0 for no limit.
      profile_steps: (first, last) steps to trace, or None.
    """

    num_train_steps: int
    log_every_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
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
      train_step: (state, batch) -> (state, metrics), compiled, its state donated.
      probe: (state, batch) -> loss of a part of the batch; a state is saved only if it is finite.
      evaluate: state -> {"eval/...": number}.
      progress: called with (step, line) after each step.
      vote: (wish, a metric of the step) -> whether any process wished, see `processes.make_vote`; here, to stop.
    """

    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    probe: Callable[[TrainState, Batch], float]
    evaluate: Callable[[TrainState], dict[str, float]]
    progress: Callable[[int, dict[str, float]], None]
    vote: Callable[[bool, Array], bool]


class StopSignals:
    """Within it, SIGTERM and Ctrl-C set `received` instead of ending the process; a second one ends it at once.

    Signals are the main thread's; in another one this does nothing.
    """

    received: int = 0

    def __enter__(self) -> "StopSignals":
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        self._old = {int(number): signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._old[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Loop:
    """One run, from the state it is given to the last step or a reason to stop.

    Args:
      functions: what to call.
      settings: when.
      checkpoints, writer: where states and metrics go.
      flops_per_token, peak_flops: for `perf/flops` and `perf/mfu`.
      trace_dir: where a profile goes.
    """

    def __init__(
        self,
        functions: Functions,
        settings: LoopSettings,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        *,
        flops_per_token: int,
        peak_flops: float,
        trace_dir: str,
    ):
        self.functions, self.settings = functions, settings
        self.checkpoints, self.writer = checkpoints, writer
        self.flops_per_token, self.peak_flops, self.trace_dir = flops_per_token, peak_flops, trace_dir

    def run(self, state: TrainState, batches: Iterator[Batch], record: dict[str, Any]) -> tuple[TrainState, int]:
        """Trains until the last step, a signal, or the time limit; whatever it ends with is saved.

        Args:
          state: donated.
          batches: global batches on the devices, the first being number `state.step`.
          record: what `Checkpoints.restore` returned, or {} at the start.

        Returns:
          (the last state, 0 or the number of the signal that stopped it; SIGTERM's for the time limit).

        Raises:
          Diverged: the loss became NaN or infinite; says at which step and what the last good checkpoint is.
        """
        s = self.settings
        self.start(record)
        deadline = time.monotonic() + s.max_minutes * 60 if s.max_minutes else math.inf
        step = int(state.step)
        pending: tuple[int, Metrics] | None = None
        stop = self.tracing = False
        with StopSignals() as signals:
            try:
                if record and step not in self.writer.steps and record["line"]:
                    # Killed between the save of this step and its line.
                    self.finish(step, record["line"], functools.partial(self.functions.evaluate, state))
                # Asked once a step, below: a signal after the question must not end the loop before a save.
                while step < s.num_train_steps and not stop:
                    batch = next(batches)
                    self._profile(step + 1, pending)
                    state, metrics = self.functions.train_step(state, batch)
                    step += 1
                    # The step before is looked at while this one runs, so that the device never waits for the log.
                    if pending is not None:
                        self.log(*self.settle(*pending))
                    pending = step, metrics
                    wish = bool(signals.received) or time.monotonic() > deadline
                    stop = self.functions.vote(wish, metrics["loss"])
                    if stop or s.is_due(step, s.checkpoint_every_steps) or s.is_due(step, s.eval_every_steps):
                        _, line = self.settle(*pending)
                        pending = None
                        self.save(step, state, self.functions.probe(state, batch), line)
                        self.finish(step, line, functools.partial(self.functions.evaluate, state))
            finally:
                self._profile(s.num_train_steps, pending)
                self.checkpoints.wait()
                if getattr(batches, "close", None):
                    batches.close()  # type: ignore[attr-defined]
        if step == s.num_train_steps:
            return state, 0
        return state, signals.received or signal.SIGTERM

    def start(self, record: dict[str, Any]) -> None:
        """Takes up the totals of a checkpoint's record, and the clock."""
        self.totals = Totals(**record.get("totals", {}))
        self.seen = self.totals  # at the last logged line, for the throughput since
        self.clock = time.perf_counter()

    def settle(self, step: int, metrics: Metrics) -> tuple[int, dict[str, float]]:
        """Waits for a step's metrics, counts its tokens, and refuses a loss that is not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
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
        self.functions.progress(step, line)
        if not math.isfinite(values["loss"]):
            self.writer.write(step, line)
            raise Diverged(f"the loss of step {step} is {values['loss']}")
        return step, line

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
        self.clock = time.perf_counter()  # evaluation is not training time

    def _profile(self, step: int, pending: Any) -> None:
        """Starts or ends the trace before `step`, when the step before has ended."""
        first, last = self.settings.profile_steps or (0, 0)
        wanted = first <= step <= last
        if wanted != self.tracing:
            jax.block_until_ready(pending)
            start_trace(self.trace_dir) if wanted else jax.profiler.stop_trace()
            self.tracing = wanted


def device_batches(
    batches: Iterator[dict[str, np.ndarray]], put: Callable[[dict[str, np.ndarray]], Batch]
) -> Iterator[Batch]:
    """Puts batches on the devices, and ends their iterator with its own."""
    try:
        for batch in batches:
            yield put(batch)
    finally:
        if hasattr(batches, "close"):
            batches.close()
