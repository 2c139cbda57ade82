"""Positions: rotary depends on distance alone, ALiBi and T5's buckets are the published ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import make_model
from gptjax.models.positions import Rope, alibi_bias, alibi_slopes, relative_bucket, sinusoidal

ROPES = {
    "none": Rope(100.0),
    "linear": Rope(100.0, "linear", 4.0),
    "llama3": Rope(100.0, "llama3", 4.0, 64, 1.0, 4.0),
    "yarn": Rope(100.0, "yarn", 4.0, 64, 1.0, 32.0),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rotary_depends_only_on_relative_position(rope):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(at, other):
        turned = [rope.rotate(x, jnp.full((1, 1), place)) for x, place in ((query, at), (key, other))]
        return float(jnp.sum(turned[0] * turned[1]))

    scores = [score(at, at - 5) for at in (5, 6, 40, 1000)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-3)
    assert abs(score(6, 0) - scores[0]) > 1e-3
    at_once = rope.rotate(np.repeat(query, 3, axis=1), jnp.array([[5, 6, 40]]))
    one = rope.rotate(query, jnp.full((1, 1), 40))
    np.testing.assert_allclose(at_once[:, 2:], one, rtol=1e-6)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_scaled_rotary_lengthens_what_the_papers_lengthen(rope):
    plain = ROPES["none"].inverse_wavelengths(64)
    ratio = plain / rope.inverse_wavelengths(64)
    turns = 64 * plain / (2 * math.pi)  # within the context of pretraining
    if rope.scaling == "none":
        np.testing.assert_array_equal(ratio, 1)
    if rope.scaling == "linear":
        np.testing.assert_allclose(ratio, 4, rtol=1e-6)
    if rope.scaling == "llama3":  # kept above 4 turns, divided below 1, between them the mean of both by turns
        kept = np.clip((turns - 1) / 3, 0, 1)
        np.testing.assert_allclose(1 / ratio, kept + (1 - kept) / 4, rtol=1e-5)
        assert ratio[0] == 1 and ratio[-1] == 4
    if rope.scaling == "yarn":
        assert (np.diff(ratio) >= 0).all() and ratio[0] == 1
        np.testing.assert_allclose(ratio[turns < 0.9], 4, rtol=1e-6)
        assert rope.amplitude == pytest.approx(1 + 0.1 * math.log(4))
        length = jnp.linalg.norm(rope.rotate(jnp.ones((1, 1, 1, 64)), jnp.array([[17]])))
        np.testing.assert_allclose(length, 8 * rope.amplitude, rtol=1e-5)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:2], [2**-0.5, 2**-1])
    # 12 heads: those of 8, then every other of 16.
    np.testing.assert_allclose(alibi_slopes(12), [2.0**-n for n in range(1, 9)] + [2 ** -(n / 2) for n in (1, 3, 5, 7)])
    assert alibi_slopes(1) == 2**-8
    bias = alibi_bias(8)(jnp.array([[5]]), jnp.array([[2, 5, 7]]))
    np.testing.assert_allclose(bias[0, 1, 0], [-0.25 * 3, 0, -0.25 * 2])


def test_relative_buckets_are_t5s():
    """Against the published rule, written with whole numbers: bucket b starts where a logarithm reaches it."""
    for num_buckets, max_distance, bidirectional in ((32, 128, True), (32, 128, False), (8, 20, True), (6, 6, False)):
        distance = np.arange(-300, 301)
        found = jax.jit(
            lambda d, b=bidirectional, n=num_buckets, m=max_distance: relative_bucket(
                d, bidirectional=b, num_buckets=n, max_distance=m
            )
        )(distance)
        half = num_buckets // 2 if bidirectional else num_buckets
        exact = half // 2
        for d, bucket in zip(distance.tolist(), np.asarray(found).tolist(), strict=True):
            size = abs(d) if bidirectional else max(-d, 0)
            if size < exact:
                expected = size
            else:  # the greatest step with exact * (max_distance / exact) ** (step / steps) <= size
                steps = half - exact
                reached = (s for s in range(steps) if exact ** (steps - s) * max_distance**s <= size**steps)
                expected = exact + max(reached)
            assert bucket == expected + (half if bidirectional and d > 0 else 0), (d, num_buckets, max_distance)


def test_sinusoidal_is_the_papers():
    angles = sinusoidal(jnp.array([[3]]), 6)[0, 0]
    expected = [f(3 / 10000 ** (2 * i / 6)) for f in (math.sin, math.cos) for i in range(3)]
    np.testing.assert_allclose(angles, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": "rotary", "head_dim": 7}, "model.head_dim 7 must be even"),
        ({"rope_theta": 0.0}, "model.rope_theta 0.0 and rope_factor 1.0 must be above 0"),
        ({"rope_scaling": "yarn"}, "model.rope_original_len 0 must be at least 1"),
        ({"rope_scaling": "llama3", "rope_original_len": 8, "rope_low": 4.0}, "model.rope_high 4.0 must be above"),
        ({"position": "relative", "relative_buckets": 2}, "model.relative_buckets 2 must be at least 4"),
        ({"position": "relative", "relative_max_distance": 16}, "below twice model.relative_max_distance 16"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(sizes, change, words):
    with pytest.raises(ValueError, match=words):
        make_model("gpt", **(sizes | change))


def test_more_tokens_than_learned_positions_are_refused(sizes):
    model = make_model("gpt", **sizes)
    with pytest.raises(ValueError, match=r"17 tokens are more than model"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 17), jnp.int32)))
