"""What a set of runs says: groups of seeds side by side, the best run, and one HTML page of all of it."""

import difflib
import itertools
import json
import pathlib
import re
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from gptjax.analysis import plots
from gptjax.analysis.runs import Runs, read_config
from gptjax.analysis.statistics import compare, mean_interval

# Metrics whose names have this are better lower, all others higher.
LOWER_IS_BETTER = r"loss|perplexity|bits|norm|seconds|bytes|error"
MAX_MAPS = 10
AXES = {"step": "step", "train/tokens": "tokens", "time/seconds": "seconds", "perf/flops": "FLOPs"}


class Summary(NamedTuple):
    """Runs judged by one metric.

    Attributes:
      metric: its name.
      lower_is_better: whether it is like a loss.
      table: a row a run: that of `Runs`, and group, step, value (the last of the metric), counted.
      groups: a row a group of runs that differ in nothing but their seed, the best first: group, runs, mean, low, high,
        and with a baseline difference, p_value, verdict, seeds_needed.
      best: the folder of the best run that counts, None if there is none.
    """

    metric: str
    lower_is_better: bool
    table: pd.DataFrame
    groups: pd.DataFrame
    best: str | None


def group_labels(table: pd.DataFrame) -> pd.Series:
    """Of each run in `Runs.table`, what it is besides its seed: 'learning_rate=0.001, num_layers=4'."""
    fields = [name for name in table.columns[2:] if name != "seed"]
    last = [name.rpartition(".")[2] for name in fields]
    short = [name if last.count(leaf) > 1 else leaf for name, leaf in zip(fields, last, strict=True)]
    rows = table[fields].itertuples(index=False, name=None)
    labels = [", ".join(f"{n}={v}" for n, v in zip(short, row, strict=True)) or "all runs" for row in rows]
    return pd.Series(labels, table.index)


def summarize(runs: Runs, metric: str, baseline: str | None = None) -> Summary:
    """Judges runs by the last value of `metric`.

    Runs that are finished count, or while none is, those that have not diverged. Comparisons with the baseline pair runs by
    seed; over k groups each is held to 1 - 0.05 / k, so that all are right 95 % of the time.

    Args:
      runs: what `read_runs` returned.
      metric: one of its metrics.
      baseline: the group to compare with, None for none.

    Returns:
      The summary.

    Raises:
      ValueError: no run has the metric, or there is no such group.
    """
    names = list(runs.metrics.columns[2:])
    if metric not in names:
        raise ValueError(f"metric {metric!r} is in none of the runs{_near(metric, names)}")
    lower = bool(re.search(LOWER_IS_BETTER, metric))
    last = runs.metrics.dropna(subset=[metric]).groupby("run", observed=False).last()
    table = runs.table.assign(group=group_labels(runs.table))
    table["step"] = table["run"].map(runs.metrics.groupby("run", observed=False)["step"].last().astype(object))
    table["value"] = table["run"].map(last[metric].astype(float)).astype(float)
    finished = table["status"] == "finished"
    table["counted"] = (finished if finished.any() else table["status"] != "diverged") & table["value"].notna()
    if baseline is not None and baseline not in set(table["group"]):
        raise ValueError(
            f"baseline {baseline!r} is no group of these runs{_near(baseline, list(table['group'].unique()))}"
        )

    seeds = table["seed"] if "seed" in table else pd.Series(0, table.index)
    values = {
        group: dict(zip(seeds[rows.index], rows["value"], strict=True))
        for group, rows in table[table["counted"]].groupby("group", sort=False)
    }
    rows = []
    for group in table["group"].unique():
        found = table[(table["group"] == group) & table["counted"]]
        row = {"group": group, "runs": len(found)} | mean_interval(found["value"])._asdict()
        if baseline is not None and group != baseline:
            confidence = 1 - 0.05 / max(1, table["group"].nunique() - 1)
            told = compare(
                values.get(group, {}), values.get(baseline, {}), lower_is_better=lower, confidence=confidence
            )
            row |= told._asdict() | {"difference": told.difference.mean}
        rows.append(row)
    groups = pd.DataFrame(rows).sort_values("mean", ascending=lower, ignore_index=True)
    counted = table[table["counted"]].sort_values("value", ascending=lower)
    return Summary(metric, lower, table, groups, counted["run"].iloc[0] if len(counted) else None)


def write_page(
    path: pathlib.Path, runs: Runs, summary: Summary, command: str | None, extra: list[tuple[str, str]]
) -> None:
    """Writes one HTML file that needs no other and no network.

    Args:
      path: the file.
      runs, summary: what it shows.
      command: that trains the best run again.
      extra: (title, SVG) of further pictures.
    """
    pictures = [*_curves(runs, summary), *_maps(summary), *extra]
    best = pathlib.Path(summary.best) if summary.best else None
    environments: dict[str, list[str]] = {}
    for run in runs.table["run"]:
        file = pathlib.Path(run) / "environment.json"
        environments.setdefault(file.read_text() if file.exists() else "unknown", []).append(run)
    samples = best / "samples.txt" if best else None
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (pathlib.Path(__file__).parent / "report.html").read_text()
    )
    path.write_text(
        page.render(
            summary=summary,
            groups=summary.groups,
            table=summary.table[["run", "status", "step", "value", *runs.table.columns[2:]]].rename(
                columns={"value": summary.metric}
            ),
            counts=runs.table["status"].value_counts().to_dict(),
            pictures=pictures,
            command=command,
            config=json.dumps(read_config(best), indent=1) if best else "",
            environments=environments,
            samples=samples.read_text() if samples and samples.exists() else "",
            number=number,
        )
    )


def _curves(runs: Runs, summary: Summary) -> list[tuple[str, str]]:
    """(title, SVG) of the metric and of the smoothed training loss against steps, tokens, seconds and FLOPs."""
    group_of = dict(zip(summary.table["run"], summary.table["group"], strict=True))
    pictures = []
    for name in dict.fromkeys([summary.metric, "train/loss"]):
        panels = {}
        for axis, label in AXES.items():
            if name not in runs.metrics or axis not in runs.metrics:
                continue
            lines: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {group: [] for group in summary.groups["group"]}
            for run, rows in runs.metrics.dropna(subset=[name, axis]).groupby("run", observed=True):
                if len(rows) < 2:  # a point is no curve
                    continue
                y = rows[name].ewm(span=max(1, len(rows) / 25)).mean() if name == "train/loss" else rows[name]
                lines[group_of[str(run)]].append((rows[axis].to_numpy(), y.to_numpy()))
            if any(lines.values()):
                panels[label] = {group: _band(curves) for group, curves in lines.items() if curves}
        title = (
            f"{name}{', smoothed' if name == 'train/loss' else ''}: mean over seeds, and from the lowest to the highest"
        )
        if panels:
            pictures.append((title, plots.curves(panels, name)))
    return pictures


def _band(curves: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """x, mean, low, high [4, 200] of curves [N] over the x that all of them have."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    y = np.stack([np.interp(x, *curve) for curve in curves])
    return np.stack([x, y.mean(0), y.min(0), y.max(0)])


def _maps(summary: Summary) -> list[tuple[str, str]]:
    """(title, SVG) for each two fields, at most MAX_MAPS, the learning rate first; the best group over all others."""
    last = summary.table.columns.get_loc("group")
    fields = [name for name in summary.table.columns[2:last] if name != "seed"]
    fields.sort(key=lambda name: name != "optimizer.learning_rate")
    if len(fields) == 1 and "seed" in summary.table:
        fields.append("seed")
    counted = summary.table["value"].where(summary.table["counted"])
    means = counted.groupby([summary.table[name] for name in ["group", *fields]], dropna=False).mean().reset_index()
    pictures = []
    for down, across in itertools.islice(itertools.combinations(fields, 2), MAX_MAPS):
        best = means.pivot_table("value", down, across, "min" if summary.lower_is_better else "max", dropna=False)
        title = f"{summary.metric} by {down} and {across}: mean over seeds, the best over all other fields"
        pictures.append((title, plots.heat_map(best, summary.metric, lower_is_better=summary.lower_is_better)))
    return pictures


def number(value: Any) -> str:
    """A cell: four significant digits, nothing for what is not known."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "" if value is None or np.isnan(value) else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(repr, known))}"
