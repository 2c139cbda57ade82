"""Scores of texts and labels, each with what its bootstrap needs: a row for every example, and a function of any rows."""

import functools
import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Numbers = Sequence[Any] | np.ndarray  # [N], one an example
Texts = Sequence[str]  # [N]
References = Sequence[Sequence[str]]  # [N], one or more an example


class Measurement(NamedTuple):
    """A metric of N examples.

    Attributes:
      rows: [N, ...], the sufficient statistics of each example.
      value: from rows to the metric.
      signature: how it was computed, where others print that too.
    """

    rows: np.ndarray
    value: Callable[[np.ndarray], float]
    signature: str = ""


class Estimate(NamedTuple):
    """A metric, or a difference of two, with its confidence interval; bounds are NaN where one example leaves none.

    Attributes:
      value, low, high: the metric and the bounds.
      p_value: of a difference, how often it would be this large if there were none.
    """

    value: float
    low: float
    high: float
    p_value: float = float("nan")


def bootstrap(
    measured: Measurement,
    other: Measurement | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 12345,
) -> Estimate:
    """The percentile bootstrap over examples (Efron, 1979), and the paired one of two systems (Koehn, 2004).

    Args:
      measured: of the system.
      other: of the system it is compared with, on the same examples in the same order; None for no comparison.
      num_resamples: how many times examples are drawn.
      confidence: of the interval.
      seed: of the draws; by default sacrebleu's.

    Returns:
      The metric, or `measured` minus `other` with a two-sided p-value: the share of resampled differences that lie at
      least as far from their mean as the difference lies from 0.

    Raises:
      ValueError: two systems that were measured on different numbers of examples.
    """
    systems = [measured] if other is None else [measured, other]
    num_examples = len(measured.rows)
    _same_length("examples of the other system", systems[-1].rows, "of this one", measured.rows)
    generator = np.random.default_rng(seed)

    def difference(index: np.ndarray | slice) -> float:
        values = [system.value(system.rows[index]) for system in systems]
        return values[0] - sum(values[1:])

    value = difference(slice(None))
    if num_examples < 2:
        return Estimate(value, float("nan"), float("nan"))
    drawn = np.array([difference(generator.choice(num_examples, num_examples)) for _ in range(num_resamples)])
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2]) if value == value else (value,) * 2
    if other is None:
        return Estimate(value, float(low), float(high))
    # Not a number: an undefined resample, as of a correlation of constants.
    beyond = np.sum(np.abs(drawn - np.nanmean(drawn)) >= abs(value)) if value else num_resamples
    return Estimate(value, float(low), float(high), (int(beyond) + 1) / (num_resamples + 1))


def mean(values: Numbers) -> Measurement:
    """The mean of a number an example."""
    return Measurement(np.asarray(values, np.float64), lambda rows: float(rows.mean()))


def bleu(hypotheses: Texts, references: References, tokenize: str = "13a") -> Measurement:
    """sacrebleu's BLEU of a corpus (Papineni et al., 2002; Post, 2018, arXiv:1804.08771), in per cent.

    Args:
      hypotheses: a text for each example.
      references: the references of each example, of which there may be different numbers.
      tokenize: sacrebleu's name of a tokenizer, '13a', 'intl', 'zh', 'char' or 'none'.

    Raises:
      ValueError: no such tokenizer, no references, or not as many as hypotheses.
    """
    from sacrebleu.metrics.bleu import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"BLEU's tokenizer {tokenize!r} is not one of {', '.join(BLEU.TOKENIZERS)}")
    return _sacrebleu(BLEU(tokenize=tokenize), hypotheses, references)


def chrf(hypotheses: Texts, references: References, word_order: int = 0) -> Measurement:
    """sacrebleu's chrF of a corpus (Popovic, 2015), or with `word_order` 2 chrF++, in per cent; arguments as of `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    _check_references(hypotheses, references)
    most = max(map(len, references))  # it wants as many of each; copies change no best one
    padded = [[*known, *[known[0]] * (most - len(known))] for known in references]
    return _sacrebleu(CHRF(word_order=word_order), hypotheses, padded)


def _sacrebleu(metric: Any, hypotheses: Texts, references: References) -> Measurement:
    _check_references(hypotheses, references)
    streams = list(itertools.zip_longest(*references))  # None where an example has fewer than another
    rows = np.array(metric._extract_corpus_statistics(hypotheses, streams), np.float64)

    def value(rows: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(rows.sum(axis=0)).score)

    return Measurement(rows, value, str(metric.get_signature()))


def rouge(hypotheses: Texts, references: References, kind: str = "rougeL") -> Measurement:
    """rouge-score's F-measure (Lin, 2004), with stems, of the best reference.

    Args:
      hypotheses, references: as of `bleu`.
      kind: 'rouge1', 'rouge2', 'rougeL', or 'rougeLsum', for which lines are sentences.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_references(hypotheses, references)
    scorer = RougeScorer([kind], use_stemmer=True)
    pairs = zip(references, hypotheses, strict=True)
    return mean([scorer.score_multi(known, text)[kind].fmeasure for known, text in pairs])


def exact_match(hypotheses: Texts, references: References) -> Measurement:
    """The share of texts that equal a reference up to case, articles, punctuation and white space, as SQuAD counts it."""
    return _best(hypotheses, references, lambda words, known: float(words == known))


def token_f1(hypotheses: Texts, references: References) -> Measurement:
    """F1 of the bags of words, normalised as for `exact_match`, of the best reference (Rajpurkar et al., 2018)."""

    def f1(words: list[str], known: list[str]) -> float:
        if not words or not known:
            return float(words == known)
        return 2 * sum((Counter(words) & Counter(known)).values()) / (len(words) + len(known))

    return _best(hypotheses, references, f1)


def _best(hypotheses: Texts, references: References, score: Callable[[list[str], list[str]], float]) -> Measurement:
    _check_references(hypotheses, references)
    # References of articles alone count for nothing, unless there are no others.
    known = [[words for text in texts if (words := _words(text))] or [[]] for texts in references]
    pairs = zip(hypotheses, known, strict=True)
    return mean([max(score(_words(text), words) for words in texts) for text, texts in pairs])


def _words(text: str) -> list[str]:
    """SQuAD's normalisation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def accuracy(predicted: Numbers, labels: Numbers) -> Measurement:
    """The share of labels hit."""
    rows = _pairs(predicted, labels)
    return mean(rows[:, 0] == rows[:, 1])


def f1(predicted: Numbers, labels: Numbers, average: str = "binary") -> Measurement:
    """F1 of label 1 ('binary'), or the mean of all labels' that occur ('macro'); 0 where nothing is hit."""
    if average not in ("binary", "macro"):
        raise ValueError(f"average {average!r} is not 'binary' or 'macro'")

    def value(rows: np.ndarray) -> float:
        classes = [1] if average == "binary" else np.unique(rows)
        scores = []
        for label in classes:
            hits = np.sum((rows == label).all(axis=1))
            scores.append(2 * hits / max(1, np.sum(rows == label)))
        return float(np.mean(scores))

    return Measurement(_pairs(predicted, labels), value)


def mcc(predicted: Numbers, labels: Numbers) -> Measurement:
    """Matthews' correlation coefficient, of several classes as Gorodkin (2004) has it; 0 if either side is constant."""

    def value(rows: np.ndarray) -> float:
        one_hot = rows[..., None] == np.unique(rows)
        x, y = (side - side.mean(axis=0) for side in np.moveaxis(one_hot, 1, 0))
        scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
        return float(np.sum(x * y) / scale) if scale else 0.0

    return Measurement(_pairs(predicted, labels), value)


def pearson(predicted: Numbers, targets: Numbers) -> Measurement:
    """Pearson's correlation; NaN if either side is constant."""
    return Measurement(_pairs(predicted, targets), _correlation)


def spearman(predicted: Numbers, targets: Numbers) -> Measurement:
    """Spearman's correlation of ranks, where equals share the mean rank; NaN if either side is constant."""
    return Measurement(_pairs(predicted, targets), lambda rows: _correlation(np.stack([_ranks(x) for x in rows.T], 1)))


def _correlation(rows: np.ndarray) -> float:
    x, y = (rows - rows.mean(axis=0)).T
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def pass_at_k(num_samples: Numbers, num_passed: Numbers, k: int) -> Measurement:
    """The chance that one of k samples of a problem passes, without bias (Chen et al., 2021, arXiv:2107.03374).

    Raises:
      ValueError: k is not from 1 to the number of samples.
    """
    n, c = _pairs(num_samples, num_passed).T
    if not 1 <= k <= n.min():
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples of each problem, and k at least 1")
    # 1 - C(n - c, k) / C(n, k), as the chance that each draw misses
    miss = [np.prod([max(0.0, n[i] - c[i] - j) / (n[i] - j) for j in range(k)]) for i in range(len(n))]
    return mean(1 - np.array(miss))


def calibration_error(confidences: Numbers, hits: Numbers, num_bins: int = 15) -> Measurement:
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, section 2), over bins of equal width.

    Args:
      confidences: the probability of the label chosen.
      hits: whether it was right.
      num_bins: each open below and closed above.
    """
    rows = _pairs(confidences, hits)
    if rows.min() < 0 or rows.max() > 1:
        raise ValueError("confidences must be probabilities, from 0 to 1")

    def value(rows: np.ndarray) -> float:
        bins = np.clip(np.ceil(rows[:, 0] * num_bins), 1, num_bins).astype(int)
        return float(np.sum(np.abs(np.bincount(bins, rows[:, 0] - rows[:, 1]))) / len(rows))

    return Measurement(rows, value)


def ratio(numerators: Numbers, denominators: Numbers, *, exponential: bool = False) -> Measurement:
    """A sum over a sum: nats a token, of which the exponential is the perplexity, or bits a byte."""

    def value(rows: np.ndarray) -> float:
        quotient = rows[:, 0].sum() / rows[:, 1].sum()
        return float(np.exp(min(quotient, 700.0)) if exponential else quotient)

    return Measurement(_pairs(numerators, denominators), value)


TEXT_METRICS: dict[str, Callable[[Texts, References], Measurement]] = {
    "bleu": bleu,
    "chrf": chrf,
    "chrf++": functools.partial(chrf, word_order=2),
    **{kind: functools.partial(rouge, kind=kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    "exact_match": exact_match,
    "f1": token_f1,
}


def text_metric(name: str, hypotheses: Texts, references: References) -> Measurement:
    """A metric of texts by name, one of `TEXT_METRICS`, or 'bleu:TOKENIZER'.

    Raises:
      ValueError: no such name, and whatever the metric refuses.
    """
    base, _, tokenize = name.partition(":")
    if base == "bleu" and tokenize:
        return bleu(hypotheses, references, tokenize)
    if name not in TEXT_METRICS:
        raise ValueError(f"metric {name!r} is not one of {', '.join(TEXT_METRICS)}, bleu:TOKENIZER")
    return TEXT_METRICS[name](hypotheses, references)


def _check_references(hypotheses: Texts, references: References) -> None:
    _same_length("hypotheses", hypotheses, "references", references)
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"example {index} has no list of references, which the metric needs: {texts!r:.60}")


def _same_length(what: str, one: Numbers, other_name: str, other: Numbers) -> None:
    if len(one) != len(other) or not len(one):
        raise ValueError(f"{len(one)} {what} for {len(other)} {other_name}: there must be as many, and at least 1")


def _pairs(one: Numbers, other: Numbers) -> np.ndarray:
    _same_length("predictions", one, "labels", other)
    return np.stack([np.asarray(one, np.float64), np.asarray(other, np.float64)], axis=1)
