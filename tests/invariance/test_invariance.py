"""The short form of the invariance suite, on four devices; the long form is `make verify PART=invariance`."""

import jax
import numpy as np
import pytest

from tests.invariance.checks import MODELS, Case, batch_of, compute, distance, meshes, met

SHORT = [
    Case(padded=True),
    Case(accumulation=4, changes=(("remat", "full"), ("attention", "blockwise"))),
    Case(changes=(("scan_layers", False), ("remat", "dots"), ("attention", "xla"))),
    # Every mesh, dropout on: its mask must be the row's on all of them.
    *(Case(mesh=mesh, dropout=True) for mesh in meshes("gpt", 4)),
    Case("llama", mesh=(1, 2, 2, 1, 1), changes=(("attention", "blockwise"), ("remat", "full"))),
    Case("alibi", mesh=(2, 1, 1, 2, 1), changes=(("attention", "blockwise"),)),
    Case("bert", mesh=(1, 2, 1, 2, 1), changes=(("attention", "xla"),)),
    Case("t5", mesh=(1, 1, 2, 2, 1), changes=(("attention", "jax"),)),
    Case("moe", mesh=(1, 1, 2, 1, 2), accumulation=2),
    Case(optimizer="adamw", mesh=(1, 2, 2, 1, 1), accumulation=2),
    Case("moe", optimizer="muon", mesh=(1, 4, 1, 1, 1)),
]
BFLOAT16 = [Case(mesh=(1, 2, 2, 1, 1), changes=(("dtype", "bfloat16"), ("attention", "xla")))]


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_the_same_whatever_the_way(case):
    found = distance(case)
    assert met(case, found), f"{case}: {found}"


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_is_bounded_and_the_same_bits_again(case):
    found = distance(case)
    assert met(case, found), f"{case}: {found}"
    first, again = compute(case), compute.__wrapped__(case)
    np.testing.assert_array_equal(first.losses, again.losses)
    jax.tree.map(np.testing.assert_array_equal, first.tensors, again.tensors)


@pytest.mark.parametrize("model", MODELS)
def test_shards_hold_uneven_counts_of_targets(model):
    weights = batch_of(model)["loss_weights"]
    assert weights[0].sum() == 0 and weights.sum() > 30
    assert weights[:2].sum() < 0.1 * weights.sum()  # the first of four shards
