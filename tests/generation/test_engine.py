"""The engine writes what the whole forward pass would, whoever else is in the batch, in programs that are known before."""

import functools

import jax
import numpy as np
import pytest

from gptjax.evaluation.likelihood import Request as Scored
from gptjax.evaluation.likelihood import log_likelihoods
from gptjax.generation import engine as engines
from gptjax.generation.beam import beam_search
from gptjax.generation.engine import Engine, Request, num_compiles
from gptjax.generation.sampling import Sampling
from gptjax.generation.speculative import speculate
from gptjax.models import GPT, EncoderDecoder
from gptjax.models.config import TransformerConfig

V = 97
SIZES = dict(vocab_size=V, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, embed_dim=32, mlp_dim=48)
GREEDY = Sampling(temperature=0.0)
KINDS = {
    "rotary with windows": (
        GPT,
        dict(max_seq_len=400, position="rotary", norm="rmsnorm", window=9, window_pattern="WG"),
    ),
    "learned positions": (GPT, dict(max_seq_len=300)),
    "encoder-decoder": (EncoderDecoder, dict(max_seq_len=100, num_encoder_layers=2, position="relative")),
}


@functools.cache
def make(kind):
    """(model, parameters large enough that texts differ, the next token's logits after a text)."""
    family, fields = KINDS[kind]
    model = family(TransformerConfig(**SIZES, **fields))
    tokens = np.zeros((1, 8), np.int32)
    inputs = {"encoder_tokens": tokens} if family is EncoderDecoder else {}
    params = jax.jit(model.init)(jax.random.key(0), tokens, **inputs)["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 or x.shape[0] == V else x, params)
    length = model.config.max_seq_len

    @jax.jit
    def rows(text, source):
        if source is not None:
            segments = (source >= 0).astype("int32")
            source = jax.numpy.maximum(source, 0)
            return model.apply({"params": params}, text, encoder_tokens=source, encoder_segment_ids=segments)
        return model.apply({"params": params}, text)

    def next_logits(ids, source=None):
        text = np.zeros((1, length), np.int32)
        text[0, : len(ids)] = ids
        if source is not None:
            source = np.concatenate([source, np.full(length - len(source), -1)])[None]
        return np.asarray(rows(text, source)[0, len(ids) - 1])

    return model, params, next_logits


def draw(kind, seed, longest):
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, V, rng.integers(1, longest + 1))
    return prompt, rng.integers(0, V, rng.integers(1, 90)) if kind == "encoder-decoder" else None


def finish(engine, max_tokens=16):
    """All outputs, by id: (tokens, the last output)."""
    texts = {}
    while engine.num_active or engine.num_waiting:
        for output in engine.step(max_tokens):
            texts[output.id] = ([*texts.get(output.id, ([],))[0], *output.tokens.tolist()], output)
    return texts


@pytest.mark.parametrize("grows", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_the_whole_forward_pass(kind, grows):
    """Short and long prompts together, more than there are slots; texts that outgrow windows and rungs of the ladder."""
    model, params, next_logits = make(kind)
    engine = Engine(model, params, num_slots=3, grows=grows)
    lengths = (5, 5, 60) if kind == "encoder-decoder" else (5, 5, 63, 200, 270)
    requests = {}
    for seed, longest in enumerate(lengths):
        prompt, source = draw(kind, seed, longest)
        if longest > 100:
            prompt = np.random.default_rng(seed).integers(0, V, longest)
        requests[engine.submit(Request(prompt, 25, (), GREEDY, source=source))] = (prompt, source)
    for text_id, (new, output) in finish(engine).items():
        prompt, source = requests[text_id]
        assert output.finish_reason == "length" and len(new) == 25
        ids = [*prompt]
        for token in new:
            logits = next_logits(ids, source)
            assert logits[token] >= logits.max() - 1e-3  # not argmax alone: rounding may decide a tie
            ids.append(token)


def test_a_text_does_not_depend_on_who_else_is_there():
    model, params, _ = make("rotary with windows")
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2)
    request = Request(np.arange(7), 40, (), sampling, seed=5, logprobs=True)

    def text_among(others):
        engine = Engine(model, params, num_slots=4)
        for i in range(2):  # two from the start, so that the batch has all its slots
            engine.submit(Request(np.arange(3 + i), 90, (), GREEDY))
        engine.step(4)
        mine = engine.submit(request)
        for i in range(others):
            engine.submit(Request(np.arange(9 + i), 11 * (i + 1), (), Sampling(temperature=2.0), seed=i))
        logprobs = []
        while engine.num_active or engine.num_waiting:
            logprobs += [output.logprobs for output in engine.step(7) if output.id == mine]
        return np.concatenate(logprobs)

    alone, crowded = text_among(0), text_among(5)
    assert len(alone) == 40
    np.testing.assert_array_equal(alone, crowded)


def test_nothing_compiles_after_warm_up():
    model, params, _ = make("learned positions")
    engine = Engine(model, params, num_slots=12, cache_len=290)  # batches of 1, 8 and 12
    engine.warm_up()
    before = num_compiles()
    rng = np.random.default_rng(0)
    for i in range(40):
        sampling = Sampling(*rng.choice([0.0, 0.7, 1.5], 1), int(rng.integers(0, 9)), 0.9, 0.01 * i, 1 + 0.1 * i)
        bias = {3: 2.0} if i % 5 == 0 else None
        prompt = rng.integers(0, V, rng.integers(1, 289))
        engine.submit(Request(prompt, int(rng.integers(1, 60)), (7,), sampling, i, None, bias, i % 3 == 0))
        for _ in range(rng.integers(0, 4) if i < 20 else 0):
            engine.step(int(rng.integers(1, 30)))
        if i % 6 == 0:
            engine.cancel(i)
    while engine.num_active <= 8:
        engine.step(1)
    finish(engine)
    assert num_compiles() == before


def test_logprobs_are_those_of_the_model():
    model, params, next_logits = make("learned positions")
    engine = Engine(model, params, num_slots=1)
    engine.submit(Request(np.arange(4), 6, (), Sampling(temperature=0.5), logprobs=True))
    (output,) = engine.step()
    ids = [0, 1, 2, 3]
    for i, token in enumerate(output.tokens):
        logprobs = np.asarray(jax.nn.log_softmax(next_logits(ids)))
        np.testing.assert_allclose(output.logprobs[i], logprobs[token], atol=1e-4)
        np.testing.assert_allclose(
            output.top_logprobs[i], np.sort(logprobs)[: -engines.decoding.NUM_TOP - 1 : -1], atol=1e-4
        )
        np.testing.assert_allclose(logprobs[output.top_ids[i]], output.top_logprobs[i], atol=1e-4)
        ids.append(token)


def test_ends():
    """At an end token, at the most tokens, at the end of the context, and not at all for one that is cancelled."""
    model, params, next_logits = make("learned positions")
    engine = Engine(model, params, num_slots=4, cache_len=40)
    first = int(next_logits([1, 2]).argmax())
    stop = engine.submit(Request(np.array([1, 2]), 30, (5, first), GREEDY))
    length = engine.submit(Request(np.array([1, 2]), 3, (), GREEDY))
    context = engine.submit(Request(np.arange(38), 30, (), GREEDY))
    cancelled = engine.submit(Request(np.array([5]), 30, (), GREEDY))
    waiting = engine.submit(Request(np.array([6]), 5, (), GREEDY))
    (stopped,) = (output for output in engine.step(1) if output.finish_reason)
    assert stopped.id == stop and stopped.finish_reason == "stop" and len(stopped.tokens) == 0
    engine.cancel(cancelled)
    texts = finish(engine, 4)
    assert len(texts[length][0]) == 2  # and the one of the first step
    assert len(texts[context][0]) + 1 + 38 == 41  # the last token needs no room in the cache
    assert cancelled not in texts
    assert len(texts[waiting][0]) == 5


def test_bias_and_constraint_forbid_and_force():
    model, params, _ = make("learned positions")
    engine = Engine(model, params, num_slots=2)

    class Alternate:
        """3 and 4 in turn."""

        turn = 0

        def allowed(self):
            return np.arange(V) == 3 + self.turn

        def advance(self, token):
            assert token == 3 + self.turn
            self.turn = 1 - self.turn

    forced = engine.submit(Request(np.arange(4), 5, (), Sampling(), constraint=Alternate()))
    biased = engine.submit(Request(np.arange(4), 5, (), Sampling(), logit_bias={11: 1e4}))
    texts = finish(engine)
    assert texts[forced][0] == [3, 4, 3, 4, 3]
    assert texts[biased][0] == [11] * 5


@pytest.mark.parametrize(("weights", "error"), [("bfloat16", 0.03), ("int8", 0.03), ("int4", 0.25)])
def test_narrow_weights_are_the_product_with_what_they_stand_for(weights, error):
    """One row, few rows and many, which are computed in different ways."""
    from gptjax.models.narrow import product, quantize, widen

    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 22, 40)).astype(np.float32)  # [H, K, D]; its inputs fill no whole groups
    if weights == "bfloat16":
        narrow = jax.numpy.asarray(kernel, weights)
        meant = narrow.astype(np.float32)
    else:
        narrow = quantize(kernel, 2, weights)
        meant = narrow.values * narrow.scale if weights == "int8" else widen(narrow, (4, 22))
    assert np.abs(meant - kernel).max() < error
    for batch, length in ((1, 1), (3, 1), (2, 9)):
        x = rng.standard_normal((batch, length, 4, 22)).astype(np.float32)
        y = jax.jit(product, static_argnums=0)("bthk,hkd->btd", x, narrow)
        np.testing.assert_allclose(y, np.einsum("bthk,hkd->btd", x, meant), atol=0.2 if weights == "bfloat16" else 1e-3)


def test_generation_goes_on_past_the_context():
    model, params, next_logits = make("learned positions")
    engine = Engine(model, params, num_slots=1, cache_len=20)
    (new,) = engine.generate([np.arange(4)], max_new_tokens=40, sampling=GREEDY)
    assert len(new) == 40
    text = [*range(4), *new]
    assert new[16] == next_logits(text[:20]).argmax()  # the last token that the whole context decides
    assert new[17] == next_logits(text[11:21]).argmax()  # the later half, read again


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompt=np.zeros(0, np.int32)), "the prompt has 0 tokens; the model's context holds 1 to 300"),
        (dict(prompt=np.zeros(301, np.int32)), "the prompt has 301 tokens"),
        (dict(prompt=np.array([97])), "the prompt holds token id 97; the vocabulary's are 0 to 96"),
        (dict(max_new_tokens=0), "max_new_tokens 0 must be at least 1"),
        (dict(seed=-1), "seed -1 must be from 0 to"),
        (dict(eos_ids=range(9)), "eos_ids: 9 are more than 8"),
        (dict(logit_bias={97: 1.0}), "logit_bias 1.0 of token 97"),
        (dict(logit_bias={1: float("nan")}), "logit_bias nan of token 1"),
        (dict(sampling=Sampling(temperature=float("nan"))), "temperature nan must be"),
        (dict(source=np.array([1])), "a source must be given for an encoder-decoder, and only for one"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(change, message):
    model, params, _ = make("learned positions")
    engine = Engine(model, params, num_slots=1)
    with pytest.raises(ValueError) as error:
        engine.submit(Request(np.array([1]), 2)._replace(**change))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert engine.num_waiting == 0


def test_bad_engines_are_refused():
    model, params, _ = make("learned positions")
    for fields, message in (
        (dict(num_slots=0), "num_slots 0 must be at least 1"),
        (dict(cache_len=301), "cache_len 301 must be from 1 to the model's context, 300"),
        (dict(weights="int3"), "weights 'int3' is not one of float32, bfloat16, int8, int4"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, params, **fields)


def test_a_prefix_lm_reads_prompts_in_both_directions():
    """In the engine, by beams, by speculation and in likelihoods; of prompts of each way to read them."""
    model = GPT(TransformerConfig(**SIZES, max_seq_len=400, position="rotary", prefix_lm=True))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 2 or x.shape[0] == V else x, params)
    whole = jax.jit(lambda text, prefix: jax.nn.log_softmax(model.apply({"params": params}, text, prefix=prefix)[0]))
    engines_of = {grows: Engine(model, params, num_slots=2, grows=grows) for grows in (True, False)}
    causal = []
    for length, grows in ((5, True), (200, True), (270, True), (200, False)):
        engine = engines_of[grows]
        prompt = np.random.default_rng(length).integers(0, V, length)
        new = engine.generate([prompt], max_new_tokens=6, sampling=GREEDY)[0]
        text = np.zeros((1, 400), np.int32)
        text[0, : length + 6] = [*prompt, *new]
        prefix = np.arange(400)[None] < length
        logprobs = np.asarray(whole(text, prefix))[length - 1 : length + 5]
        np.testing.assert_array_equal(new, logprobs.argmax(axis=-1))
        np.testing.assert_array_equal(speculate(engine, prompt, max_new_tokens=6, sampling=GREEDY).tokens, new)
        beam, score = beam_search(engine, [prompt], num_beams=1, max_new_tokens=6, eos_ids=[], length_penalty=0.0)[0][0]
        np.testing.assert_array_equal(beam, new)
        np.testing.assert_allclose(score, logprobs.max(axis=-1).sum(), rtol=1e-4)
        [scored] = log_likelihoods(model, params, [Scored(prompt, new)])
        np.testing.assert_allclose(scored.log_probs, logprobs.max(axis=-1), rtol=1e-4, atol=1e-5)
        causal.append(np.asarray(whole(text, prefix & False))[length - 1 : length + 5].argmax(axis=-1) != new)
    assert np.any(causal)
