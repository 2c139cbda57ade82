"""Properties of all three families, over a table of variants that uses every field of the config."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation.decoding import init_cache
from gptjax.models import GPT, EncoderDecoder
from gptjax.models.config import TransformerConfig
from tests.models.variants import ALL, SIZES, VARIANTS, draw_parameters, model_of

POOLED = ("sequence_classification", "embedding")
DECODERS = [(f, n) for f, n in ALL if f != "bert" and VARIANTS[f][n].get("head") not in POOLED]
# Whose gradients are computed twice: between them, every way into a block, and every collection that a scan carries.
TWICE = [
    *(("gpt", name) for name in ("gpt_oss", "gemma2", "prefix_windows", "nanogpt_speedrun", "switch")),
    *(("bert", "bert"), ("bert", "relative"), ("encoder_decoder", "t5"), ("encoder_decoder", "rotary")),
]
UNORDERED = [("bert", name) for name in VARIANTS["bert"] if name.startswith("no_positions")]

# Row 0 is one document; row 1 holds two of five and two tokens, and padding.
T, S = 8, 6
SEGMENTS = np.array([[1] * 8, [1] * 5 + [2] * 2 + [0]])
POSITIONS = np.array([[*range(8)], [0, 1, 2, 3, 4, 0, 1, 0]])
PREFIX = np.array([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 0, 0]], bool)
SOURCE_SEGMENTS = np.array([[1] * 4 + [0] * 2, [1] * 3 + [2] * 3])
SOURCE_POSITIONS = np.array([[*range(4), 0, 0], [0, 1, 2, 0, 1, 2]])
NUDGES = {length: np.zeros((2, length, SIZES["embed_dim"]), np.float32) for length in (T, S)}


def inputs_of(model):
    rng = np.random.default_rng(1)
    inputs = {"tokens": rng.integers(0, 23, (2, T)), "positions": POSITIONS, "segment_ids": SEGMENTS}
    if model.config.prefix_lm:
        inputs["prefix"] = PREFIX
    if model.config.token_types:
        inputs["token_types"] = rng.integers(0, 2, (2, T))
    if isinstance(model, EncoderDecoder):
        inputs["encoder_tokens"] = rng.integers(0, 23, (2, S))
        inputs |= {"encoder_positions": SOURCE_POSITIONS, "encoder_segment_ids": SOURCE_SEGMENTS}
    return inputs


def outputs(model, params, nudges):
    """(one number for each place of the output, [B, T], the output), `nudges` added to the embedded tokens."""

    def nudged(call, args, kwargs, context):
        x = call(*args, **kwargs)
        is_input = context.module.name == "token_embedding" and context.method_name == "__call__"
        return x + nudges[x.shape[1]] if is_input else x

    with nn.intercept_methods(nudged):
        y = model.apply({"params": params}, **inputs_of(model))
    return jnp.sum(jnp.sin(y), axis=-1), y


@functools.cache
def probed(family, name):
    """(parameters, output, derivatives of each number of `outputs` by parameters and nudges)."""
    model = model_of(family, name)
    params = draw_parameters(model)

    @jax.jit
    def probe(params, nudges):
        numbers, pull, y = jax.vjp(functools.partial(outputs, model), params, nudges, has_aux=True)
        # Not vmap: a loop compiles faster.
        derivatives = jax.lax.map(pull, jnp.eye(numbers.size).reshape(-1, *numbers.shape))
        return y, jax.tree.map(lambda d: d.reshape(*numbers.shape, *d.shape[1:]), derivatives)

    return params, *jax.tree.map(np.asarray, probe(params, NUDGES))


def layer_masks(config, segments, prefix, causal, num_layers):
    """bool [B, T, T] for each layer, written from the definition."""
    t, s = np.arange(segments.shape[1])[:, None], np.arange(segments.shape[1])
    for layer in range(num_layers):
        windowed = config.window_pattern[layer % len(config.window_pattern)] == "W" and config.window
        mask = (s <= t) | (not causal)
        if windowed:
            mask &= abs(t - s) < config.window
        mask = np.broadcast_to(mask, (2, *mask.shape))
        if config.prefix_lm:
            mask = mask | prefix[:, None, :]
        yield mask & (segments[:, :, None] == segments[:, None, :])


def expected_influence(model):
    """bool [B, T, T] and [B, T, S]: which embedded tokens reach which place, through all layers."""
    config = model.config
    encoder = np.broadcast_to(np.eye(S, dtype=bool), (2, S, S))
    for mask in layer_masks(config, SOURCE_SEGMENTS, None, False, config.num_encoder_layers):
        encoder = mask @ encoder
    memory = (SEGMENTS[:, :, None] == SOURCE_SEGMENTS[:, None, :]) @ encoder
    own, source = np.broadcast_to(np.eye(T, dtype=bool), (2, T, T)), np.zeros((2, T, S), bool)
    for mask in layer_masks(config, SEGMENTS, PREFIX, isinstance(model, GPT | EncoderDecoder), config.num_layers):
        own, source = mask @ own, mask @ source | memory
    return own, source & (config.num_encoder_layers > 0)


@pytest.mark.parametrize(("family", "name"), ALL)
def test_each_place_depends_on_exactly_the_tokens_it_may_see(family, name):
    """Causality, both directions, prefixes, windows, documents, padding and rows, by gradient."""
    model = model_of(family, name)
    _, y, (_, nudges) = probed(family, name)
    assert np.isfinite(y).all()
    by_row = {n: np.abs(x).max(-1) > 0 for n, x in nudges.items()}  # [B, (T,) B, S]
    own, source = expected_influence(model)
    real = SEGMENTS > 0
    if model.config.head in POOLED:
        spokesmen = {"first": np.arange(T) == [[0], [0]], "last": np.arange(T) == [[7], [6]], "mean": real}
        speaks = spokesmen["first" if model.config.pooler else model.config.pooling]
        own, source = ((speaks[:, None, :] @ x) for x in (own, source))
        by_row = {n: x[:, None] for n, x in by_row.items()}
        real = np.ones((2, 1), bool)
    for row in range(2):
        np.testing.assert_array_equal(by_row[T][row][real[row], row], own[row][real[row]])
        np.testing.assert_array_equal(by_row[S][row][real[row], row], source[row][real[row]])
        assert not by_row[T][row][:, 1 - row].any() and not by_row[S][row][:, 1 - row].any()


def assert_close(a, b, tolerance=1e-5):
    """Each tensor agrees to `tolerance` of its largest entry, or of a tenth of the largest of all.

    The derivative by a key bias is zero but for rounding: it has no scale of its own.
    """
    floor = 0.1 * max(np.abs(x).max() for x in jax.tree.leaves(a))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(x).max(), floor)), a, b
    )


@pytest.mark.parametrize(("family", "name"), TWICE)
def test_scanned_and_rematerialised_is_the_same(family, name):
    """Values, and gradients by every parameter and input; the values of the other variants below."""
    params, y, derivatives = probed(family, name)
    remat = ("dots", "full")[TWICE.index((family, name)) % 2]
    other = model_of(family, name, scan_layers=True, remat=remat)
    weights = np.random.default_rng(2).normal(size=jax.tree.leaves(derivatives)[0].shape[: y.ndim - 1])
    weights = weights.astype(np.float32)

    @jax.jit
    def gradient(params, nudges):
        def weighted(params, nudges):
            numbers, y = outputs(other, params, nudges)
            return jnp.sum(numbers * weights), y

        return jax.grad(weighted, argnums=(0, 1), has_aux=True)(params, nudges)

    other_gradients, other_y = jax.tree.map(np.asarray, gradient(params, NUDGES))
    np.testing.assert_allclose(y, other_y, rtol=1e-5, atol=1e-5)
    assert_close(jax.tree.map(lambda d: np.tensordot(weights, d, weights.ndim), derivatives), other_gradients)


@pytest.mark.parametrize(("family", "name"), DECODERS)
def test_cached_decoding_scanned_is_the_whole_forward_pass_unrolled(family, name):
    model = model_of(family, name, scan_layers=True)
    params, whole, _ = probed(family, name)
    inputs, variables = inputs_of(model), {"params": params}
    fixed, first = {}, {}
    if isinstance(model, EncoderDecoder):
        first["memory"] = jax.jit(
            lambda t, p, s: model.apply(variables, t, positions=p, segment_ids=s, method=model.encode)
        )(inputs["encoder_tokens"], SOURCE_POSITIONS, SOURCE_SEGMENTS)
        fixed["encoder_segment_ids"] = np.where(SOURCE_SEGMENTS == 1, 1, 0)
    if model.config.prefix_lm:
        fixed["prefix_len"] = np.sum(PREFIX & (SEGMENTS == 1), axis=1)
    decode = jax.jit(lambda t, p, c, rest: model.apply(variables, t, p, c, **rest, method=model.decode))
    cache = init_cache(model, 2, T, S if first else 0)
    positions = np.broadcast_to(np.arange(T), (2, T))
    parts = []
    for start, rest in ((0, fixed | first), (4, fixed)):
        chunk = slice(start, start + 4)
        logits, cache = decode(inputs["tokens"][:, chunk], positions[:, chunk], cache, rest)
        parts.append(np.asarray(logits))
    cached = np.concatenate(parts, axis=1)
    one = SEGMENTS == 1  # the cache holds one document a row
    np.testing.assert_allclose(cached[one], whole[one], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), sorted(set(ALL) - set(DECODERS) - set(TWICE)))
def test_scanned_is_unrolled(family, name):
    model = model_of(family, name, scan_layers=True)
    params, y, _ = probed(family, name)
    scanned = jax.jit(lambda inputs: model.apply({"params": params}, **inputs))(inputs_of(model))
    np.testing.assert_allclose(scanned, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), UNORDERED)
def test_without_positions_tokens_are_a_set(family, name):
    """Reordering a document's tokens reorders its outputs, and changes none."""
    model = model_of(family, name)
    params, y, _ = probed(family, name)
    order = np.array([[3, 0, 7, 5, 1, 2, 6, 4], [4, 2, 0, 1, 3, 6, 5, 7]])
    inputs = inputs_of(model)
    for field in set(inputs) - {"positions"}:
        inputs[field] = np.take_along_axis(inputs[field], order, axis=1)
    moved = jax.jit(lambda inputs: model.apply({"params": params}, **inputs))(inputs)
    np.testing.assert_allclose(moved, np.take_along_axis(y, order[..., None], axis=1), rtol=1e-4, atol=1e-5)


def test_the_table_uses_every_field():
    """A field that no variant sets is a field that nothing above proves right."""
    used = {field for variants in VARIANTS.values() for variant in variants.values() for field in variant} | set(SIZES)
    elsewhere = {"num_encoder_layers", "scan_layers", "remat", "attention"}  # in this file, and in test_attention
    losses = {"balance_loss", "router_z_loss"}  # in test_experts
    numbers = {"rope_theta", "rope_low", "rope_high", "norm_epsilon", "attention_dropout", "dtype"}
    assert {f.name for f in dataclasses.fields(TransformerConfig)} - used - elsewhere - losses - numbers == set()
