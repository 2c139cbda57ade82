"""Properties of the decoder-only model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation.decoding import init_cache
from gptjax.models import init_params, make_model, model_arguments
from tests.models.variants import draw_parameters


def tokens_of(sizes, batch_size=2, seed=0):
    return np.random.default_rng(seed).integers(0, sizes["vocab_size"], (batch_size, sizes["max_seq_len"]))


def test_cached_decoding_one_token_at_a_time_is_the_whole_forward_pass(sizes):
    model = make_model("gpt", **sizes)
    params = draw_parameters(model)
    tokens = tokens_of(sizes)
    whole = jax.jit(lambda t: model.apply({"params": params}, t))(tokens)
    decode = jax.jit(lambda *a: model.apply({"params": params}, *a, method=model.decode))
    cache = init_cache(model, 2, sizes["max_seq_len"])
    prompt = 6
    positions = np.broadcast_to(np.arange(prompt), (2, prompt))
    logits, cache = decode(tokens[:, :prompt], positions, cache)
    np.testing.assert_allclose(logits, whole[:, :prompt], atol=1e-4, rtol=1e-5)
    for t in range(prompt, sizes["max_seq_len"]):
        logits, cache = decode(tokens[:, t : t + 1], np.full((2, 1), t), cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-4, rtol=1e-5)


def test_no_segments_are_one_segment(sizes):
    model = make_model("gpt", **sizes)
    params = draw_parameters(model)
    tokens = tokens_of(sizes)
    apply = jax.jit(lambda t, **inputs: model.apply({"params": params}, t, **inputs))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    told = apply(tokens, positions=positions, segment_ids=np.ones_like(tokens))
    np.testing.assert_allclose(apply(tokens), told, atol=1e-5)


def test_compile_choices_change_no_value(sizes):
    """Dropout included; test_properties has every variant, without it."""
    tokens, params = tokens_of(sizes), draw_parameters(make_model("gpt", **sizes))

    def loss_and_gradient(**change):
        model = make_model("gpt", **(sizes | change))

        def loss(params):
            rate, key = jnp.float32(0.2), {"dropout": jax.random.key(1)}
            return jnp.mean(model.apply({"params": params}, tokens, dropout_rate=rate, rngs=key) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    loss, grads = loss_and_gradient()
    # The gradient of a key bias is zero but for rounding, so no tensor is held to less than float32's, 1e-7 of the largest.
    floor = 1e-2 * max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for change in ({"scan_layers": True}, {"remat": "full"}, {"remat": "dots", "scan_layers": True}):
        other_loss, other_grads = loss_and_gradient(**change)
        np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(a).max(), floor)),
            grads,
            other_grads,
        )


def test_initial_loss_is_that_of_guessing(sizes):
    model = make_model("gpt", **sizes)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    logits = jax.jit(lambda t: model.apply({"params": params}, t))(tokens_of(sizes, 8))
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens_of(sizes, 8, 1)[..., None], -1).mean()
    assert abs(nll - math.log(sizes["vocab_size"])) < 0.05


def test_init_scale_multiplies_weights_but_not_norms(sizes):
    model = make_model("gpt", **sizes)
    draw = jax.jit(lambda scale: init_params(model, jax.random.key(0), scale))
    one, two = draw(1.0), draw(2.0)
    np.testing.assert_allclose(two["blocks"]["mlp"]["up"]["kernel"], 2 * one["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(two["final_norm"]["scale"], one["final_norm"]["scale"])
    # What writes to the residual stream starts smaller (Radford et al., 2019, section 2.3), and every layer differs.
    np.testing.assert_allclose(one["blocks"]["mlp"]["up"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(one["blocks"]["mlp"]["down"]["kernel"].std(), 0.02 / 6**0.5, rtol=0.05)
    assert np.abs(np.diff(one["blocks"]["mlp"]["up"]["kernel"], axis=0)).max() > 0.01


def test_a_residual_stream_that_starts_at_zero_is_the_embeddings(sizes):
    model = make_model("gpt", **sizes, residual_init="zero", position="none", head="none", norm="rmsnorm")
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    tokens = tokens_of(sizes)
    x = params["token_embedding"]["embedding"][tokens]
    hidden = jax.jit(lambda t: model.apply({"params": params}, t))(tokens)
    np.testing.assert_allclose(hidden, x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5), rtol=1e-4, atol=1e-5)


def test_model_arguments_round_trip(sizes):
    model = make_model("gpt", **sizes)
    assert make_model(**model_arguments(model)) == model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "model.num_layers 0 must be at least 1"),
        ({"num_kv_heads": 3}, "model.num_heads 4 is not divisible by model.num_kv_heads 3"),
        ({"activation": "silly"}, "model.activation 'silly' is not one of"),
        ({"dtype": "float16"}, "model.dtype 'float16' is not one of float32, bfloat16"),
    ],
)
def test_bad_sizes_are_refused(sizes, change, words):
    with pytest.raises(ValueError, match=words):
        make_model("gpt", **(sizes | change))


def test_bfloat16_stays_close_to_float32(sizes):
    model = make_model("gpt", **sizes)
    half = type(model)(dataclasses.replace(model.config, dtype="bfloat16"))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    tokens = tokens_of(sizes)
    full, low = (jax.jit(lambda t, m=m: m.apply({"params": params}, t))(tokens) for m in (model, half))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low, full, atol=0.02)
