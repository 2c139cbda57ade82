"""Heads: what they give, that padding has no part in it, and which family may have which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import make_model
from gptjax.models.heads import pool
from tests.models.variants import draw_parameters

SIZES = dict(
    vocab_size=23, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, embed_dim=8, mlp_dim=8, max_seq_len=6
)
SHAPES = {
    "masked_lm": (2, 6, 23),
    "sequence_classification": (2, 3),
    "token_classification": (2, 6, 3),
    "span": (2, 6, 2),
    "embedding": (2, 8),
    "none": (2, 6, 8),
}
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 6))


@pytest.mark.parametrize("head", SHAPES)
def test_shapes_and_padding(head):
    """Tokens beyond a text's end change nothing before it, and neither does there being any."""
    model = make_model("bert", **SIZES, head=head, num_labels=3, pooling="mean")
    params = draw_parameters(model)
    apply = jax.jit(lambda tokens, segments: model.apply({"params": params}, tokens, segment_ids=segments))
    segments = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    y = apply(TOKENS, segments)
    assert y.shape == SHAPES[head]
    other = np.where(segments > 0, TOKENS, (TOKENS + 1) % 23)
    short = jax.jit(lambda tokens: model.apply({"params": params}, tokens))(TOKENS[:1, :4])
    if y.ndim == 2:
        np.testing.assert_allclose(apply(other, segments), y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(short[0], y[0], rtol=1e-4, atol=1e-5)
        assert np.abs(apply(other, np.ones_like(segments))[0] - y[0]).max() > 1e-3
    else:
        np.testing.assert_allclose(apply(other, segments)[segments > 0], y[segments > 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(short[0], y[0, :4], rtol=1e-4, atol=1e-5)


def test_pooling_leaves_padding_out():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    segments = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(pool(x, segments, "first"), x[:, 0])
    np.testing.assert_array_equal(pool(x, segments, "last"), jnp.stack([x[0, 1], x[1, 3]]))
    np.testing.assert_allclose(pool(x, segments, "mean"), jnp.stack([x[0, :2].mean(0), x[1].mean(0)]))
    packed = jnp.array([[1, 1, 2, 0], [1, 2, 2, 2]])
    ends = {"first": ((0, 2), (0, 1)), "last": ((1, 2), (0, 3))}
    for pooling, places in ends.items():
        expected = [[*x[row, list(places[row])], np.zeros(3)] for row in range(2)]
        np.testing.assert_array_equal(pool(x, packed, pooling, 3), np.array(expected))
    for pooling in ("last", "mean"):
        whole = pool(x, None, pooling)
        np.testing.assert_allclose(whole, pool(x, jnp.ones((2, 4), int), pooling))


def test_embeddings_have_length_one_and_a_gradient_even_of_nothing():
    model = make_model("bert", **SIZES, head="embedding", pooling="mean")
    params = draw_parameters(model)
    segments = jnp.array([[1, 1, 1, 0, 0, 0], [0] * 6])  # the second row is all padding

    @jax.jit
    def derive(params):
        def loss(params):
            y = model.apply({"params": params}, TOKENS, segment_ids=segments)
            return jnp.sum(y[:, 0]), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = derive(params)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), [1, 0], atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_masked_lm_has_a_bias_of_its_own():
    """Scores are transform . token embedding + bias, and the gradient of the bias is that of the scores."""
    model = make_model("bert", **SIZES, head="masked_lm", activation="relu")
    params = draw_parameters(model)
    assert params["head"]["bias"].shape == (23,) and "scores" not in params["head"]
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
    bias = np.arange(23.0, dtype=np.float32)
    head = params["head"]
    shifted = params | {"head": head | {"bias": head["bias"] + bias}}
    np.testing.assert_allclose(apply(shifted), apply(params) + bias, atol=1e-5)
    hidden = np.asarray(jax.jit(lambda: model.apply({"params": params}, TOKENS, method=model.hidden_states))())
    x = np.maximum(hidden @ head["transform"]["kernel"] + head["transform"]["bias"], 0)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * head["transform_norm"]["scale"] + head["transform_norm"]["bias"]
    scores = x @ params["token_embedding"]["embedding"].T + head["bias"]
    np.testing.assert_allclose(apply(params), scores, rtol=1e-4, atol=1e-4)


def test_the_pooler_speaks_for_the_first_token():
    model = make_model("bert", **SIZES, head="sequence_classification", pooler=True)
    params = draw_parameters(model)

    @jax.jit
    def outputs(params):
        def apply(method):
            return model.apply({"params": params}, TOKENS, method=method)

        return apply(model.hidden_states), apply(model.pooled), apply(None)

    hidden, found, labels = outputs(params)
    dense, last = params["pooler"]["dense"], params["head"]["labels"]
    pooled = np.tanh(hidden[:, 0] @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(found, pooled, atol=1e-5)
    np.testing.assert_allclose(labels, pooled @ last["kernel"] + last["bias"], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("bert", {}, "model.head 'language_model' is not for model.family 'bert'"),
        ("gpt", {"head": "masked_lm"}, "model.head 'masked_lm' is for model.family 'bert'"),
        ("gpt", {"pooler": True}, "model.pooler is for model.family 'bert'"),
        ("gpt", {"head": "embedding"}, "model.pooling 'first' is not for model.family 'gpt'"),
        ("gpt", {"num_encoder_layers": 1}, "model.num_encoder_layers 1 must be 0 for model.family 'gpt'"),
        ("encoder_decoder", {}, "model.num_encoder_layers 0 must be at least 1"),
        ("encoder_decoder", {"num_encoder_layers": 1, "head": "span"}, "model.head 'span' is not for"),
        ("bert", {"head": "none", "prefix_lm": True}, "model.prefix_lm is for model.family 'gpt'"),
        ("gtp", {}, "model.family 'gtp' is not one of gpt, bert, encoder_decoder"),
    ],
)
def test_what_a_family_has_no_use_for_is_refused(family, change, words):
    with pytest.raises(ValueError, match=words):
        make_model(family, **(SIZES | change))
