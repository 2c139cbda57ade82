"""Compare runs: python -m experiments.report RUN_OR_SWEEP... [--html out.html] [--baseline GROUP] [--watch]

A group is the runs that differ in nothing but their seed, and is named by the fields in which groups differ.
"""

import pathlib
import shlex
import sys
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
    command = train_command(pathlib.Path(summary.best)) if summary.best else None
    show(summary, command)
    if page is not None:
        write_page(page, runs, summary, command, [])
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
    from rich.console import Console

    # Without a terminal there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 240).print(make_table(title, frame))


def make_table(title: str, frame: Any) -> Any:
    """A data frame of texts as a table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(frame.columns):
        table.add_column(str(name), overflow="fold", justify="right" if i else "left")
    for row in frame.itertuples(index=False, name=None):
        table.add_row(*row)
    return table


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


if __name__ == "__main__":
    cli.run(main)
