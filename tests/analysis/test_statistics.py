"""Statistics against SciPy, published tables and simulation."""

import numpy as np
import pytest
from scipy import stats

from gptjax.analysis.statistics import compare, mean_interval, seeds_needed


def test_the_interval_is_scipys_and_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=5)
    ours, theirs = mean_interval(x, 0.9), stats.ttest_1samp(x, 0).confidence_interval(0.9)
    np.testing.assert_allclose(ours, [x.mean(), theirs.low, theirs.high])
    draws = rng.normal(3, 2, size=(2000, 4))
    held = np.mean([low <= 3 <= high for _, low, high in map(mean_interval, draws)])
    assert abs(held - 0.95) < 0.02
    assert mean_interval([1.0]) == (1.0, -np.inf, np.inf)


def test_a_comparison_is_scipys_paired_test_over_common_seeds():
    rng = np.random.default_rng(1)
    baseline = dict(enumerate(rng.normal(2, 0.5, size=6)))
    values = {seed: x - 0.1 + rng.normal(0, 0.02) for seed, x in baseline.items()}
    found = compare(values | {17: 99.0}, baseline | {-3: 0.0})
    theirs = stats.ttest_rel(list(values.values()), list(baseline.values()))
    np.testing.assert_allclose(found.p_value, theirs.pvalue)
    np.testing.assert_allclose(found.difference[1:], theirs.confidence_interval())
    assert found.verdict == "better" and compare(baseline, values).verdict == "worse"
    assert compare(values, baseline, lower_is_better=False).verdict == "worse"
    assert compare(values, baseline, confidence=1 - 1e-9).verdict == "cannot tell"


def test_what_cannot_be_told():
    assert compare({0: 1.0}, {0: 2.0}).verdict == "cannot tell"
    assert compare({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0}).verdict == "cannot tell"
    same = compare({0: 1.0, 1: 1.5}, {0: 1.0, 1: 1.5})
    assert compare({0: 1.0, 1: 2.0}, {0: 2.0, 1: 3.0}).p_value == 0
    assert same.verdict == "cannot tell" and np.isnan(same.p_value) and same.seeds_needed == np.inf


def test_equal_groups_are_told_apart_no_more_often_than_promised():
    draws = np.random.default_rng(2).normal(size=(600, 2, 4))
    wrong = np.mean([compare(dict(enumerate(a)), dict(enumerate(b))).verdict != "cannot tell" for a, b in draws])
    assert 0.025 < wrong < 0.075


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_cohens(effect, seeds):
    """Cohen's effect sizes in a paired two-sided test, 5 % and a power of 80 %, as every table of them has it."""
    assert seeds_needed(effect, 1.0) == seeds_needed(-2 * effect, 2.0) == seeds


def test_seeds_needed_by_simulation():
    n = seeds_needed(1.3, 1.0, power=0.9, confidence=0.99)
    draws = np.random.default_rng(3).normal(1.3, 1.0, size=(2, 4000, n))
    found = [np.mean(stats.ttest_1samp(x, 0, axis=1).pvalue < 0.01) for x in (draws[0], draws[1, :, 1:])]
    assert found[0] > 0.89 and found[1] < 0.9
    assert seeds_needed(1e-9, 1.0) == np.inf and np.isnan(seeds_needed(1.0, np.nan))
