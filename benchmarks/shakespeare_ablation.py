"""What each ingredient of configs/shakespeare_char_fast.py is worth: python -m benchmarks.shakespeare_ablation --text FILE

Trains the config, then the config with one ingredient taken out at a time, with several seeds each, and prints the mean
validation loss over the whole split, the standard deviation over seeds, and the difference with its standard error. Runs
that are finished in --folder are not run again.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from experiments import cli

# One ingredient each, as the fields that take it out. AdamW has its own learning rate, the best of 1e-3, 2e-3, 4e-3, 8e-3.
ABLATIONS: dict[str, dict[str, str]] = {
    "all": {},
    "Muon (AdamW instead)": {"optimizer.name": "adamw", "optimizer.learning_rate": "1e-3"},
    "rotary (learned positions)": {"model.position": "learned"},
    "QK-norm": {"model.qk_norm": "false"},
    "ReLU^2 (GELU)": {"model.activation": "gelu"},
    "RMSNorm (LayerNorm)": {"model.norm": "layernorm"},
    "value embeddings (wider MLP)": {"model.value_embeddings": "false", "model.mlp_dim": "488"},
    "residual scales": {"model.residual_scales": "false"},
    "zero-initialised residuals": {"model.residual_init": "scaled"},
    "soft-cap": {"model.logit_softcap": "0"},
    "linear decay to zero (cosine to a tenth)": {"optimizer.schedule": "cosine", "optimizer.final_fraction": "0.1"},
}


def main(argv: Sequence[str]) -> int:
    """Runs what is missing and prints the table."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--text", required=True, metavar="FILE", help="tinyshakespeare")
    parser.add_argument("--folder", default="runs/shakespeare_ablation", help="where the runs lie")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    arguments = parser.parse(argv)
    losses = {
        name: [run(arguments, name, fields, seed) for seed in range(arguments.seeds)]
        for name, fields in ABLATIONS.items()
    }
    base = losses["all"]
    metrics = {}
    print(f"{'without':<42} {'nats':>7} {'sd':>7}   worse by")
    for name, values in losses.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
        differences = [a - b for a, b in zip(values, base, strict=True)]
        error = statistics.stdev(differences) / len(values) ** 0.5 if len(values) > 1 else math.nan
        shown = "" if name == "all" else f"{statistics.mean(differences):+.4f} +- {error:.4f}"
        print(f"{'nothing' if name == 'all' else name:<42} {mean:7.4f} {deviation:7.4f}   {shown}")
        metrics[f"{name}/loss"] = mean
    if arguments.json:
        from gptjax.workdir import environment

        cli.write_report(arguments.json, environment(), list(range(arguments.seeds)), metrics)
    return 0


def run(arguments: argparse.Namespace, name: str, fields: dict[str, str], seed: int) -> float:
    """The final validation loss of one run."""
    folder = pathlib.Path(arguments.folder).absolute()
    slug = "".join(c if c.isalnum() else "-" for c in name)
    workdir = folder / f"{slug}-{seed}"
    command = [sys.executable, "-m", "experiments.train", "--config", "configs/shakespeare_char_fast.py"]
    command += ["--workdir", str(workdir), f"--config.data.files={pathlib.Path(arguments.text).absolute()}"]
    command += [f"--config.seed={seed}", *(f"--config.{field}={value}" for field, value in fields.items())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise cli.UserError(f"{' '.join(command)} ended with code {result.returncode}: {result.stderr[-500:]}")
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"]


if __name__ == "__main__":
    cli.run(main)
