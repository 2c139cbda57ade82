"""Beam search finds what an exhaustive search finds; speculation changes how long a text takes, and not the text."""

import functools
import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from gptjax.generation.beam import beam_search
from gptjax.generation.engine import Engine, Request
from gptjax.generation.sampling import Sampling
from gptjax.generation.speculative import speculate
from gptjax.models import GPT, EncoderDecoder
from gptjax.models.config import TransformerConfig

SIZES = dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, embed_dim=16, mlp_dim=24)
GREEDY = Sampling(temperature=0.0)


@functools.cache
def make(vocab_size, family=GPT, seed=0, scale=6.0, **fields):
    """An engine whose model has preferences, and a function of texts [N, T] to logits [N, T, V]."""
    fields = {"max_seq_len": 64} | fields
    model = family(TransformerConfig(vocab_size=vocab_size, **SIZES, **fields))
    tokens = np.zeros((1, 8), np.int32)
    inputs = {"encoder_tokens": tokens} if family is EncoderDecoder else {}
    params = jax.jit(model.init)(jax.random.key(seed), tokens, **inputs)["params"]
    params = jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, params)
    run = jax.jit(lambda texts, **inputs: jax.nn.log_softmax(model.apply({"params": params}, texts, **inputs)))
    return Engine(model, params, num_slots=4), run


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("family", [GPT, EncoderDecoder])
def test_wide_beams_find_the_best_of_all_texts(family, length_penalty):
    vocab_size, longest, end = 5, 4, 2
    fields = {"num_encoder_layers": 1} if family is EncoderDecoder else {}
    engine, run = make(vocab_size, family, **fields)
    prompts = [np.array([1, 4, 3]), np.array([3])]
    sources = [np.array([2, 1, 0, 3]), np.array([4, 4])] if fields else None
    found = beam_search(
        engine,
        prompts,
        num_beams=vocab_size**longest,
        max_new_tokens=longest,
        eos_ids=[end],
        length_penalty=length_penalty,
        sources=sources,
    )
    for i, prompt in enumerate(prompts):
        # Every text that ends where it must: at the first end, or at the most tokens.
        texts = [t for n in range(1, longest + 1) for t in itertools.product(range(vocab_size), repeat=n)]
        texts = [t for t in texts if end not in t[:-1] and (t[-1] == end or len(t) == longest)]
        rows = np.zeros((len(texts), len(prompt) + longest), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(prompt) + len(text)] = [*prompt, *text]
        inputs = {"encoder_tokens": np.tile(sources[i], (len(rows), 1))} if fields else {}
        logprobs = np.asarray(run(rows, **inputs))
        places = len(prompt) - 1 + np.arange(longest)
        scores = {
            text: sum(logprobs[n, places[j], token] for j, token in enumerate(text)) / len(text) ** length_penalty
            for n, text in enumerate(texts)
        }
        expected = sorted(scores, key=scores.get, reverse=True)[:10]
        for text, (ids, score) in zip(expected, found[i], strict=False):
            assert tuple(ids) == (text[:-1] if text[-1] == end else text)
            np.testing.assert_allclose(score, scores[text], rtol=1e-4)


def test_one_beam_is_greedy():
    engine, _ = make(31)
    prompt = np.arange(7)
    ((ids, _),) = beam_search(engine, [prompt], num_beams=1, max_new_tokens=20, eos_ids=[])[0]
    (greedy,) = engine.generate([prompt], max_new_tokens=20, sampling=GREEDY)
    np.testing.assert_array_equal(ids, greedy)


@pytest.mark.parametrize("guesser", ["text", "itself", "other"])
def test_greedy_speculation_is_greedy(guesser):
    engine, _ = make(31, position="rotary")
    draft = {"text": None, "itself": engine, "other": make(31, seed=1, scale=3.0)[0]}[guesser]
    prompt = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    (greedy,) = engine.generate([prompt], max_new_tokens=30, sampling=GREEDY)
    found = speculate(engine, prompt, draft=draft, num_draft=3, max_new_tokens=30, sampling=GREEDY)
    np.testing.assert_array_equal(found.tokens, greedy)
    if guesser == "itself":
        assert found.passes == 8  # of every four tokens three are guessed, and none refused
    (end,) = greedy[-1:]
    found = speculate(engine, prompt, draft=draft, num_draft=3, max_new_tokens=30, eos_ids=[end], sampling=GREEDY)
    np.testing.assert_array_equal(found.tokens, greedy[: np.flatnonzero(greedy == end)[0]])


@pytest.mark.parametrize("guesser", ["text", "other", "none"])
def test_speculation_and_plain_sampling_have_the_distribution_of_the_model(guesser):
    """Chi-square over the first two tokens, against the probabilities that the whole forward pass gives."""
    vocab_size, draws = 5, 1500
    engine, run = make(vocab_size, scale=4.0)
    prompt = np.array([1, 2, 1, 2, 1])
    sampling = Sampling(temperature=1.2, top_k=4)
    expected = np.zeros((vocab_size, vocab_size))

    def kept(logprobs):
        logprobs = logprobs.astype(np.float64)
        scaled = np.where(logprobs >= np.sort(logprobs)[-4], logprobs / 1.2, -np.inf)
        return np.exp(scaled) / np.exp(scaled).sum()

    first = kept(np.asarray(run(prompt[None]))[0, -1])
    rows = np.array([[*prompt, token] for token in range(vocab_size)])
    for token, logprobs in enumerate(np.asarray(run(rows))[:, -1]):
        expected[token] = draws * first[token] * kept(logprobs)
    counts = np.zeros_like(expected)
    if guesser == "none":
        ids = [engine.submit(Request(prompt, 2, (), sampling, seed)) for seed in range(draws)]
        texts = {i: [] for i in ids}
        while engine.num_active or engine.num_waiting:
            for output in engine.step():
                texts[output.id] += output.tokens.tolist()
    else:
        draft = make(vocab_size, seed=1, scale=4.0)[0] if guesser == "other" else None
        texts = {
            seed: speculate(
                engine, prompt, draft=draft, num_draft=2, max_new_tokens=2, sampling=sampling, seed=seed
            ).tokens
            for seed in range(draws)
        }
    for text in texts.values():
        counts[tuple(text)] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3
    wrong = expected[possible][::-1]
    assert stats.chisquare(counts[possible], wrong).pvalue < 1e-3  # the test can tell


def test_bad_calls():
    engine, _ = make(31)
    one = np.array([1])
    with pytest.raises(ValueError, match=r"num_beams 0 and max_new_tokens 1 must be at least 1"):
        beam_search(engine, [one], num_beams=0, max_new_tokens=1, eos_ids=[])
    with pytest.raises(ValueError, match=r"length_penalty nan must be finite"):
        beam_search(engine, [one], num_beams=1, max_new_tokens=1, eos_ids=[], length_penalty=float("nan"))
    with pytest.raises(ValueError, match=r"the draft's vocab_size 5 must be the model's, 31"):
        speculate(engine, one, draft=make(5)[0], max_new_tokens=3)
    with pytest.raises(ValueError, match=r"repetition_penalty 1.2 does not go with speculation"):
        speculate(engine, one, max_new_tokens=3, sampling=Sampling(repetition_penalty=1.2))
    with pytest.raises(ValueError, match=r"the prompt has 60 tokens; the model's context holds 1 to 59"):
        speculate(engine, np.ones(60, np.int32), max_new_tokens=3)
