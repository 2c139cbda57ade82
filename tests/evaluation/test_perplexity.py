"""Evaluation equals the same sums taken in NumPy, whatever a batch holds."""

import jax
import numpy as np
import pytest

from gptjax.evaluation.perplexity import describe, evaluate
from gptjax.models import init_params, make_model
from gptjax.training.step import make_eval_step


def test_sums_over_batches_of_unequal_targets(sizes):
    model = make_model("gpt", **sizes)
    params = init_params(model, jax.random.key(0), 5.0)
    rng = np.random.default_rng(0)
    token_bytes = rng.integers(0, 5, sizes["vocab_size"]).astype(np.float32)
    batches = []
    for share in (0.2, 0.9):
        tokens = rng.integers(0, sizes["vocab_size"], (2, 4, 16), np.int32)
        weights = (rng.random((4, 16)) < share).astype(np.float32)
        batches.append({"inputs": tokens[0], "targets": tokens[1], "loss_weights": weights})
    for batch in batches:  # half of the targets are what the model says
        likeliest = np.asarray(model.apply({"params": params}, batch["inputs"])).argmax(-1)
        batch["targets"] = np.where(rng.random((4, 16)) < 0.5, likeliest, batch["targets"])
    [results] = evaluate(jax.jit(make_eval_step(model)), params, iter(batches), token_bytes, lambda batch: batch)

    nats, hits, num_bytes = [], [], 0.0
    for batch in batches:
        logits = np.asarray(model.apply({"params": params}, batch["inputs"]), np.float64)
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = batch["loss_weights"] > 0
        nats += (-np.log(np.take_along_axis(chances, batch["targets"][..., None], -1)[..., 0])[chosen]).tolist()
        hits += (logits.argmax(-1) == batch["targets"])[chosen].tolist()
        num_bytes += token_bytes[batch["targets"][chosen]].sum()
    assert results["eval/tokens"] == len(nats)
    assert results["eval/loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert results["eval/perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert results["eval/accuracy"] == pytest.approx(np.mean(hits))
    assert 0.3 < results["eval/accuracy"] < 0.8
    assert results["eval/bits_per_byte"] == pytest.approx(sum(nats) / np.log(2) / num_bytes, rel=1e-5)
    assert "bits a byte" in describe(results)


@pytest.mark.parametrize("token_bytes", [None, np.full(61, np.nan, np.float32)])
def test_no_bits_per_byte_where_bytes_are_unknown(token_bytes):
    sums = {"loss_sum": 6.0, "correct": 1.0, "tokens": 3.0}
    batch = {"targets": np.zeros((1, 3), np.int32), "loss_weights": np.ones((1, 3), np.float32)}
    [results] = evaluate(lambda *_: sums, {}, iter([batch]), token_bytes, lambda batch: batch)
    assert results == {"eval/loss": 2.0, "eval/perplexity": np.exp(2.0), "eval/accuracy": 1 / 3, "eval/tokens": 3.0}
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(lambda *_: dict.fromkeys(sums, 0.0), {}, iter([batch]), token_bytes, lambda batch: batch)
