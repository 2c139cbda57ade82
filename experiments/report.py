"""Compare runs: python -m experiments.report RUN_OR_SWEEP... [--html out.html] [--baseline GROUP] [--watch]

A group is the runs that differ in nothing but their seed, and is named by the fields in which groups differ.
"""

import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import cli


def main(argv: Sequence[str]) -> int:
    """Prints tables, and writes the page; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_OR_SWEEP", help="a run's folder, a folder of runs, or a glob")
    parser.add_argument("--metric", default="eval/loss", help="what to judge by (default: %(default)s), its last value")
    parser.add_argument("--baseline", metavar="GROUP", help="compare every group with this one, seed by seed")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures, which needs no other file")
    parser.add_argument("--scaling", action="store_true", help="fit a scaling law to runs of several sizes and lengths")
    parser.add_argument(
        "--budget", type=float, help="--scaling: FLOPs to find the best size for; 10 times the largest run"
    )
    parser.add_argument("--watch", action="store_true", help="show the runs as they go on, until none is running")
    arguments = parser.parse(argv)
    page = pathlib.Path(arguments.html) if arguments.html else None
    if page is not None and not page.absolute().parent.is_dir():
        raise cli.UserError(f"--html {page}: there is no folder {page.absolute().parent}")
    if arguments.watch:
        watch(arguments.runs)

    from gptjax.analysis.report import summarize, write_page
    from gptjax.analysis.runs import read_runs

    with cli.user_errors():
        runs = read_runs(*arguments.runs)
        summary = summarize(runs, arguments.metric, arguments.baseline)
        law = scaling(runs, summary, arguments.budget) if arguments.scaling else None
    command = train_command(pathlib.Path(summary.best)) if summary.best else None
    show(summary, command)
    if law is not None:
        print_table(law[0], law[1])
    if page is not None:
        write_page(page, runs, summary, command, [] if law is None else [(law[0], law[2])])
        print(f"page: {page}")
    return 0


def show(summary: Any, command: str | None) -> None:
    """Prints the groups and the best run."""
    from gptjax.analysis.report import number

    counts = ", ".join(f"{count} {name}" for name, count in summary.table["status"].value_counts().items())
    print_table(f"{len(summary.table)} runs ({counts}) by {summary.metric}", summary.groups.map(number))
    if summary.best:
        print(f"best: {summary.best}\n      {command}")


def print_table(title: str, frame: Any) -> None:
    """Prints a data frame of texts."""
    console = terminal()
    console.print(title, style="bold")
    console.print(make_table(frame))


def terminal() -> Any:
    """Where tables go; without a terminal there is no width to keep to."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 240, markup=False, highlight=False)


def make_table(frame: Any) -> Any:
    """A data frame of texts as a table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(frame.columns):
        table.add_column(str(name), overflow="fold", justify="right" if i else "left")
    for row in frame.itertuples(index=False, name=None):
        table.add_row(*row)
    return table


def scaling(runs: Any, summary: Any, budget: float | None) -> tuple[str, Any, str]:
    """Fits a scaling law: (what it says in a line, its constants with intervals, an SVG)."""
    import numpy as np
    import pandas as pd

    from gptjax.analysis.plots import iso_flops
    from gptjax.analysis.scaling import bootstrap, fit, sizes

    points = sizes(runs, summary.table[summary.table["counted"]].set_index("run")["value"])
    columns = [points[name].to_numpy() for name in ("N", "D", "loss")]
    law = fit(*columns)
    flops = budget or 10 * points["flops"].max()
    drawn = np.array([(*other, *other.optimal(flops)) for other in bootstrap(law, *columns)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    N, D = law.optimal(flops)
    names = [*law._fields, "best N", "best D"]
    table = pd.DataFrame({"constant": names, "value": [*law, N, D], "95 % from": low, "to": high})
    title = f"L = E + A / N^alpha + B / D^beta: {flops:.3g} FLOPs are best spent on {N:.3g} parameters, {D:.3g} tokens"
    return title, table.map(lambda x: x if isinstance(x, str) else f"{x:.4g}"), iso_flops(law, points, summary.metric)


def train_command(folder: pathlib.Path) -> str:
    """What trains the run in `folder` again, in a folder of its own: every field that is not at its default."""
    from gptjax.analysis.runs import read_config

    default = cli.flatten(cli.load_config("configs/default.py"))
    overrides = [
        f"--config.{name}={value}" for name, value in read_config(folder).items() if default.get(name, ...) != value
    ]
    workdir = f"{folder}-again"
    words = ["python", "-m", "experiments.train", "--config", "configs/default.py", "--workdir", workdir, *overrides]
    return shlex.join(words)


def watch(paths: Sequence[str]) -> None:
    """Shows a row a run until none is running."""
    from rich.live import Live

    from gptjax.analysis.runs import read_runs

    with Live(console=terminal(), auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            with cli.user_errors():
                runs = read_runs(*paths)
            live.update(make_table(progress(runs)), refresh=True)
            if not (runs.table["status"] == "running").any():
                return
            time.sleep(max(2, 2 * (time.monotonic() - started)))


def progress(runs: Any) -> Any:
    """How far each run is, as a data frame of texts."""
    import pandas as pd

    from gptjax.analysis.report import number
    from gptjax.analysis.runs import read_config

    lines = dict(tuple(runs.metrics.groupby("run", observed=True)))
    rows = []
    for run, status in zip(runs.table["run"], runs.table["status"], strict=True):
        row = {"run": run, "status": status, "step": "", "left": "", "tokens/s": ""}
        row |= {"train/loss": "", "": "", "eval/loss": ""}
        total = read_config(pathlib.Path(run)).get("train.num_train_steps")
        if run in lines:
            last = lines[run].ffill().iloc[-1]  # of each metric its last value
            row["step"] = f"{last['step']} of {total}"
            if total and "time/seconds" in last:
                row["left"] = (
                    f"{last['time/seconds'] / max(1, last['step']) * max(0, total - last['step']) / 60:.1f} min"
                )
            row["tokens/s"] = number(last.get("perf/tokens_per_second"))
            row |= {name: number(last.get(name)) for name in ("train/loss", "eval/loss")}
            row[""] = sparkline(lines[run].get("train/loss", pd.Series()).dropna().to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def sparkline(values: Any, width: int = 24) -> str:
    """A curve in one line of text."""
    import numpy as np

    parts = np.array([part.mean() for part in np.array_split(values, min(width, len(values)) or 1) if len(part)])
    height = (parts - parts.min()) / (np.ptp(parts) or 1) if len(parts) else parts
    return "".join("▁▂▃▄▅▆▇█"[int(7 * h)] for h in height)


if __name__ == "__main__":
    cli.run(main)
