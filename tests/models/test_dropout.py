"""Dropout's masks look independent: in a row, between rows and between keys, and are the same however they are computed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.distributed.mesh import make_mesh
from gptjax.models.dropout import dropout, keep_mask

SHAPE = (4, 128, 256)
KEYS = jax.vmap(jax.random.key)(jnp.arange(16))  # as much alike as keys can be


@pytest.fixture(scope="module", params=[0.1, 0.5])
def drawn(request):
    """(rate, entries that were dropped [keys, B, T, D] as numbers of mean 0 and deviation 1)."""
    rate = request.param
    masks = jax.jit(jax.vmap(lambda key: keep_mask(key, jnp.float32(rate), SHAPE)))(KEYS)
    return rate, (~np.asarray(masks) - rate) / (rate * (1 - rate)) ** 0.5


def correlation(one, other):
    """Of standardised numbers, in its own standard deviations: normal with deviation 1 where they are independent."""
    return float((one * other).sum() / np.sqrt(one.size))


def test_each_part_drops_its_share(drawn):
    """Sums over keys, over rows and over columns have the mean and the spread of independent draws."""
    for axes in ((1, 2, 3), (0, 3), (0, 1, 2), (0, 1, 3)):
        sums = drawn[1].sum(axes)
        sums /= np.sqrt(drawn[1].size / sums.size)
        assert abs(sums).max() < 5
        # The variance of n independent ones is 1, give or take sqrt(2 / n).
        assert abs((sums**2).mean() - 1) < 5 * (2 / sums.size) ** 0.5


def test_neighbours_are_not_correlated(drawn):
    x = drawn[1]
    for axis, lag in itertools.product((3, 2, 1), (1, 2, 3, 4, 8, 16, 32, 64, 128)):
        if lag < x.shape[axis]:
            one, other = np.split(x, [x.shape[axis] - lag], axis)[0], np.split(x, [lag], axis)[1]
            assert abs(correlation(one, other)) < 5, (axis, lag)


def test_keys_and_rows_share_nothing_at_any_shift(drawn):
    """The largest of all circular correlations between rows is what NumPy's generator gives; a shared row would give 16."""

    def largest(rows):
        spectrum = np.fft.rfft(rows)
        shifted = (np.fft.irfft(spectrum * np.roll(spectrum, shift, axis=0).conj()) for shift in range(1, len(rows)))
        return max(abs(at_all_shifts).max() for at_all_shifts in shifted) / np.sqrt(SHAPE[-1])

    rate, x = drawn
    rows = x[:2, 0].reshape(-1, SHAPE[-1])  # of two keys
    independent = (np.random.default_rng(0).random(rows.shape) < rate) - rate
    assert largest(rows) < 1.2 * largest(independent / (rate * (1 - rate)) ** 0.5)


def test_pairs_are_as_likely_as_their_parts(drawn):
    """Two and three places in a row: the chi-square of their patterns."""
    rate, x = drawn[0], drawn[1] > 0
    for width in (2, 3):
        patterns = sum(x[..., i : x.shape[-1] - width + 1 + i : width].astype(int) << i for i in range(width))
        counts = np.bincount(patterns.reshape(-1), minlength=2**width)
        share = [rate ** i.bit_count() * (1 - rate) ** (width - i.bit_count()) for i in range(2**width)]
        expected = counts.sum() * np.array(share)
        assert ((counts - expected) ** 2 / expected).sum() < 30  # 7 degrees of freedom: one in 10,000


def test_the_rest_is_scaled_and_rate_zero_changes_nothing():
    x = jnp.ones((200, 200))
    np.testing.assert_array_equal(dropout(x, jnp.float32(0), lambda: KEYS[0]), x)
    assert dropout(x, None, lambda: 1 / 0) is x
    dropped = np.asarray(dropout(x, jnp.float32(0.25), lambda: KEYS[0]))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(dropped.mean() - 1) < 0.02


def test_a_mask_does_not_depend_on_the_mesh_or_on_vmap():
    rate = jnp.float32(0.3)
    draw = jax.jit(keep_mask, static_argnums=2)
    alone = np.asarray(draw(KEYS[3], rate, SHAPE))
    mesh = make_mesh({"data": 2, "tensor": 2})
    over = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    sharded = jax.jit(keep_mask, static_argnums=2, out_shardings=over)(KEYS[3], rate, SHAPE)
    np.testing.assert_array_equal(sharded, alone)
    together = jax.jit(jax.vmap(lambda key: keep_mask(key, rate, SHAPE)))(KEYS)
    np.testing.assert_array_equal(together[3], alone)
