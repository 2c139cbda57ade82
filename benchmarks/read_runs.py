"""Seconds that `gptjax.read_runs` takes for many long runs: python -m benchmarks.read_runs [--runs 100] [--steps 10000]

Beside it the plain way, `pandas.read_json(lines=True)` over the same files. The files have the metrics that training logs,
with an evaluation every 250 steps.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import pandas as pd

import gptjax

NAMES = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "time/seconds")
PERF = ("perf/tokens_per_second", "perf/mfu", "perf/flops", "perf/peak_memory_bytes")


def main() -> int:
    """Writes the runs, reads them, prints both times; 1 if ours takes 5 s or more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        rng = np.random.default_rng(0)
        for run in range(arguments.runs):
            workdir = folder / f"run-{run}"
            workdir.mkdir()
            (workdir / "config.json").write_text(json.dumps({"seed": run}))
            with (workdir / "metrics.jsonl").open("w") as file:
                for step, values in enumerate(rng.lognormal(size=(arguments.steps, len(NAMES + PERF))).tolist(), 1):
                    line = {"step": step} | dict(zip(NAMES + PERF, values, strict=True))
                    file.write(json.dumps(line | ({"eval/loss": 1.0} if step % 250 == 0 else {})) + "\n")
        started = time.perf_counter()
        metrics = gptjax.read_runs(folder).metrics
        seconds = time.perf_counter() - started
        assert metrics.shape == (arguments.runs * arguments.steps, 3 + len(NAMES + PERF))
        print(
            f"gptjax.read_runs: {seconds:.2f} s, {len(metrics):,} lines of {metrics.shape[1] - 2} metrics", flush=True
        )
        started = time.perf_counter()
        pd.concat([pd.read_json(path, lines=True) for path in folder.glob("*/metrics.jsonl")])
        print(f"pandas.read_json: {time.perf_counter() - started:.2f} s")
    return int(seconds >= 5)


if __name__ == "__main__":
    sys.exit(main())
