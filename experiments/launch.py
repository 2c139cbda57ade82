"""Runs of a sweep side by side, each in a process of this machine."""

import collections
import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ml_collections import ConfigDict

from experiments import cli
from gptjax.training.stop_signals import StopSignals

OUTCOMES = {0: "finished", cli.USER_ERROR: "refused", cli.DIVERGED: "diverged", 130: "stopped", 143: "stopped"}
_PR_SET_PDEATHSIG = 1


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder.
      config: with its fields.
      overrides: `--config.FIELD=VALUE`.
    """

    name: str
    config: ConfigDict
    overrides: list[str]


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""

    def terminate(self) -> None:
        """Tells it to save its state and stop."""


class Given:
    """The runs that a sweep lists, one after the other; `search.Search` is the other source of runs."""

    def __init__(self, runs: Sequence[Run]):
        self._waiting = list(runs)

    def take(self) -> Run | None:
        """The next run, None if there is none."""
        return self._waiting.pop(0) if self._waiting else None

    def is_hopeless(self, run: Run) -> bool:
        """Whether a run is to be given up."""
        return False

    def ended(self, run: Run, outcome: str) -> None:
        """Takes note of how a run ended."""


def run_all(
    source: Given, start: Callable[[Run, int], Job], parallel: int, retries: int, say: Callable[[Run, str], None]
) -> tuple[dict[str, str], int]:
    """Runs what `source` gives, `parallel` at a time: each run's outcome, and the signal that stopped them or 0.

    Args:
      start: starts a run at one of the places 0 to `parallel` - 1.
      retries: how often a run that crashes is started again.
      say: called with what became of a run.
    """
    outcomes: dict[str, str] = {}
    running: dict[int, tuple[Run, Job, float]] = {}
    crashed: list[Run] = []
    tries = collections.Counter[str]()
    hopeless: set[str] = set()
    told = False
    with StopSignals() as signals:
        while True:
            while len(running) < parallel and not signals.received:
                run = crashed.pop() if crashed else source.take()
                if run is None:
                    break
                place = min(set(range(len(running) + 1)) - running.keys())
                running[place] = run, start(run, place), time.monotonic()
                tries[run.name] += 1
            if not running:
                return outcomes, signals.received
            if signals.received and not told:
                told = True
                for _, job, _ in running.values():
                    job.terminate()
            time.sleep(0.05)
            for place, (run, job, started) in list(running.items()):
                code = job.poll()
                if code is None:
                    if run.name not in hopeless and source.is_hopeless(run):
                        hopeless.add(run.name)
                        job.terminate()
                    continue
                del running[place]
                outcome = OUTCOMES.get(code, "crashed")
                if outcome == "stopped" and run.name in hopeless:
                    outcome = "pruned"
                outcomes[run.name] = outcome
                say(run, f"{outcome}, {time.monotonic() - started:.0f} s")
                if outcome == "crashed" and tries[run.name] <= retries and not signals.received:
                    crashed.append(run)
                else:
                    source.ended(run, outcome)


def start_process(command: Sequence[str], workdir: pathlib.Path, place: int, parallel: int) -> subprocess.Popen:
    """Starts a run here, its output in its folder's log.txt; on CPU it gets the share of the cores that is its place's."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    own = cores[place::parallel] if 1 < parallel <= len(cores) else []
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:  # a run must not go on when the sweep was killed, beside its own resumption
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if own:
            os.sched_setaffinity(0, own)

    workdir.mkdir(exist_ok=True)
    with open(workdir / "log.txt", "a") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to the sweep, which tells its runs once
            preexec_fn=prepare,
        )
