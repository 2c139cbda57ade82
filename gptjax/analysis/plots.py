"""Pictures of logged metrics."""

import pathlib
from typing import Any


def plot_losses(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws training and validation loss against steps into a PNG.

    Args:
      lines: of a `metrics.jsonl`.
      path: the file to write.
    """
    from matplotlib.figure import Figure  # slow to import, and the object interface needs no display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, marker in [("train/loss", ""), ("eval/loss", "o")]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.rename(path)
