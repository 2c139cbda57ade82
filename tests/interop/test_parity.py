"""Our models on Hugging Face weights compute what Transformers computes: golden files made by tests/goldens/make.py."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gptjax.generation.engine import generate
from gptjax.generation.sampling import Sampling
from gptjax.interop import huggingface
from gptjax.models import BERT, EncoderDecoder
from gptjax.training.losses import cross_entropy
from tests.goldens.weights import draw_weights, some_entries

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CASES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
MINILM_POOLING = {"word_embedding_dimension": 30, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each golden model, read from a folder of its weights once."""
    cache = {}

    def load(name):
        if name not in cache:
            golden = dict(np.load(GOLDENS / f"{name}.npz"))
            folder = tmp_path_factory.mktemp(name)
            write_folder(folder, name, golden)
            cache[name] = (golden, *huggingface.read(folder))
        return cache[name]

    return load


def write_folder(folder, name, golden):
    (folder / "config.json").write_text(str(golden["config"]))
    weights = draw_weights(json.loads(str(golden["shapes"])))
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "minilm":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(MINILM_POOLING))


def loss_of(logits, targets):
    """The mean over targets that are not -100."""
    weights = (targets != -100).astype(jnp.float32)
    return cross_entropy(logits, jnp.where(targets == -100, 0, targets), weights)[0] / jnp.sum(weights)


def forward(name, model, params, golden):
    """What a golden file stores of a model: its outputs and its loss."""
    tokens, mask, targets = (
        jnp.asarray(golden[key]) if key in golden else None for key in ("tokens", "mask", "targets")
    )
    variables = {"params": params}
    if isinstance(model, EncoderDecoder):
        shifted = jnp.pad(jnp.maximum(targets, 0), [(0, 0), (1, 0)])[:, :-1]
        logits = model.apply(variables, shifted, encoder_tokens=tokens, encoder_segment_ids=mask)
        return logits, loss_of(logits, targets)
    if not isinstance(model, BERT):
        logits = model.apply(variables, tokens, segment_ids=mask)
        return logits, loss_of(logits[:, :-1], targets[:, 1:])
    inputs = {"segment_ids": mask, "token_types": jnp.asarray(golden["token_types"])}
    if name == "bert":
        pooled = model.apply(variables, tokens, **inputs, method=model.pooled)
        return pooled, jnp.mean(jnp.square(pooled))
    outputs = model.apply(variables, tokens, **inputs)
    if name == "minilm":
        return outputs, outputs[0] @ outputs[1]
    if name == "bert_regression":
        return outputs, jnp.mean(jnp.square(outputs[:, 0] - targets))
    if name == "bert_classes":
        return outputs, loss_of(outputs[None], targets[None])
    if name == "bert_span":
        return outputs, (loss_of(outputs[None, ..., 0], targets[:1]) + loss_of(outputs[None, ..., 1], targets[1:])) / 2
    return outputs, loss_of(outputs, targets)


@pytest.mark.parametrize("name", CASES)
def test_outputs_loss_and_gradients_are_those_of_transformers(loaded, name, tmp_path):
    golden, model, params = loaded(name)

    @jax.jit
    def both(params):
        def loss_and_outputs(params):
            outputs, loss = forward(name, model, params, golden)
            return loss, outputs

        return jax.value_and_grad(loss_and_outputs, has_aux=True)(params)

    (loss, outputs), grads = both(params)
    expected = golden["outputs"]
    if expected.ndim == 3:
        outputs = outputs[:, -expected.shape[1] :]
        real = golden["mask"][:, -expected.shape[1] :] > 0 if not isinstance(model, EncoderDecoder) else ...
        outputs, expected = outputs[real], expected[real]
    np.testing.assert_allclose(outputs, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5, rtol=0)

    # Regrouping is linear, so a folder of gradients is written as one of weights is.
    huggingface.write(tmp_path, model, grads)
    ours = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    names = json.loads(str(golden["gradient_names"]))
    assert set(names) <= set(ours)
    start = 0
    # What a softmax does not see, as a bias of keys, has a gradient of rounding errors alone, on both sides.
    nothing = 1e-6 * golden["gradient_sizes"].max()
    for key, size in zip(names, golden["gradient_sizes"], strict=True):
        entries = some_entries(key, ours[key].size)
        stored = golden["gradients"][start : start + len(entries)]
        start += len(entries)
        if size <= nothing:
            assert np.abs(ours[key]).max() <= nothing, key
        else:
            difference = np.abs(ours[key].ravel()[entries] - stored).max()
            assert difference <= 1e-4 * size, (key, difference, size)
    assert start == len(golden["gradients"])


@pytest.mark.parametrize("name", [name for name in CASES if "greedy" in np.load(GOLDENS / f"{name}.npz")])
def test_greedy_tokens_are_those_of_transformers(loaded, name):
    golden, model, params = loaded(name)
    tokens = golden["tokens"][0].astype(np.int32)
    if isinstance(model, EncoderDecoder):
        texts = {"prompts": [np.zeros(1, np.int32)], "sources": [tokens]}
    else:
        texts = {"prompts": [tokens[:7]]}
    (ids,) = generate(model, params, **texts, max_new_tokens=64, eos_ids=(), sampling=Sampling(temperature=0.0))
    np.testing.assert_array_equal(ids, golden["greedy"])


@pytest.mark.parametrize("name", CASES)
def test_ours_to_theirs_and_back_is_bit_identical(loaded, name, tmp_path):
    golden, model, params = loaded(name)
    huggingface.write(tmp_path, model, params)
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    weights = draw_weights(json.loads(str(golden["shapes"])))
    assert written.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)

    again, params_again = huggingface.read(tmp_path)
    assert again.config.windows == model.config.windows
    same_window = {"window": model.config.window, "window_pattern": model.config.window_pattern}
    assert dataclasses.replace(again.config, **same_window) == model.config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
