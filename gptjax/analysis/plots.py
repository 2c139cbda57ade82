"""Pictures of logged metrics and of scores."""

import base64
import io
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # every training run draws its loss, and need not wait for what only reports use
    import pandas as pd

    from gptjax.analysis.scaling import ScalingLaw


def plot_losses(lines: list[dict[str, Any]], path: pathlib.Path, unit: str = "token") -> None:
    """Draws training and validation loss against steps into a PNG.

    Args:
      lines: of a `metrics.jsonl`.
      path: the file to write.
      unit: what the losses are an average over.
    """
    from matplotlib.figure import Figure  # slow to import, and the object interface needs no display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, marker in [("train/loss", ""), ("eval/loss", "o")]:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker)
    axes.set(xlabel="step", ylabel=f"loss (nats a {unit})")
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


def curves(panels: Mapping[str, Mapping[str, np.ndarray]], name: str) -> str:
    """Draws lines with bands.

    Args:
      panels: for each x axis, (x, mean, low, high) [4, N] of each group.
      name: of the y axis.

    Returns:
      An SVG in base64.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    groups = list(dict.fromkeys(group for panel in panels.values() for group in panel))
    colors = dict(zip(groups, _colors(len(groups)), strict=True))
    for place, (label, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for group, (x, mean, low, high) in panel.items():
            axes.plot(x, mean, color=colors[group], label=_plain(group), linewidth=1.5)
            axes.fill_between(x, low, high, color=colors[group], alpha=0.15, linewidth=0)
        # The first twentieth is so much higher that the rest would be a flat line.
        settled = np.concatenate([values[1:, len(values[0]) // 20 :].ravel() for values in panel.values()])
        low, high = np.nanquantile(settled, [0, 0.99])
        axes.set(xlabel=label, ylabel=name, ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9))
        _quiet(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:12], labels[:12], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _svg(figure)


def heat_map(values: "pd.DataFrame", name: str, *, lower_is_better: bool) -> str:
    """Draws a table of numbers, its best cell framed; returns an SVG in base64."""
    from matplotlib.figure import Figure

    cells = values.to_numpy(float)
    down, across = cells.shape
    figure = Figure(figsize=(min(10, 2.6 + 1.1 * across), 1.2 + 0.5 * down), layout="constrained")
    axes = figure.subplots()
    # Colours end at the median of the worse half, or one run far off would make the rest look the same.
    order = np.sort(cells[np.isfinite(cells)])
    order = order if lower_is_better else order[::-1]
    ends = sorted((order[0], order[(3 * len(order)) // 4]))
    image = axes.imshow(
        cells, aspect="auto", cmap="YlGnBu_r" if lower_is_better else "YlGnBu", vmin=ends[0], vmax=ends[1]
    )
    best = np.unravel_index(np.nanargmin(cells if lower_is_better else -cells), cells.shape)
    for (i, j), value in np.ndenumerate(cells):
        color = "white" if np.mean(image.to_rgba(value)[:3]) < 0.5 else "black"
        text = f"{value:.4g}" if np.isfinite(value) else "–"
        axes.text(j, i, text, ha="center", va="center", color=color, weight="bold" if (i, j) == best else None)
    axes.set_xticks(range(across), [_plain(x) for x in values.columns])
    axes.set_yticks(range(down), [_plain(x) for x in values.index])
    axes.set(xlabel=values.columns.name, ylabel=values.index.name)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label=name, extend="max" if lower_is_better else "min").outline.set_visible(False)
    return _svg(figure)


def iso_flops(law: "ScalingLaw", points: "pd.DataFrame", name: str) -> str:
    """Draws a scaling law's loss against parameters for equal FLOPs, its optima, and the runs; returns an SVG in base64.

    Args:
      law: fitted to `points`.
      points: N, D, flops and loss of runs.
      name: of the loss.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    norm, colors = LogNorm(points["flops"].min(), 1.01 * points["flops"].max(), clip=True), colormaps["viridis"]
    N = np.geomspace(points["N"].min() / 2, points["N"].max() * 2, 200)
    budgets = np.unique(np.round(np.log10(points["flops"]), 1))
    for flops in 10 ** (budgets if len(budgets) <= 6 else np.linspace(budgets[0], budgets[-1], 5)):
        axes.plot(N, law.loss(N, flops / 6 / N), color=colors(norm(flops)), label=f"{flops:.1e} FLOPs")
        best = law.optimal(flops)
        if N[0] < best[0] < N[-1]:
            axes.plot(best[0], law.loss(*best), "*", color=colors(norm(flops)), markersize=12)
    axes.scatter(points["N"], points["loss"], c=points["flops"], norm=norm, cmap=colors, edgecolors="white", zorder=3)
    margin = 0.1 * np.ptp(points["loss"])
    axes.set(xscale="log", xlabel="parameters N", ylabel=name)
    axes.set_ylim(points["loss"].min() - margin, points["loss"].max() + margin)
    axes.legend(frameon=False, fontsize=9)
    _quiet(axes)
    return _svg(figure)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return (
        [colormaps["tab10"](i) for i in range(count)]
        if count <= 10
        else list(colormaps["viridis"](np.linspace(0, 0.95, count)))
    )


def _plain(label: Any) -> str:
    """A label that is no formula, and not too long."""
    text = str(label) if len(str(label)) <= 60 else f"{str(label)[:60]}..."
    return text.replace("$", r"\$")


def _quiet(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return base64.b64encode(buffer.getvalue()).decode()


def _write(figure: Any, path: pathlib.Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.rename(path)
