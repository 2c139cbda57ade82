"""Run a sweep: python -m experiments.sweep --config C --sweep configs/sweeps/S.py --sweepdir D [--parallel N]

S.py has get_hyper(h), which returns a list of runs, made by h.sweep, h.product, h.zipit, h.chainit and h.sample
(experiments/hyper.py). Each run is `experiments.train` in a folder of its own, named by what differs; with --launcher vmap,
runs that differ only in numbers (learning rate, seed, dropout, ...) train together, as one program. Typed again, it skips
what is finished, resumes what is not, and tries what crashed again; a run that fails takes no other with it. Where S.py
holds ranges, as in h.sweep(FIELD, h.Range(1e-4, 1e-2, log=True)), Optuna searches them: --num_trials N.
"""

import contextlib
import fcntl
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import build, cli, hyper, launch, together
from experiments.launch import Given, Job, Run
from gptjax.training.metrics import read_metrics


def main(argv: Sequence[str]) -> int:
    """Sweeps; returns 0, 1 if a run failed for good, or 128 + the number of the signal that stopped it."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--sweep", metavar="FILE", help="a file with get_hyper(h) (required)")
    parser.add_argument("--sweepdir", metavar="D", help="the folder of the runs' folders (required)")
    parser.add_argument(
        "--launcher",
        choices=("local", "vmap", "ray"),
        default="local",
        help="processes here, one program for all runs, or jobs on the cluster of RAY_ADDRESS or a head started here",
    )
    parser.add_argument(
        "--parallel", type=int, help="runs at once: here 1 if not given, and on CPU each gets its share of the cores"
    )
    parser.add_argument("--retries", type=int, default=2, help="how often a run that crashes is started again")
    parser.add_argument("--num_trials", type=int, metavar="N", help="of a search: runs in all, on all its machines")
    parser.add_argument("--ray_resources", metavar="R", help="of each job, as in CPU=8,TPU=4; CPU=1, if not given")
    parser.add_argument("--ray_labels", metavar="L", help="of its node, as in ray.io/tpu-topology=2x2")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and start nothing")
    arguments = parser.parse(argv)
    for flag in ("sweep", "sweepdir"):
        if getattr(arguments, flag) is None:
            parser.error(f"--{flag} is required")
    for flag, least in (("parallel", 1), ("retries", 0), ("num_trials", 1)):
        if (value := getattr(arguments, flag)) is not None and value < least:
            parser.error(f"--{flag} {value} must be at least {least}")
    folder = pathlib.Path(arguments.sweepdir).absolute()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--sweepdir {folder} is not a folder")
    sweep = SweepFile(arguments.config, arguments.sweep)
    if bool(sweep.ranges) != (arguments.num_trials is not None):
        parser.error(f"--num_trials N is for ranges, and --sweep {arguments.sweep} holds {sweep.ranges or 'none'}")
    if arguments.launcher != "ray" and (arguments.ray_resources or arguments.ray_labels):
        parser.error("--ray_resources and --ray_labels go with --launcher ray")
    if sweep.ranges and arguments.launcher == "vmap":
        parser.error("--launcher vmap takes no ranges; use --launcher local")
    runs = sweep.runs()
    if arguments.launcher == "vmap":
        together.check(runs, folder)

    def command(run: Run) -> list[str]:
        train = [sys.executable, "-m", "experiments.train", *arguments.config_flags]
        return [*train, *run.overrides, "--workdir", str(folder / run.name)]

    parallel = arguments.parallel or (max(len(runs), arguments.num_trials or 1) if arguments.launcher == "ray" else 1)

    def start(run: Run, place: int) -> Job:
        if jobs is not None:
            return jobs.start(command(run), folder / run.name)
        return launch.start_process(command(run), folder / run.name, place, parallel)

    resources = pairs("--ray_resources", arguments.ray_resources or "CPU=1", float)
    labels = pairs("--ray_labels", arguments.ray_labels or "", str)
    if arguments.launcher == "ray":
        from experiments.ray_jobs import Jobs
    if sweep.ranges:
        from experiments.search import Search
    if arguments.dry_run:
        for run in runs:
            print(shlex.join(command(run)))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    jobs = Jobs(resources, labels) if arguments.launcher == "ray" else None
    with lock(folder, fcntl.LOCK_SH if sweep.ranges else fcntl.LOCK_EX):
        if sweep.ranges:
            search = Search(folder, sweep, arguments.num_trials)
            _, stopped = launch.run_all(search, start, parallel, arguments.retries, _say)
            outcomes = search.outcomes()
        else:
            (folder / "sweep.json").write_text(json.dumps({run.name: command(run) for run in runs}, indent=2) + "\n")
            outcomes = {run.name: outcome_so_far(run, folder / run.name) for run in runs}
            waiting = [run for run in runs if outcomes[run.name] == "waiting"]
            for run in runs:
                if run not in waiting:
                    _say(run, f"{outcomes[run.name]} before")
            if not waiting:
                stopped = 0
            elif arguments.launcher == "vmap":
                found, stopped = together.train_together(waiting, folder)
                outcomes |= found
            else:
                found, stopped = launch.run_all(Given(waiting), start, parallel, arguments.retries, _say)
                outcomes |= found
    print_results(outcomes, folder)
    if stopped:
        print(f"stopped; to go on, type the same command again: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        return 128 + stopped
    return int(any(outcome not in ("finished", "diverged", "pruned") for outcome in outcomes.values()))


def pairs(flag: str, text: str, kind: type) -> dict[str, Any]:
    """'A=1,B=2' as a dict.

    Raises:
      UserError: another form, or a value that is not of its kind.
    """
    try:
        return {name: kind(value) for name, value in (pair.split("=") for pair in text.split(",") if pair)}
    except ValueError as error:
        raise cli.UserError(f"{flag} {text!r} is not NAME={'NUMBER' if kind is float else 'TEXT'},...") from error


class SweepFile:
    """What a sweep file lists, every field known and of its type.

    Args:
      config: that the runs change.
      path: of the file.

    Raises:
      UserError: names the file and the field.
    """

    def __init__(self, config: ConfigDict, path: str):
        self.config, self.path, self.known = config, path, cli.flatten(config)
        get_hyper = cli.function_of("--sweep", path, "get_hyper")
        with cli.user_errors():
            found = get_hyper(hyper)
        if not found:
            raise cli.UserError(f"--sweep {path}: it holds no runs")
        self.points = [{n.removeprefix("config."): self._typed(n, v) for n, v in run.items()} for run in found]
        names = dict.fromkeys(name for values in self.points for name in values)
        ranges = {name for values in self.points for name in values if isinstance(values[name], hyper.Range)}
        self.ranges = ", ".join(sorted(ranges))
        several = [
            n for n in names if len({repr(values.get(n, self.known[n])) for values in self.points}) > 1 or n in ranges
        ]
        leaves = [name.rpartition(".")[2] for name in several]
        self._short = {n: leaf if leaves.count(leaf) == 1 else n for n, leaf in zip(several, leaves, strict=True)}

    def _typed(self, name: str, value: Any) -> Any:
        name = name.removeprefix("config.")
        if name not in self.known:
            raise cli.UserError(f"--sweep {self.path}: {cli.unknown_field(name, self.known)}")
        default = self.known[name]
        for one in (value.low, value.high) if isinstance(value, hyper.Range) else (value,):
            cli.check_type(name, one, default)
        if isinstance(value, hyper.Range):
            if not value.low < value.high or (value.log and value.low <= 0):
                raise cli.UserError(f"--sweep {self.path}: config.{name}={value} must go up, and from above 0 if log")
            return hyper.Range(type(default)(value.low), type(default)(value.high), value.log)
        return type(default)(value)

    def runs(self) -> list[Run]:
        """All runs; where the file holds ranges, those at their lower and upper ends.

        Raises:
          UserError: names the run and the field that is out of range, or two runs that are one.
        """
        ends = [{name: value[end] if isinstance(value, hyper.Range) else value for name, value in values.items()}
                for values in self.points for end in ((0, 1) if self.ranges else (0,))]  # fmt: skip
        runs = []
        for number, values in enumerate(ends, 1):
            try:
                runs.append(self.run(values, self.label(values)))
            except cli.UserError as error:
                raise cli.UserError(f"--sweep {self.path}, run {number}: {error}") from error
        names = [run.name for run in runs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise cli.UserError(f"--sweep {self.path}: two runs are {twice}")
        return runs

    def label(self, values: hyper.Run) -> str:
        """What of a run differs from others, as the name of a folder."""
        label = ",".join(f"{self._short[n]}={_text(values.get(n, self.known[n]))}" for n in self._short) or "run"
        return re.sub(r"[^\w.,=+-]", "_", label)

    def run(self, values: hyper.Run, name: str) -> Run:
        """One run of given values.

        Raises:
          UserError: names the field that is out of range.
        """
        config = ConfigDict(self.config.to_dict())
        for field, value in values.items():
            section, _, leaf = field.rpartition(".")
            (config[section] if section else config)[leaf] = value
        build.check(config.lock())
        return Run(name, config, [f"--config.{field}={_text(value)}" for field, value in values.items()])


def _text(value: Any) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def lock(folder: pathlib.Path, kind: int) -> Iterator[None]:
    """Holds a folder for this sweep alone, or for all searches; the lock ends with the process, however it ends.

    Raises:
      UserError: another sweep holds it.
    """
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise cli.UserError(f"--sweepdir {folder}: another sweep is running in it") from error
        yield


def outcome_so_far(run: Run, workdir: pathlib.Path) -> str:
    """'finished' or 'diverged', which are not run again, or 'waiting'."""
    lines = read_metrics(workdir / "metrics.jsonl")
    if not lines:
        return "waiting"
    from gptjax.analysis.runs import status  # which is slow to import

    found = status(workdir, cli.flatten(run.config), lines)
    return found if found in ("finished", "diverged") else "waiting"


def _say(run: Run, what: str) -> None:
    print(f"{run.name}: {what}", file=sys.stderr, flush=True)


def print_results(outcomes: dict[str, str], folder: pathlib.Path) -> None:
    """A line for each run, best first, and what to type next."""
    rows = []
    for name in outcomes:
        lines = read_metrics(folder / name / "metrics.jsonl")
        loss = next((line["eval/loss"] for line in reversed(lines) if line.get("eval/loss") is not None), math.inf)
        rows.append((loss, name, lines[-1]["step"] if lines else 0))
    width = max(map(len, outcomes))
    print(f"{'run':<{width}}  status    step    eval/loss")
    for loss, name, step in sorted(rows):
        print(f"{name:<{width}}  {outcomes[name]:<8}  {step:<6}  {'' if loss == math.inf else f'{loss:.4f}'}")
    print(f"next:  python -m experiments.report {folder}")


if __name__ == "__main__":
    cli.run(main)
