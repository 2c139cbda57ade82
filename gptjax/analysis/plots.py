"""Pictures of logged metrics and of scores."""

import pathlib
from typing import Any

import numpy as np


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
    _write(figure, path)


def plot_reliability(confidences: np.ndarray, hits: np.ndarray, path: pathlib.Path, num_bins: int = 15) -> None:
    """Draws how often a classifier is right against how sure it is (Guo et al., 2017, arXiv:1706.04599, figure 1).

    Args:
      confidences: [N], the probability of each label chosen.
      hits: [N], whether it was right.
      path: the PNG to write.
      num_bins: of equal width.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, num_bins + 1)
    counts, right = np.histogram(confidences, edges)[0], np.histogram(confidences, edges, weights=hits)[0]
    middles = (edges[1:] + edges[:-1]) / 2
    axes.bar(middles, right / np.maximum(counts, 1), 1 / num_bins, edgecolor="black", label="right")
    axes.plot([0, 1], [0, 1], "--", color="gray", label="as sure as right")
    axes.plot(middles, counts / max(1, counts.sum()), "o", color="tab:red", label="share of the examples")
    axes.set(xlabel="probability of the label", ylabel="share", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    _write(figure, path)


def _write(figure: Any, path: pathlib.Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.rename(path)
