"""Runs of several real processes on this machine, stopped, killed, and continued with other numbers of them."""

import contextlib
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from gptjax.distributed.processes import DEAD_AFTER_SECONDS
from tests import runs
from tests.invariance.checks import ADAMW
from tests.runs import finish, last_step, lines, wait_for_step

# Rows that eight devices can split, and a save every few steps.
CHANGES: dict[str, object] = {
    "model__num_layers": 1,
    "train__batch_size": 16,
    "train__num_train_steps": 48,
    "eval__every_steps": 24,
    "checkpoint__every_steps": 4,
}


@contextlib.contextmanager
def started(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    count: int,
    *,
    devices: int = 1,
    extra: Sequence[Sequence[str]] = (),
    **changes: object,
) -> Iterator[list[subprocess.Popen[str]]]:
    """`count` processes of one run, each with so many devices; `extra` flags of each. They are killed in the end."""
    arguments = runs.train_command(workdir, folder / "corpus.txt", **(CHANGES | changes))
    flags = f"--xla_force_host_platform_device_count={devices}"
    processes = runs.start(arguments, count, extra, XLA_FLAGS=flags)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def distance(one: pathlib.Path, two: pathlib.Path) -> float:
    """The greatest relative difference of two runs' losses; they must have logged the same steps and tokens, each once."""
    a, b = lines(one), lines(two)
    assert [(x["step"], x["train/tokens"]) for x in a] == [(x["step"], x["train/tokens"]) for x in b]
    names = ("train/loss", "eval/loss", "eval/bits_per_byte")
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in names if name in x]
    return max(abs(y / x - 1) for x, y in pairs)


def chain(folder: pathlib.Path) -> list[tuple[str, str, bool]]:
    """One run over 8, 4 and 1 devices and 4 and 2 processes, each part ended in another way, beside one left alone.

    Returns:
      (what, figure, met) of each part.
    """
    runs.write_corpus(folder)
    alone, workdir = folder / "alone", folder / "chain"
    length = {"train__num_train_steps": 400, "eval__every_steps": 100}
    rows: list[tuple[str, str, bool]] = []
    with started(folder, alone, 1, **length) as processes:
        assert finish(processes)[0][0] == 0

    def part(
        name: str, count: int, devices: int, number: signal.Signals, whom: int, wanted: set[int], **mesh: int
    ) -> None:
        before = last_step(workdir)
        with started(folder, workdir, count, devices=devices, **length, **mesh) as processes:
            wait_for_step(workdir, before + 6, processes)
            if number == signal.SIGSTOP:
                processes[whom].send_signal(signal.SIGSTOP)
                time.sleep(60)
                stood = last_step(workdir)
                processes[whom].send_signal(signal.SIGCONT)
                wait_for_step(workdir, stood + 2, processes)
                number = signal.SIGTERM
            sent = time.monotonic()
            processes[whom].send_signal(number)
            codes = [code for code, _ in finish(processes, DEAD_AFTER_SECONDS + 60)]
        left = {code for process, code in enumerate(codes) if number == signal.SIGTERM or process != whom}
        figure = f"step {lines(workdir)[-1]['step']}, codes {codes}, {time.monotonic() - sent:.0f} s to end"
        rows.append((name, figure, left <= wanted))

    stopped, lost = {128 + signal.SIGTERM}, {1, -signal.SIGABRT}
    part("8 devices, SIGTERM", 1, 8, signal.SIGTERM, 0, stopped)
    part("continued on 4 devices, SIGTERM", 1, 4, signal.SIGTERM, 0, stopped)
    part("on 4 processes, SIGTERM to the last", 4, 1, signal.SIGTERM, 3, stopped)
    part("on 2, one stopped for a minute, SIGTERM", 2, 1, signal.SIGSTOP, 1, stopped)
    split = {"mesh__data": 1, "mesh__context": 2}
    part("positions split between 2, SIGTERM", 2, 1, signal.SIGTERM, 0, stopped, **split)
    part("on 2 of 2 devices, SIGKILL of one", 2, 2, signal.SIGKILL, 1, lost)
    part("on 2, SIGKILL of the first", 2, 1, signal.SIGKILL, 0, lost)
    with started(folder, workdir, 1, **length) as processes:
        code = finish(processes)[0][0]
    worst = distance(alone, workdir)
    rows.append(("finished on one device: losses", f"code {code}, {worst:.0e} from the run left alone", worst < ADAMW))
    return rows
