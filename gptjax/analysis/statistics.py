"""What a few seeds can tell: intervals of a mean, a paired test against a baseline, and how many seeds would be enough."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

MAX_SEEDS = 1000


class Interval(NamedTuple):
    """A mean with its confidence interval; without spread to judge by, from -inf to inf."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A group against a baseline.

    Attributes:
      difference: mean over seeds of group less baseline, and its interval.
      p_value: of the paired t-test; NaN with fewer than two common seeds, or no difference at all.
      verdict: 'better', 'worse' or 'cannot tell'.
      seeds_needed: with which a difference like this is told four times out of five, see `seeds_needed`.
    """

    difference: Interval
    p_value: float
    verdict: str
    seeds_needed: float


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """The mean of `values` [N] and its interval by Student's t."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(x[0], -np.inf, np.inf) if len(x) else Interval(np.nan, np.nan, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return Interval(x.mean(), x.mean() - half, x.mean() + half)


def compare(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    lower_is_better: bool = True,
    confidence: float = 0.95,
) -> Comparison:
    """Compares runs with a baseline's runs of the same seeds, which share the order of their data.

    Args:
      values, baseline: a number for each seed; seeds that only one has are left out.
      lower_is_better: as of a loss.
      confidence: of the interval; the verdict is that zero lies outside it. With k comparisons 1 - 0.05 / k keeps all of
        them right 95 % of the time (Bonferroni).

    Returns:
      What can be told.
    """
    differences = np.array([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
    interval = mean_interval(differences, confidence)
    told = interval.low > 0 or interval.high < 0
    better = (interval.mean < 0) == lower_is_better
    n, spread = len(differences), differences.std(ddof=1) if len(differences) > 1 else np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.divide(interval.mean * n**0.5, spread)
    return Comparison(
        difference=interval,
        p_value=2 * stats.t.sf(abs(t), n - 1),
        verdict=("better" if better else "worse") if told else "cannot tell",
        seeds_needed=seeds_needed(interval.mean, spread, confidence=confidence),
    )


def seeds_needed(difference: float, deviation: float, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The fewest seeds with which a two-sided paired t-test finds a true difference with probability `power`.

    Args:
      difference: the true mean difference.
      deviation: the standard deviation of the differences between seeds.
      power, confidence: 1 less the probabilities of missing a difference and of seeing one that is not there.

    Returns:
      From 2 to `MAX_SEEDS`; inf beyond, NaN when the deviation is not known.
    """
    if not np.isfinite(deviation):
        return np.nan
    n = np.arange(2, MAX_SEEDS + 1)
    if deviation == 0:
        return 2 if difference else np.inf
    limit = stats.t.ppf((1 + confidence) / 2, n - 1)
    enough = stats.nct.sf(limit, n - 1, abs(difference) / deviation * n**0.5) >= power
    return int(n[enough.argmax()]) if enough.any() else np.inf
