"""Sampling against independent NumPy computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation.sampling import Sampling, check_sampling, penalize, sample, truncate

VOCAB = 37


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32) * 3


def kept(logits, **numbers):
    return np.isfinite(np.asarray(jax.jit(truncate)(logits, Sampling(**numbers))))


def nucleus(row, top_p):
    """The likeliest tokens that together reach top_p, by sorting."""
    order = np.argsort(-row, kind="stable")
    probability = np.exp(row[order].astype(np.float64))
    probability /= probability.sum()
    count = int(np.searchsorted(np.cumsum(probability), top_p)) + 1
    return set(order[:count])


@pytest.mark.parametrize("top_k", [1, 2, 7, VOCAB - 1, VOCAB, 10 * VOCAB])
def test_top_k_keeps_the_likeliest(logits, top_k):
    for row, mask in zip(logits, kept(logits, top_k=top_k), strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row)[:top_k])


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_nucleus(logits, top_p):
    for row, mask in zip(logits, kept(logits, top_p=top_p), strict=True):
        assert set(np.flatnonzero(mask)) == nucleus(row, top_p)


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_keeps_a_share_of_the_likeliest(logits, min_p):
    probability = np.exp(logits - logits.max(axis=-1, keepdims=True))
    assert (kept(logits, min_p=min_p) == (probability >= min_p)).all()


def test_each_row_has_its_own_numbers(logits):
    numbers = {"top_k": np.array([1, 0, 3, 0, 5]), "top_p": np.array([1.0, 0.5, 1.0, 1.0, 0.5], np.float32)}
    together = kept(logits, **numbers)
    for i in range(len(logits)):
        alone = kept(logits[i : i + 1], **{name: values[i] for name, values in numbers.items()})
        assert (together[i] == alone[0]).all()
    assert together[3].all()
    assert together[0].sum() == 1


def test_extreme_logits_survive():
    row = np.array([[-np.inf, 0.0, -0.0, 1e30, -1e30, 1e-40]], np.float32)
    assert list(np.flatnonzero(kept(row, top_k=1)[0])) == [3]
    assert np.flatnonzero(kept(row, top_p=0.5)[0]).tolist() == [3]
    assert not kept(row, top_k=5)[0, 0]


def test_penalties_are_those_of_the_papers(logits):
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, logits.shape)
    seen = (counts > 0) | (rng.random(logits.shape) < 0.3)
    numbers = Sampling(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.copy()
    for b, v in np.ndindex(*logits.shape):
        if seen[b, v]:
            expected[b, v] = logits[b, v] / 1.3 if logits[b, v] > 0 else logits[b, v] * 1.3
        expected[b, v] -= 0.5 * (counts[b, v] > 0) + 0.25 * counts[b, v]
    np.testing.assert_allclose(penalize(jnp.asarray(logits), numbers, seen, counts), expected, rtol=1e-6, atol=1e-6)


def test_samples_follow_the_truncated_distribution(logits):
    """Chi-square against softmax over the tokens that stay, at the 0.1 % level."""
    num_draws = 20000
    row = np.repeat(logits[:1], num_draws, axis=0)
    numbers = Sampling(temperature=1.5, top_k=6)
    keys = jax.random.split(jax.random.key(0), num_draws)
    tokens = np.asarray(jax.jit(sample)(keys, row, numbers))
    best = np.argsort(-logits[0])[:6]
    probability = np.exp(logits[0][best] / 1.5)
    expected = num_draws * probability / probability.sum()
    observed = np.array([(tokens == token).sum() for token in best])
    assert observed.sum() == num_draws
    assert ((observed - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom


def test_temperature_zero_is_greedy_and_a_row_does_not_depend_on_the_others(logits):
    keys = jax.random.split(jax.random.key(0), 5)
    draw = jax.jit(sample)
    greedy = draw(keys, logits, Sampling(temperature=0.0, top_k=3))
    assert (greedy == logits.argmax(axis=-1)).all()
    mixed = draw(keys, logits, Sampling(temperature=np.array([0, 1, 1, 1, 0], np.float32)))
    assert mixed[0] == logits[0].argmax()
    other = logits.copy()
    other[[0, 1, 3, 4]] *= -1
    assert draw(keys, other, Sampling(temperature=np.array([0, 1, 1, 1, 0], np.float32)))[2] == mixed[2]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"temperature": float("inf")}, "temperature inf must be"),
        ({"top_k": -1}, "top_k -1 must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, "top_p 1.1 must be from 0 to 1"),
        ({"min_p": 2.0}, "min_p 2.0 must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan must be a finite number"),
    ],
)
def test_numbers_out_of_range(numbers, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(Sampling(**numbers))
