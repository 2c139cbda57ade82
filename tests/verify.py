"""The long forms of the suites, by part: python -m tests.verify --part crash|start|quality|all

crash    20 SIGKILLs at random moments, half of them inside a save; every finished run equals the uninterrupted one
start    seconds from process start to the first step done, cold and with a warm compilation cache
quality  configs/shakespeare_char.py, 3 seeds, on the file named by $SHAKESPEARE
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from tests import runs

Rows = list[tuple[str, str, bool]]  # what, figure, met


def crash(folder: pathlib.Path) -> Rows:
    """The crash suite."""
    started = time.monotonic()
    counts = runs.crash_suite(folder, kills=20, seed=1)
    figure = f"{counts['running']} while running, {counts['saving']} inside a save; {counts['compared']} runs compared"
    return [("kills survived bit for bit", f"{figure}; {time.monotonic() - started:.0f} s", counts["saving"] > 0)]


def start(folder: pathlib.Path) -> Rows:
    """Process start to the first step done, on the 6 x 384 model, corpus prepared; median of 3."""
    corpus = runs.write_corpus(folder)
    model = {"model__num_layers": 6, "model__num_heads": 6, "model__embed_dim": 384, "model__max_seq_len": 256}
    rest = {
        "train__batch_size": 16,
        "train__accumulation_steps": 1,
        "train__num_train_steps": 1000,
        "train__ema_decay": 0,
    }
    rows: Rows = []
    for dtype in ("float32", "bfloat16"):
        for kind, limit in (("cold", 8.0), ("warm", 4.5)):
            seconds = []
            for turn in range(4):
                cache = folder / "cache" / (dtype if kind == "warm" else f"{dtype}-{turn}")
                workdir = folder / f"{kind}-{dtype}-{turn}"
                # No dropout, and nothing but training within the time measured.
                arguments = runs.train_command(
                    workdir, corpus, **model, **rest, model__dropout=0, model__dtype=dtype, checkpoint__every_steps=0
                )
                variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "GPTJAX_CACHE": str(folder / "prepared")}
                seconds.append(first_step_seconds(arguments, workdir, variables))
            median = statistics.median(seconds[1:])  # the first prepares the corpus, and warms the cache
            rows.append((f"start to first step, {dtype}, {kind}", f"{median:.1f} s (limit {limit})", median <= limit))
    return rows


def first_step_seconds(arguments: list[str], workdir: pathlib.Path, variables: dict[str, str]) -> float:
    """Seconds until `metrics.jsonl` has its first line; steps are seen one step late, so the second step is taken off."""
    import subprocess

    started = time.monotonic()
    process = subprocess.Popen(
        arguments,
        env=runs.environment(**variables),
        cwd=runs.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(arguments)} ended with code {process.returncode}")
            time.sleep(0.01)
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()


def quality(folder: pathlib.Path) -> Rows:
    """The nanoGPT CPU recipe on tinyshakespeare, whole validation split, 3 seeds."""
    path = os.environ.get("SHAKESPEARE")
    if path is None:
        return [("shakespeare_char", "skipped: name the text file in $SHAKESPEARE", True)]
    losses, seconds = [], []
    for seed in range(3):
        workdir = folder / f"shakespeare-{seed}"
        arguments = runs.command("train", "--config", "configs/shakespeare_char.py", "--workdir", str(workdir))
        started = time.monotonic()
        result = runs.run([*arguments, f"--config.data.files={path}", f"--config.seed={seed}"])
        seconds.append(time.monotonic() - started)
        assert result.returncode == 0, result.stderr
        losses.append(json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"])
    mean = statistics.mean(losses)
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return [
        ("shakespeare_char, validation nats", f"{mean:.4f} (seeds {shown}; limit 1.90)", mean <= 1.90),
        ("shakespeare_char, whole command", f"{statistics.median(seconds):.0f} s (nanoGPT: 85 s)", max(seconds) <= 85),
    ]


PARTS: dict[str, Callable[[pathlib.Path], Rows]] = {"crash": crash, "start": start, "quality": quality}


def main() -> int:
    """Runs the parts and prints the table; returns 1 if something is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=[*PARTS, "all"])
    part = parser.parse_args().part
    table: list[tuple[str, str, str, bool]] = []
    for name in PARTS if part == "all" else [part]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                table += [(name, *row) for row in PARTS[name](pathlib.Path(folder))]
            except AssertionError as error:
                table.append((name, "failed", str(error).strip().splitlines()[-1][:200], False))
    for name, what, figure, met in table:
        print(f"{name:<8} {'ok  ' if met else 'MISS'} {what:<42} {figure}")
    return 0 if all(met for *_, met in table) else 1


if __name__ == "__main__":
    sys.exit(main())
