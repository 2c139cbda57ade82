"""Every metric equals its reference implementation, and bootstrap intervals those of sacrebleu and SciPy."""

import json
import pathlib
import random

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from sacrebleu.significance import PairedTest

from gptjax.evaluation import text_metrics as tm

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "goldens/metrics.json").read_text())


def corpus(num_examples=40, num_references=2):
    rng = random.Random(1)
    words = ["The", "cat", ",", "a", "mat", ".", "It's", "über", "3.5", "dogs'", "猫", "坐", "running", "runs", "sat"]
    references = [
        [" ".join(rng.choices(words, k=rng.randint(4, 9))) for _ in range(num_references)] for _ in range(num_examples)
    ]
    noise = [[w if rng.random() < 0.8 else rng.choice(words) for w in rng.choice(r).split(" ")] for r in references]
    worse = [[w if rng.random() < 0.6 else rng.choice(words) for w in rng.choice(r).split(" ")] for r in references]
    return [" ".join(x) for x in noise], [" ".join(x) for x in worse], references


def value(measured):
    return measured.value(measured.rows)


@pytest.mark.parametrize("name", ["bleu", "bleu:zh", "bleu:none", "chrf", "chrf++"])
def test_sacrebleu(name):
    texts, _, references = corpus()
    kind, _, tokenize = name.partition(":")
    metric = (
        sacrebleu.BLEU(tokenize=tokenize or "13a") if kind == "bleu" else sacrebleu.CHRF(word_order=2 * ("++" in name))
    )
    streams = [list(stream) for stream in zip(*references, strict=True)]
    score = metric.corpus_score(texts, streams, n_bootstrap=200)
    measured = tm.text_metric(name, texts, references)
    assert value(measured) == pytest.approx(score.score, abs=1e-9) and 0 < score.score < 100
    assert measured.signature.split("|")[0] == "nrefs:2" and f"version:{sacrebleu.__version__}" in measured.signature
    estimate = tm.bootstrap(measured, num_resamples=200)
    # theirs are other draws of the same distribution
    assert (estimate.high - estimate.low) / 2 == pytest.approx(score._ci, rel=0.25)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_different_numbers_of_references(name):
    texts, _, references = corpus()
    fewer = [r[: 1 + i % 2] for i, r in enumerate(references)]
    repeated = [[r[0], r[-1]] for r in fewer]
    assert value(tm.text_metric(name, texts, fewer)) == pytest.approx(value(tm.text_metric(name, texts, repeated)))


def test_paired_comparison_agrees_with_sacrebleu():
    texts, worse, references = corpus(200)
    streams = [list(stream) for stream in zip(*references, strict=True)]
    metric = {"BLEU": sacrebleu.BLEU(references=streams)}
    _, results = PairedTest([("a", texts), ("b", worse)], metric, None, test_type="bs", n_samples=500)()
    one, two = (tm.bleu(x, references) for x in (texts, worse))
    estimate = tm.bootstrap(one, two, num_resamples=500)
    assert estimate.value == pytest.approx(results["BLEU"][0].score - results["BLEU"][1].score, abs=1e-9)
    assert estimate.low > 0 and estimate.p_value == results["BLEU"][1].p_value == pytest.approx(1 / 501)
    assert tm.bootstrap(one, one).p_value == 1 and tm.bootstrap(one, one)[:3] == (0, 0, 0)


def test_p_value_is_the_paired_t_tests():
    rng = np.random.default_rng(0)
    one = rng.normal(size=200)
    for shift in (0.02, 0.12, 0.2):
        other = one + shift + rng.normal(size=200)
        estimate = tm.bootstrap(tm.mean(one), tm.mean(other), num_resamples=4000)
        assert estimate.p_value == pytest.approx(scipy.stats.ttest_rel(one, other).pvalue, abs=0.02)
        assert (estimate.low < 0 < estimate.high) == (estimate.p_value > 0.05)


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge(kind):
    from rouge_score.rouge_scorer import RougeScorer

    texts, _, references = corpus()
    scorer = RougeScorer([kind], use_stemmer=True)
    known = [max(scorer.score(r, t)[kind].fmeasure for r in rs) for rs, t in zip(references, texts, strict=True)]
    assert value(tm.text_metric(kind, texts, references)) == pytest.approx(np.mean(known)) and 0.2 < np.mean(known) < 1


def test_squad():
    golden = GOLDEN["squad"]
    for name in ("exact_match", "f1"):
        measured = tm.text_metric(name, golden["texts"], golden["answers"])
        np.testing.assert_allclose(measured.rows, golden[name], atol=1e-12)


@pytest.mark.parametrize("golden", GOLDEN["classes"])
def test_classes(golden):
    pair = golden["predicted"], golden["labels"]
    assert value(tm.accuracy(*pair)) == pytest.approx(golden["accuracy"])
    assert value(tm.f1(*pair, "macro")) == pytest.approx(golden["macro"])
    assert value(tm.mcc(*pair)) == pytest.approx(golden["mcc"], abs=1e-12)
    if golden["binary"] is not None:
        assert value(tm.f1(*pair)) == pytest.approx(golden["binary"])


def test_correlations():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, 50)  # with ties
    y = x + rng.normal(size=50)
    assert value(tm.pearson(x, y)) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert value(tm.spearman(x, y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert np.isnan(tm.bootstrap(tm.pearson(x, np.ones(50)))).all()


def test_pass_at_k():
    golden = GOLDEN["pass_at_k"]
    for k in (1, 3, 5):
        assert value(tm.pass_at_k(golden["samples"], golden["passed"], k)) == pytest.approx(golden[str(k)])


@pytest.mark.parametrize("num_bins", [10, 15])
def test_calibration(num_bins):
    golden = GOLDEN["calibration"]
    measured = tm.calibration_error(golden["confidences"], golden["hits"], num_bins)
    assert value(measured) == pytest.approx(golden[str(num_bins)], abs=1e-6)


def test_interval_is_scipys():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.gamma(2.0, size=80), rng.integers(1, 9, 80)], axis=1)
    measured = tm.ratio(*rows.T)
    known = scipy.stats.bootstrap(
        tuple(rows.T), lambda x, y: x.sum() / y.sum(), paired=True, vectorized=False, method="percentile", rng=1
    ).confidence_interval
    estimate = tm.bootstrap(measured, num_resamples=4000)
    assert estimate.value == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert estimate[1:3] == pytest.approx(known, rel=0.02)
    assert estimate == tm.bootstrap(measured, num_resamples=4000)
    assert np.isnan(tm.bootstrap(measured._replace(rows=rows[:1]))[1:3]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tm.bleu(["a"], []), "1 hypotheses for 0 references"),
        (lambda: tm.rouge(["a", "b"], [["a"], []]), "example 1 has no list of references"),
        (lambda: tm.exact_match(["a"], ["a"]), "example 0 has no list of references"),
        (lambda: tm.bleu(["a"], [["a"]], "french"), "tokenizer 'french' is not one of"),
        (lambda: tm.text_metric("blue", ["a"], [["a"]]), "metric 'blue' is not one of bleu"),
        (lambda: tm.accuracy([], []), "0 predictions for 0 labels"),
        (lambda: tm.accuracy([1], [1, 2]), "1 predictions for 2 labels"),
        (lambda: tm.f1([1], [1], "micro"), "'binary' or 'macro'"),
        (lambda: tm.pass_at_k([3, 2], [1, 1], 3), "pass@3 needs at least 3 samples"),
        (lambda: tm.calibration_error([1.5], [True]), "from 0 to 1"),
        (lambda: tm.bootstrap(tm.mean([1.0]), tm.mean([1.0, 2.0])), "there must be as many"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
