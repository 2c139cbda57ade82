"""Log-likelihoods equal those of one text at a time, whatever the batch, in at most 8 programs."""

import itertools

import jax
import numpy as np
import pytest

from gptjax.data.tokenizers import build_tokenizer
from gptjax.evaluation import likelihood
from gptjax.evaluation.likelihood import Request, encode_request, log_likelihoods, windows
from gptjax.models import init_params, make_model


@pytest.fixture(scope="module")
def model(sizes):
    model = make_model("gpt", **sizes | {"max_seq_len": 48, "num_layers": 1})
    return model, init_params(model, jax.random.key(0), 5.0)


def alone(model, params, context, continuation):
    """The same of one text, unpadded, in NumPy."""
    text = np.concatenate([context, continuation]).astype(np.int32)
    logits = np.asarray(model.apply({"params": params}, text[None, :-1]), np.float64)[0, len(context) - 1 :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(len(continuation)), continuation], logits.argmax(-1) == continuation


def test_equals_one_at_a_time(model):
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 61, n), rng.integers(0, 61, m)) for n, m in [(1, 1), (5, 3), (40, 8), (1, 47), (20, 1)]
    ]
    requests.append(Request(rng.integers(0, 61, 60), rng.integers(0, 61, 5)))  # longer than the context
    for request, score in zip(requests, log_likelihoods(*model, requests), strict=True):
        cut = request.context[-(49 - len(request.continuation)) :]
        log_probs, hits = alone(*model, cut, request.continuation)
        np.testing.assert_allclose(score.log_probs, log_probs, atol=2e-5)
        np.testing.assert_array_equal(score.hits, hits)
        assert score.is_cut == (len(cut) < len(request.context))


@pytest.mark.parametrize("max_seq_len", [48, 1024, 8192])
def test_thousand_prompts_in_eight_programs(sizes, max_seq_len, monkeypatch):
    rng = np.random.default_rng(1)
    model = make_model("gpt", **sizes | {"max_seq_len": max_seq_len, "num_layers": 1})
    shapes = []

    def score(model, params, inputs, targets, context):
        shapes.append(inputs.shape)
        return targets.astype(np.float32), targets > 30

    lengths = np.exp(rng.uniform(np.log(2), np.log(max_seq_len + 1), 1000)).astype(int)
    requests = [Request(rng.integers(0, 61, n - 1), rng.integers(0, 61, 1)) for n in lengths]
    monkeypatch.setattr(likelihood, "_score", score)
    scores = log_likelihoods(model, {}, requests)
    assert [int(s.log_probs[0]) for s in scores] == [int(r.continuation[0]) for r in requests]
    assert len(set(shapes)) <= 8 and max(np.prod(s) for s in shapes) <= max(2048, max_seq_len)
    assert sum(np.prod(s) for s in shapes) < 3 * sum(lengths) + 8 * 2048 + 16 * 1000


def test_programs_compiled(model):
    rng = np.random.default_rng(2)
    before = likelihood._score._cache_size()
    for _ in range(3):
        requests = [Request(rng.integers(0, 61, n), rng.integers(0, 61, 2)) for n in rng.integers(1, 47, 300)]
        log_likelihoods(*model, requests)
    assert likelihood._score._cache_size() - before <= 3  # 16, 32 and 48 tokens


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (40, 7)])
def test_windows_score_each_token_once(length, stride):
    tokens, start = np.arange(100, 133), np.array([7])
    requests = list(windows(tokens, start, length, stride))
    assert list(itertools.chain(*(r.continuation for r in requests))) == list(tokens)
    text = [7, *tokens]
    for index, (context, continuation) in enumerate(requests):
        at = text.index(continuation[0])
        assert list(context) == text[at - len(context) : at] and len(context) + len(continuation) - 1 <= length
        if index:
            assert len(context) == min(at, length + 1 - len(continuation))
    with pytest.raises(ValueError, match="stride 9 must be from 1 to 8"):
        next(windows(tokens, start, 8, 9))


def test_context_and_continuation_are_encoded_as_one():
    texts = ["the cat sat on the mat the cat", "the dog sat on the log"] * 4
    tokenizer = build_tokenizer("bpe", documents=lambda: iter(texts), vocab_size=290)
    cases = [("the cat", " sat"), ("the cat ", "sat"), ("the c", "at"), ("", "the cat"), (" ", "x")]
    contexts = ["the cat", "the cat", "the", None, None]
    for (context, continuation), kept in zip(cases, contexts, strict=True):
        request = encode_request(tokenizer, context, continuation)
        assert tokenizer.decode(np.concatenate(request)) == context + continuation and len(request.continuation)
        if kept is None:
            assert list(request.context) == [tokenizer.eos_id]
        else:
            assert tokenizer.decode(request.context) == kept


def test_bad_requests(model, sizes):
    one = np.ones(1, np.int32)
    for request in [(one, one[:0]), (one[:0], one), (one, np.ones(49, np.int32))]:
        with pytest.raises(ValueError, match="request 1 continues"):
            log_likelihoods(*model, [Request(one, one), Request(*request)])
    bert = make_model("bert", **sizes | {"head": "masked_lm"})
    with pytest.raises(ValueError, match="this is a BERT with 'masked_lm'"):
        log_likelihoods(bert, {}, [Request(one, one)])
