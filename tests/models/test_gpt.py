"""Properties of the decoder-only model."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.generation.engine import init_cache
from gptjax.models import init_params, make_model, model_arguments
from gptjax.models.attention import dot_product_attention

VARIANTS = [
    {},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1},
    {"norm": "rmsnorm", "use_bias": False},
    {"activation": "relu2", "tie_embeddings": False},
    {"activation": "gelu_exact", "head_dim": 16},
    {"scan_layers": True},
]


def name(variant):
    return ",".join(f"{key}={value}" for key, value in variant.items()) or "gpt2"


@pytest.fixture(scope="module", params=VARIANTS, ids=name)
def model_and_params(request, sizes):
    model = make_model("gpt", **(sizes | request.param))
    # Larger than at the start of training, so that attention is far from uniform.
    return model, jax.jit(lambda key: init_params(model, key, 5.0))(jax.random.key(0))


def tokens_of(sizes, batch_size=2, seed=0):
    return np.random.default_rng(seed).integers(0, sizes["vocab_size"], (batch_size, sizes["max_seq_len"]))


def test_causality_by_gradient(model_and_params, sizes):
    model, params = model_and_params
    tokens = tokens_of(sizes, 1)

    def outputs(nudge):
        def add_nudge(call, args, kwargs, context):
            is_input = context.module.name == "token_embedding" and context.method_name == "__call__"
            return call(*args, **kwargs) + nudge if is_input else call(*args, **kwargs)

        with nn.intercept_methods(add_nudge):
            return jnp.sum(jnp.sin(model.apply({"params": params}, tokens)[0]), axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(jnp.zeros((sizes["max_seq_len"], sizes["embed_dim"])))
    influence = np.abs(jacobian).max(axis=-1)  # [t, s]
    assert (influence[np.triu_indices_from(influence, 1)] == 0).all()
    assert (influence[np.tril_indices_from(influence)] > 0).all()


def test_packed_documents_do_not_see_each_other(model_and_params, sizes):
    model, params = model_and_params
    apply = jax.jit(lambda *a: model.apply({"params": params}, a[0], positions=a[1], segment_ids=a[2]))
    length = sizes["max_seq_len"]
    tokens = tokens_of(sizes, 1)
    first = 5
    segments = np.array([[1] * first + [2] * (length - first)])
    positions = np.concatenate([np.arange(first), np.arange(length - first)])[None]
    packed = apply(tokens, positions, segments)
    alone = apply(np.roll(tokens, -first, 1), np.roll(positions, -first, 1), np.roll(segments, -first, 1))
    np.testing.assert_allclose(packed[0, first:], alone[0, : length - first], atol=1e-4, rtol=1e-5)


def test_cached_decoding_equals_the_whole_forward_pass(model_and_params, sizes):
    model, params = model_and_params
    tokens = tokens_of(sizes)
    whole = jax.jit(lambda t: model.apply({"params": params}, t))(tokens)
    decode = jax.jit(lambda *a: model.apply({"params": params}, *a, method=model.decode))
    cache = init_cache(model, 2, sizes["max_seq_len"])
    prefix = 6
    positions = np.broadcast_to(np.arange(prefix), (2, prefix))
    logits, cache = decode(tokens[:, :prefix], positions, cache)
    np.testing.assert_allclose(logits, whole[:, :prefix], atol=1e-4, rtol=1e-5)
    for t in range(prefix, sizes["max_seq_len"]):
        logits, cache = decode(tokens[:, t : t + 1], np.full((2, 1), t), cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots", "scan_layers": True}], ids=name
)
def test_compile_choices_change_no_value(sizes, change):
    plain, other = make_model("gpt", **sizes), make_model("gpt", **(sizes | change))
    tokens = tokens_of(sizes)
    params = [jax.jit(lambda key, m=m: init_params(m, key))(jax.random.key(3)) for m in (plain, other)]
    assert jax.tree.structure(params[0]) == jax.tree.structure(params[1])
    jax.tree.map(np.testing.assert_array_equal, *params)

    def loss_and_gradient(model):
        rate = jnp.float32(0.2)
        return jax.jit(
            jax.value_and_grad(
                lambda p: jnp.mean(
                    model.apply({"params": p}, tokens, dropout_rate=rate, rngs={"dropout": jax.random.key(1)}) ** 2
                )
            )
        )(params[0])

    (loss, grads), (other_loss, other_grads) = loss_and_gradient(plain), loss_and_gradient(other)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
    # The gradient of a key bias is zero but for rounding, so no tensor is held to less than this.
    floor = 1e-3 * max(np.abs(g).max() for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(a).max(), floor)),
        grads,
        other_grads,
    )


def test_attention_equals_jax_own(sizes):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((16, 16), bool))[None, None]
    ours = jax.jit(dot_product_attention)(query, key, value, mask)
    theirs = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="xla")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((16, 16), bool))[None, None]
    grouped = jax.jit(dot_product_attention)(query, key, value, mask)
    repeated = jax.jit(dot_product_attention)(query, np.repeat(key, 2, 2), np.repeat(value, 2, 2), mask)
    np.testing.assert_allclose(grouped, repeated, atol=1e-5)


def test_initial_loss_is_that_of_guessing(sizes):
    model = make_model("gpt", **sizes)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    logits = jax.jit(lambda t: model.apply({"params": params}, t))(tokens_of(sizes, 8))
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens_of(sizes, 8, 1)[..., None], -1).mean()
    assert abs(nll - math.log(sizes["vocab_size"])) < 0.05


def test_dropout_rate_zero_equals_none_and_a_rate_keeps_the_mean(sizes):
    from gptjax.models.layers import dropout

    x = jnp.ones((200, 200))
    np.testing.assert_array_equal(dropout(x, jnp.float32(0), lambda: jax.random.key(0)), x)
    dropped = dropout(x, jnp.float32(0.25), lambda: jax.random.key(0))
    assert abs(float((dropped == 0).mean()) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.02


def test_init_scale_multiplies_weights_but_not_norms(sizes):
    model = make_model("gpt", **sizes)
    one, two = (init_params(model, jax.random.key(0), scale) for scale in (1.0, 2.0))
    np.testing.assert_allclose(two["blocks"]["mlp"]["up"]["kernel"], 2 * one["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(two["final_norm"]["scale"], one["final_norm"]["scale"])


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
