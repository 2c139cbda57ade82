"""Scaling laws: constants that runs were made with are found again."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from experiments import cli, report
from gptjax.analysis.scaling import ScalingLaw, bootstrap, fit
from tests.analysis.sweeps import write_run

LAW = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al., section 3.3


def iso_flop_runs(deviation, seed=0):
    """Eight sizes at each of four budgets."""
    budgets = np.repeat([1e18, 1e19, 1e20, 1e21], 8)
    N = np.tile(np.geomspace(0.1, 10, 8), 4) * LAW.optimal(budgets)[0]
    D = budgets / 6 / N
    return N, D, LAW.loss(N, D) * np.exp(np.random.default_rng(seed).normal(0, deviation, len(N)))


def test_the_optimum_is_the_minimum():
    for flops in (1e15, 1e20, 1e25):
        N, D = LAW.optimal(flops)
        found = minimize_scalar(lambda x: LAW.loss(np.exp(x), flops / 6 / np.exp(x)), bounds=(5, 40), method="bounded")  # noqa: B023
        np.testing.assert_allclose([N, 6 * N * D], [np.exp(found.x), flops], rtol=1e-4)


def test_known_constants_are_recovered():
    np.testing.assert_allclose(fit(*iso_flop_runs(0.0)), LAW, rtol=1e-6)
    runs = iso_flop_runs(0.003)
    runs[2][5] *= 2  # one run that failed
    law = fit(*runs)
    np.testing.assert_allclose([law.E, law.alpha, law.beta], [LAW.E, LAW.alpha, LAW.beta], rtol=0.1)
    low, high = np.quantile(np.array(bootstrap(law, *runs)), [0.025, 0.975], axis=0)
    assert (low < LAW).all() and (high > LAW).all() and high[3] - low[3] < 0.1


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = []
    for seed in range(10):
        runs = iso_flop_runs(0.003, seed)
        laws = bootstrap(fit(*runs, num_starts=3), *runs, repeats=40)
        low, high = np.quantile([law.optimal(1e23)[0] for law in laws], [0.025, 0.975])
        held.append(low < LAW.optimal(1e23)[0] < high)
    assert sum(held) >= 8


def test_too_few_runs_determine_nothing():
    N, D, loss = iso_flop_runs(0.0)
    with pytest.raises(ValueError, match="at least 5 runs of several sizes"):
        fit(N[:4], D[:4], loss[:4])
    with pytest.raises(ValueError, match="1 sizes"):
        fit(np.ones(8), D[:8], loss[:8])


def test_the_report_fits_logged_runs(tmp_path, capsys):
    sizes = {"num_encoder_layers": 0, "num_layers": 2, "num_heads": 4, "head_dim": 8, "max_seq_len": 64}
    for i, (N, D, loss) in enumerate(zip(*iso_flop_runs(0.001), strict=True)):
        folder = write_run(tmp_path / f"runs/{i}", [loss], {"data": {"seq_len": 128}, "model": {"embed_dim": i}})
        (folder / "model.json").write_text(json.dumps(sizes))
        flops = (6 * N + 12 * 2 * 4 * 8 * 128) * D
        line = {"step": 1, "eval/loss": loss, "train/tokens": D, "perf/flops": flops}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = tmp_path / "page.html"
    arguments = [str(tmp_path / "runs"), "--scaling", "--budget", "1e23", "--html", str(page)]
    assert cli.exit_code(lambda: report.main(arguments)) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for name, constant in LAW._asdict().items():
        low, high = next(map(float, row[2:]) for row in rows if row[:1] == [name])
        assert low < constant < high
    assert "1e+23 FLOPs" in out and "1e+23 FLOPs" in page.read_text()
