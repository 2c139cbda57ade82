"""Logged runs as data frames: what they measured, and what they were."""

import glob
import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gptjax.training.metrics import read_metrics

# A run that has written nothing for this long, or for five times what lay between its last lines, is not running.
QUIET_SECONDS = 120


class Runs(NamedTuple):
    """Runs side by side.

    Attributes:
      metrics: a row a logged line: run, step, and every metric of any run, NaN where a line has none.
      table: a row a run: run (its folder), status, and the config fields in which runs differ, dotted,
        None where a run has none.
    """

    metrics: pd.DataFrame
    table: pd.DataFrame


def read_runs(*paths: str | os.PathLike[str]) -> Runs:
    """Reads runs, also while they are written.

    A status is decided from files: 'finished'; 'diverged', its last loss is not finite; 'running', written to within the
    last two minutes or five of its logging intervals; else 'stopped'. A corrupt line is named on stderr and left out.

    Args:
      paths: folders of runs, folders with such folders at any depth, or globs of them.

    Returns:
      The runs, ordered by folder.

    Raises:
      ValueError: a path that holds no run.
    """
    folders = sorted({folder for path in paths for folder in find_runs(path)})
    configs = [read_config(folder) for folder in folders]
    fields = dict.fromkeys(name for config in configs for name in config)
    # A field that a run does not have is of another version, and no difference.
    differing = [name for name in fields if len({repr(config[name]) for config in configs if name in config}) > 1]
    frames, rows = [], []
    for folder, config in zip(folders, configs, strict=True):
        lines = read_metrics(folder / "metrics.jsonl")
        names = dict.fromkeys(name for keys in dict.fromkeys(map(tuple, lines)) for name in keys)
        frames.append(pd.DataFrame({name: _column(lines, name) for name in names}))
        row = {"run": str(folder), "status": status(folder, config, lines)}
        rows.append(row | {name: config.get(name) for name in differing})
    table = pd.DataFrame(rows, dtype=object)  # in which integers stay so beside what is missing
    whole = table.columns[table.notna().all()]
    table[whole] = table[whole].infer_objects()
    metrics = pd.concat([pd.DataFrame(columns=["step"]), *frames], ignore_index=True)
    metrics["step"] = metrics["step"].astype(np.int64)
    codes = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
    metrics.insert(0, "run", pd.Categorical.from_codes(codes, table["run"]))
    return Runs(metrics, table)


def find_runs(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The folders of runs that `path`, a folder or a glob, names or holds."""
    found = []
    for top in [os.fspath(path)] if os.path.isdir(path) else glob.glob(os.fspath(path), recursive=True):
        for folder, below, files in os.walk(top):
            if "metrics.jsonl" in files or "environment.json" in files:
                found.append(pathlib.Path(folder))
                below.clear()
    if not found:
        raise ValueError(f"{os.fspath(path)}: no runs found, which are folders with a metrics.jsonl")
    return found


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config of a run by dotted field, lists as tuples; {} without one."""
    path = folder / "config.json"
    if not path.exists():
        return {}
    nested = json.loads(path.read_text())
    fields = {name: value for name, value in nested.items() if not isinstance(value, dict)}
    for section, values in nested.items():
        if isinstance(values, dict):
            fields |= {f"{section}.{name}": value for name, value in values.items()}
    return {name: _frozen(value) for name, value in fields.items()}


def status(folder: pathlib.Path, config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """'finished', 'diverged', 'running' or 'stopped'."""
    last = lines[-1] if lines else {"step": 0}
    if last["step"] >= config.get("train.num_train_steps", np.inf) and (folder / "loss.png").exists():
        return "finished"
    # As the loop writes it, before or after the update.
    if any(name in last and last[name] is None for name in ("train/loss", "train/loss_after")):
        return "diverged"
    written = max((folder / name).stat().st_mtime for name in os.listdir(folder))
    seconds = [line["time/seconds"] for line in lines[-5:] if line.get("time/seconds") is not None]
    interval = max(np.diff(seconds), default=0)
    return "running" if time.time() - written < max(QUIET_SECONDS, 5 * interval) else "stopped"


def _column(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([line.get(name) for line in lines], float)  # None becomes NaN


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
