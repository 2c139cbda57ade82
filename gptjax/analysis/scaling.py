"""Scaling laws: what loss a model of N parameters reaches on D tokens, and the best N for a budget of FLOPs."""

import itertools
import json
import pathlib
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from gptjax.analysis.runs import Runs, read_config

HUBER_DELTA = 1e-3
FLOPS_PER_PARAMETER = 6  # and token, forward and backward: C = 6 N D
# Hoffmann et al., appendix D.2: starts of (log A, log B, log E, alpha, beta).
GRID = (
    np.arange(0, 26, 5),
    np.arange(0, 26, 5),
    np.arange(-1, 1.1, 0.5),
    np.arange(0, 2.1, 0.5),
    np.arange(0, 2.1, 0.5),
)


class ScalingLaw(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: np.ndarray | float, D: np.ndarray | float) -> np.ndarray:
        """The loss with N parameters after D tokens."""
        return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)

    def optimal(self, flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """(N, D) of the lowest loss with 6 N D = `flops` (Hoffmann et al., equation 4)."""
        total = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        product = np.asarray(flops) / FLOPS_PER_PARAMETER
        return scale * product ** (self.beta / total), product ** (self.alpha / total) / scale


def fit(N: np.ndarray, D: np.ndarray, loss: np.ndarray, *, num_starts: int = 50) -> ScalingLaw:
    """Fits the parametric form by the Huber loss of log L with L-BFGS, from a grid of starts.

    As Hoffmann et al., 2022, arXiv:2203.15556, section 3.3, with the corrections of Besiroglu et al., 2024,
    arXiv:2404.10102: the objective is a sum, not a mean, and is lowered until it stands. Of the grid only the best
    `num_starts` are followed to their minima.

    Args:
      N, D, loss: [R], parameters, tokens and loss in nats of each run.

    Returns:
      The law.

    Raises:
      ValueError: fewer than 5 runs, or fewer than two N or D, which determine no law.
    """
    if len(loss) < 5 or min(len(np.unique(N)), len(np.unique(D))) < 2:
        raise ValueError(
            f"a scaling law has 5 constants and needs at least 5 runs of several sizes and lengths, not {len(loss)} runs "
            f"of {len(np.unique(N))} sizes and {len(np.unique(D))} lengths"
        )
    starts = np.array(list(itertools.product(*GRID)))
    objectives = _objective(starts, N, D, loss)[0]
    return _descend(starts[np.argsort(objectives)[:num_starts]], N, D, loss)


def bootstrap(
    law: ScalingLaw, N: np.ndarray, D: np.ndarray, loss: np.ndarray, *, repeats: int = 200, seed: int = 0
) -> list[ScalingLaw]:
    """Laws of runs drawn with replacement, each fitted from `law` on; their quantiles are intervals."""
    rng = np.random.default_rng(seed)
    start = np.array([[np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]])
    draws = (rng.integers(len(loss), size=len(loss)) for _ in range(repeats))
    return [_descend(start, N[rows], D[rows], loss[rows]) for rows in draws]


def sizes(runs: Runs, value: pd.Series) -> pd.DataFrame:
    """N, D, flops and loss of runs, a row each, from their last line.

    N is the parameters that multiply activations: a token's logged FLOPs less attention's 12 L H K T, over 6, as
    `training.throughput.flops_per_token` counts them.

    Args:
      runs: what `read_runs` returned.
      value: the loss of each run that counts, by folder.

    Raises:
      ValueError: runs without those metrics.
    """
    rows = []
    last = runs.metrics.groupby("run", observed=True).last()
    for name in ("train/tokens", "perf/flops"):
        if name not in last:
            raise ValueError(f"a scaling law needs {name}, which no run has logged")
    for run, loss in value.items():
        tokens, flops = last.loc[run, "train/tokens"], last.loc[run, "perf/flops"]
        model = json.loads((pathlib.Path(str(run)) / "model.json").read_text())
        length = read_config(pathlib.Path(str(run)))["data.seq_len"] or model["max_seq_len"]
        attentions = model["num_encoder_layers"] + model["num_layers"] * (2 if model["num_encoder_layers"] else 1)
        attention = 12 * attentions * model["num_heads"] * model["head_dim"] * length
        rows.append({"run": run, "N": (flops / tokens - attention) / 6, "D": tokens, "flops": flops, "loss": loss})
    return pd.DataFrame(rows)


def _objective(x: np.ndarray, N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of Huber losses [S] of constants [S, 5], and its gradient [S, 5]."""
    a, b, e, alpha, beta = (column[:, None] for column in x.T)
    terms = np.stack(np.broadcast_arrays(a - alpha * np.log(N), b - beta * np.log(D), e))
    predicted = np.logaddexp.reduce(terms, axis=0)
    residual = predicted - np.log(loss)
    far = np.abs(residual) > HUBER_DELTA
    huber = np.where(far, HUBER_DELTA * (np.abs(residual) - HUBER_DELTA / 2), residual**2 / 2)
    slope = np.clip(residual, -HUBER_DELTA, HUBER_DELTA) * np.exp(terms - predicted)
    gradient = [slope[0], slope[1], slope[2], -slope[0] * np.log(N), -slope[1] * np.log(D)]
    return huber.sum(-1), np.stack([g.sum(-1) for g in gradient], axis=-1)


def _descend(starts: np.ndarray, N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> ScalingLaw:
    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _objective(x[None], N, D, loss)
        return value[0] / HUBER_DELTA, gradient[0] / HUBER_DELTA

    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10}
    bounds = [(None, None)] * 3 + [(0.01, None)] * 2  # more parameters or tokens never harm
    found = [minimize(function, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for x in starts]
    a, b, e, alpha, beta = min(found, key=lambda result: result.fun).x
    return ScalingLaw(np.exp(e), np.exp(a), np.exp(b), alpha, beta)
