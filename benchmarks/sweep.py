"""Twelve runs together and apart: python -m benchmarks.sweep --data FILE [--widths 16,32,64,128] [--steps 300]

`experiments.sweep` of 3 learning rates x 4 seeds, a 2-layer GPT over characters, rows of 64, 12 a batch, each launcher in a
folder of its own, with an empty cache: the whole command's seconds, start and compilation included, and those of twice as
many steps, whose difference is the steady state.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments import cli

LAUNCHERS = {"vmap": ["--launcher", "vmap"], "parallel 1": ["--parallel", "1"], "parallel 2": ["--parallel", "2"]}


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", required=True, metavar="FILE", help="a text")
    parser.add_argument("--widths", default="16,32,64,128", help="of the models")
    parser.add_argument("--steps", type=int, default=300, help="of a run; then twice as many")
    arguments = parser.parse(argv)
    if not pathlib.Path(arguments.data).is_file():
        parser.error(f"--data {arguments.data}: no such file")
    if arguments.steps < 1 or not all(w.isdigit() and int(w) and int(w) % 4 == 0 for w in arguments.widths.split(",")):
        parser.error(f"--steps {arguments.steps} must be at least 1, and --widths {arguments.widths} multiples of 4")
    metrics: dict[str, float] = {}
    print(f"{'width':>5}  {'launcher':<10} {'whole s':>8} {'steady s':>8}   over vmap, whole and steady")
    for width in map(int, arguments.widths.split(",")):
        seconds = {}
        for name, flags in LAUNCHERS.items():
            once, twice = (
                whole(width, count, arguments.data, flags) for count in (arguments.steps, 2 * arguments.steps)
            )
            seconds[name] = once, twice - once
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["vmap"], strict=True)]
            print(
                f"{width:5}  {name:<10} {once:8.1f} {twice - once:8.1f}   {ratios[0]:.2f} {ratios[1]:.2f}", flush=True
            )
            metrics |= {f"{width}/{name}/whole_seconds": once, f"{width}/{name}/steady_seconds": twice - once}
    from gptjax.workdir import environment

    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


def whole(width: int, steps: int, data: str, flags: Sequence[str]) -> float:
    """Seconds of a whole sweep."""
    fields = {"data.files": data, "model.embed_dim": width, "model.num_layers": 2, "model.num_heads": 2}
    fields |= {"train.num_train_steps": steps, "eval.every_steps": steps, "checkpoint.every_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "experiments.sweep", "--config", "configs/shakespeare_char.py", *flags]
        command += ["--sweep", "configs/sweeps/learning_rate_and_seed.py", "--sweepdir", f"{folder}/runs"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        started = time.perf_counter()
        cold = os.environ | {"GPTJAX_CACHE": f"{folder}/cache", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache/compiled"}
        root = pathlib.Path(__file__).parent.parent
        subprocess.run(command, check=True, env=cold, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started


if __name__ == "__main__":
    cli.run(main)
