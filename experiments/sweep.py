"""Run a sweep: python -m experiments.sweep --config C --sweep configs/sweeps/S.py --sweepdir D [--parallel N]

S.py has get_hyper(h), which returns a list of runs, made by h.sweep, h.product, h.zipit, h.chainit and h.sample
(experiments/hyper.py). Each run is `experiments.train` in a folder of its own, named by what differs; with --launcher vmap,
runs that differ only in numbers (learning rate, seed, dropout, ...) train together, as one program. Typed again, it skips
what is finished, resumes what is not, and tries what crashed again; a run that fails takes no other with it.
"""

import ctypes
import fcntl
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import build, cli, hyper, together
from experiments.train import is_finished
from gptjax.training.loop import StopSignals
from gptjax.training.metrics import read_metrics

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


def main(argv: Sequence[str]) -> int:
    """Sweeps; returns 0, 1 if a run failed for good, or 128 + the number of the signal that stopped it."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--sweep", metavar="FILE", help="a file with get_hyper(h) (required)")
    parser.add_argument("--sweepdir", metavar="D", help="the folder of the runs' folders (required)")
    parser.add_argument(
        "--launcher",
        choices=("local", "vmap"),
        default="local",
        help="processes, or one program for all runs",
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at once; on CPU each gets its share of the cores")
    parser.add_argument("--retries", type=int, default=2, help="how often a run that crashes is started again")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and start nothing")
    arguments = parser.parse(argv)
    for flag in ("sweep", "sweepdir"):
        if getattr(arguments, flag) is None:
            parser.error(f"--{flag} is required")
    if arguments.parallel < 1 or arguments.retries < 0:
        parser.error(
            f"--parallel {arguments.parallel} must be at least 1, and --retries {arguments.retries} at least 0"
        )
    folder = pathlib.Path(arguments.sweepdir).absolute()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--sweepdir {folder} is not a folder")
    file, given = _config_arguments(argv)
    runs = make_runs(arguments.config, arguments.sweep)
    train = [sys.executable, "-m", "experiments.train"]
    commands = {
        run.name: [*train, "--config", file, *given, *run.overrides, "--workdir", str(folder / run.name)]
        for run in runs
    }
    if arguments.launcher == "vmap":
        together.check([run.config for run in runs])
    if arguments.dry_run:
        for command in commands.values():
            print(shlex.join(command))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        (folder / "sweep.json").write_text(json.dumps(commands, indent=2) + "\n")
        if arguments.launcher == "vmap":
            outcomes, stopped = run_as_one(runs, folder)
        else:
            outcomes, stopped = run_all(runs, commands, folder, arguments.parallel, arguments.retries)
    print_results(runs, outcomes, folder)
    if stopped:
        print(f"stopped; to go on, type the same command again: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        return 128 + stopped
    return int(any(outcome not in ("finished", "diverged") for outcome in outcomes.values()))


def _config_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The config's file, and its overrides as they were given."""
    overrides, rest = cli.split_overrides(argv)
    file = next(b if a == "--config" else a.partition("=")[2] for a, b in zip(rest, [*rest[1:], ""], strict=True)
                if a == "--config" or a.startswith("--config="))  # fmt: skip
    return file, [f"--config.{name}={value}" for name, value in overrides]


def make_runs(config: ConfigDict, path: str) -> list[Run]:
    """The runs of a sweep file, every field known and of its type, every config one that can be trained.

    Raises:
      UserError: names the file, the run and the field.
    """
    file = next((p for p in (pathlib.Path(path), cli.CONFIGS.parent / path) if p.is_file()), None)
    if file is None:
        raise cli.UserError(f"--sweep {path}: no such file")
    functions = runpy.run_path(str(file))
    if "get_hyper" not in functions:
        raise cli.UserError(f"--sweep {path}: it has no function get_hyper(h)")
    with cli.user_errors():
        found = functions["get_hyper"](hyper)
    if not found:
        raise cli.UserError(f"--sweep {path}: it holds no runs")
    known = cli.flatten(config)
    fields = [{key.removeprefix("config."): value for key, value in run.items()} for run in found]
    for run in fields:
        for name, value in run.items():
            if name not in known:
                raise cli.UserError(f"--sweep {path}: {cli.unknown_field(name, known)}")
            cli.check_type(name, value, known[name])
    differing = [name for name in dict.fromkeys(name for run in fields for name in run)
                 if len({repr(run.get(name, known[name])) for run in fields}) > 1]  # fmt: skip
    leaves = [name.rpartition(".")[2] for name in differing]
    short = {n: leaf if leaves.count(leaf) == 1 else n for n, leaf in zip(differing, leaves, strict=True)}
    runs = []
    for number, values in enumerate(fields, 1):
        texts = {name: _text(value) for name, value in values.items()}
        own = ConfigDict(config.to_dict())
        for name, value in values.items():
            section, _, leaf = name.rpartition(".")
            target = own[section] if section else own
            target[leaf] = type(known[name])(value)
        own.lock()
        try:
            build.check(own)
        except cli.UserError as error:
            raise cli.UserError(f"--sweep {path}, run {number}: {error}") from error
        label = ",".join(f"{short[n]}={_text(values.get(n, known[n]))}" for n in differing) or "run"
        name = re.sub(r"[^\w.,=+-]", "_", label)
        runs.append(Run(name, own, [f"--config.{n}={text}" for n, text in texts.items()]))
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise cli.UserError(f"--sweep {path}: two runs are {twice}")
    return runs


def _text(value: Any) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, tuple) else str(value)


@contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
    """Holds a folder for this sweep alone; the lock ends with the process, however it ends.

    Raises:
      UserError: another sweep holds it.
    """
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise cli.UserError(f"--sweepdir {folder}: another sweep is running in it") from error
        yield


def outcome_so_far(run: Run, workdir: pathlib.Path) -> str | None:
    """'finished' or 'diverged', which are not run again, or None."""
    if is_finished(run.config, workdir):
        return "finished"
    lines = read_metrics(workdir / "metrics.jsonl")
    loss = lines[-1].get("train/loss", 0.0) if lines else 0.0
    return "diverged" if loss is None or not math.isfinite(loss) else None


def run_all(
    runs: Sequence[Run], commands: dict[str, list[str]], folder: pathlib.Path, parallel: int, retries: int
) -> tuple[dict[str, str], int]:
    """Runs what is not finished, `parallel` at a time: each run's outcome, and the signal that stopped the sweep or 0."""
    outcomes = {run.name: outcome_so_far(run, folder / run.name) or "waiting" for run in runs}
    waiting = [name for name, outcome in outcomes.items() if outcome == "waiting"]
    for name, outcome in outcomes.items():
        if outcome != "waiting":
            _say(runs, name, f"{outcome} before")
    tries = dict.fromkeys(waiting, 0)
    places = list(range(parallel))
    running: dict[str, tuple[subprocess.Popen, int, float]] = {}
    told = False
    with StopSignals() as signals:
        while running or (waiting and not signals.received):
            while waiting and places and not signals.received:
                name, place = waiting.pop(0), places.pop(0)
                tries[name] += 1
                running[name] = _start(commands[name], folder / name, place, parallel), place, time.monotonic()
            if signals.received and not told:
                told = True
                for process, _, _ in running.values():
                    process.terminate()  # each saves its state and stops
            time.sleep(0.05)
            for name, (process, place, started) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                places.append(place)
                outcomes[name] = _outcome(code)
                _say(runs, name, f"{outcomes[name]}, {time.monotonic() - started:.0f} s; {folder / name / 'log.txt'}")
                if outcomes[name] == "crashed" and tries[name] <= retries and not signals.received:
                    waiting.append(name)
    return outcomes, signals.received


def run_as_one(runs: Sequence[Run], folder: pathlib.Path) -> tuple[dict[str, str], int]:
    """The same in one program, all at once, and each tried once."""
    outcomes = {run.name: outcome_so_far(run, folder / run.name) or "waiting" for run in runs}
    for name, outcome in outcomes.items():
        if outcome != "waiting":
            _say(runs, name, f"{outcome} before")
    waiting = {run.name: run.config for run in runs if outcomes[run.name] == "waiting"}
    if not waiting:
        return outcomes, 0
    found, stopped = together.train_together(waiting, folder)
    return outcomes | found, stopped


def _outcome(code: int) -> str:
    return {0: "finished", cli.USER_ERROR: "refused", cli.DIVERGED: "diverged", 130: "stopped", 143: "stopped"}.get(
        code, "crashed"
    )


def _start(command: list[str], workdir: pathlib.Path, place: int, parallel: int) -> subprocess.Popen:
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


def _say(runs: Sequence[Run], name: str, what: str) -> None:
    number = [run.name for run in runs].index(name) + 1
    print(f"[{number}/{len(runs)}] {name}: {what}", file=sys.stderr, flush=True)


def print_results(runs: Sequence[Run], outcomes: dict[str, str], folder: pathlib.Path) -> None:
    """A line for each run, best first, and what to type next."""
    rows = []
    for run in runs:
        lines = read_metrics(folder / run.name / "metrics.jsonl")
        loss = next((line["eval/loss"] for line in reversed(lines) if line.get("eval/loss") is not None), math.inf)
        rows.append((loss, run.name, lines[-1]["step"] if lines else 0))
    width = max(len(run.name) for run in runs)
    print(f"{'run':<{width}}  status    step    eval/loss")
    for loss, name, step in sorted(rows):
        print(f"{name:<{width}}  {outcomes[name]:<8}  {step:<6}  {'' if loss == math.inf else f'{loss:.4f}'}")
    print(f"next:  python -m experiments.report {folder}")


if __name__ == "__main__":
    cli.run(main)
