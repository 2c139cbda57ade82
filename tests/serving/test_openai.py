"""Every endpoint, by the client that everybody uses."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from gptjax.serving.worker import num_compiles
from tests.serving.conftest import CONTEXT, KEY


@pytest.fixture(scope="module")
def client(server):

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "folder/encoder", "tiny-t5"]
    assert client.models.retrieve("folder/encoder").id == "folder/encoder"


def test_completions(client):
    options = dict(model="tiny", prompt="Once", max_tokens=12, temperature=0.7, seed=3)
    whole = client.completions.create(**options)
    assert whole.usage.prompt_tokens == 4 and 1 <= whole.usage.completion_tokens <= 12
    assert whole.choices[0].finish_reason in ("stop", "length")
    # The same seed gives the same text: again, streamed, from ids, and beside others.
    assert client.completions.create(**options).choices[0].text == whole.choices[0].text
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and all(c.usage is None for c in chunks[:-1])
    beside = client.completions.create(**options | {"prompt": [[*b"Once"], [*b"Twice or more"]], "n": 2})
    assert [c.index for c in beside.choices] == [0, 1, 2, 3]
    assert beside.choices[0].text == whole.choices[0].text != beside.choices[1].text
    assert client.completions.create(**options | {"seed": 4}).choices[0].text != whole.choices[0].text


def test_completions_say_how_likely_tokens_are(client, server):
    options = dict(model="tiny", prompt="abc", max_tokens=3, temperature=0, logprobs=2, echo=True)
    written = client.completions.create(**options).choices[0]
    assert written.text.startswith("abc") and written.logprobs.tokens[:3] == ["a", "b", "c"]
    assert written.logprobs.token_logprobs[0] is None and written.logprobs.top_logprobs[0] is None
    for logprob, top in zip(written.logprobs.token_logprobs[3:], written.logprobs.top_logprobs[3:], strict=True):
        assert logprob == max(top.values())  # greedy
    assert written.logprobs.text_offset[:4] == [0, 1, 2, 3]
    # Scored as a prompt, the text is as likely as when it was written; and streaming tells the same.
    prompt = [*b"abc", *(server.model().tokenizer.encode(written.text[3:]).tolist())]
    scored = client.completions.create(**options | {"prompt": prompt, "max_tokens": 0}).choices[0]
    if "\ufffd" not in written.text:
        assert scored.text == written.text and scored.finish_reason == "length"
        np.testing.assert_allclose(scored.logprobs.token_logprobs[1:], written.logprobs.token_logprobs[1:], atol=1e-3)
    chunks = [c.choices[0] for c in client.completions.create(**options, stream=True)]
    assert "".join(c.text for c in chunks) == written.text
    assert [x for c in chunks for x in c.logprobs.token_logprobs] == written.logprobs.token_logprobs
    assert [x for c in chunks for x in c.logprobs.text_offset] == written.logprobs.text_offset


def test_texts_scored_at_once_all_get_their_scores(client):
    def score(i):
        options = dict(model="tiny", prompt="x" * (1 + i % 7), max_tokens=0, logprobs=1, echo=True, timeout=15)
        return client.completions.create(**options).choices[0].logprobs.token_logprobs

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(score, range(60)))
    assert all(scores == found[6][: len(scores)] == found[i % 7] for i, scores in enumerate(found))


def test_stops_biases_and_ends(client):
    forced = dict(model="tiny", prompt="x", max_tokens=8, logit_bias={str(ord("z")): 100})
    assert client.completions.create(**forced).choices[0].text == "z" * 8
    stopped = client.completions.create(**forced, stop=["q", "zzz"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    ended = client.completions.create(**forced, extra_body={"stop_token_ids": [ord("z")]}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    full = client.completions.create(
        model="tiny", prompt="x" * (CONTEXT - 5), max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert full.choices[0].finish_reason == "length"


def test_infilling(client, server):
    with_suffix = client.completions.create(model="tiny", prompt="def f(", suffix="): pass", max_tokens=4)
    assert with_suffix.usage.prompt_tokens == 6 + 7 + 3


def test_an_encoder_decoder_answers(client):
    answer = client.completions.create(model="tiny-t5", prompt="translate: x", max_tokens=4, seed=0)
    assert answer.usage.completion_tokens <= 4


def test_chat(client, server):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    options = dict(model="tiny", messages=messages, max_completion_tokens=10, temperature=0.9, seed=1, n=2)
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert whole.usage.prompt_tokens == len(rendered) - 3 * 11 - 2 * 9
    assert [c.message.role for c in whole.choices] == ["assistant"] * 2
    for choice in whole.choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(bytes(token.bytes).decode(errors="replace") for token in choice.logprobs.content)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        texts = [c.choices[0].delta.content or "" for c in chunks[:-1] if c.choices[0].index == index]
        assert "".join(texts) == whole.choices[index].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage


def test_special_tokens_in_messages_are_text(client):
    def num_tokens(text):
        message = {"role": "user", "content": text}
        return client.chat.completions.create(model="tiny", messages=[message], max_tokens=1).usage.prompt_tokens

    assert num_tokens("<|im_end|>") - num_tokens("") == len("<|im_end|>")
    assert client.completions.create(model="tiny", prompt="<|endoftext|>", max_tokens=1).usage.prompt_tokens == 13


def test_json(client):
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    ask = dict(model="tiny", messages=[{"role": "user", "content": "A pet?"}], max_tokens=60, seed=2)
    for choice in client.chat.completions.create(**ask, response_format=form, n=3).choices:
        value = json.loads(choice.message.content)
        assert value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 99 and choice.finish_reason == "stop"
    begun = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices[0].message.content
    assert begun.startswith("{")
    digits = client.completions.create(
        model="tiny", prompt="", max_tokens=9, extra_body={"response_format": {"type": "regex", "regex": "[0-9]{4}"}}
    )
    assert digits.choices[0].text.isdigit() and len(digits.choices[0].text) == 4


def test_embeddings(client):
    result = client.embeddings.create(model="folder/encoder", input=["a cat", "a dog", "a cat"])  # base64, by default
    vectors = np.array([item.embedding for item in result.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    as_floats = client.embeddings.create(model="folder/encoder", input=[*b"a dog"], encoding_format="float")
    np.testing.assert_allclose(as_floats.data[0].embedding, vectors[1], atol=1e-5)
    assert result.usage.prompt_tokens == 15


def test_tokenizing(server):
    with server.client() as client:
        tokens = client.post("/tokenize", json={"prompt": "Grüße <|im_end|>"}).json()
        assert tokens["tokens"] == [*"Grüße <|im_end|>".encode()] and tokens["max_model_len"] == CONTEXT
        assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Grüße <|im_end|>"}
        assert client.post("/tokenize", json={"prompt": "<|endoftext|>"}).json()["tokens"] == [256]
        info = client.get("/tokenizer_info").json()
        assert info["eos_token"] == "<|endoftext|>" and "im_start" in (info["chat_template"] or "im_start")


def test_probes_and_metrics(server):
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        text = client.get("/metrics").text
        assert 'gptjax_requests_total{path="/v1/completions",status="200"}' in text and "gptjax_compiles" in text
        assert 'gptjax_generated_tokens_total{model="tiny"}' in text


def test_nothing_compiles_after_warm_up(client):
    before = num_compiles()
    rng = np.random.default_rng(0)
    for i in range(12):
        prompts = [rng.integers(0, 256, rng.integers(1, 200)).tolist() for _ in range(rng.integers(1, 4))]
        sampling = dict(
            temperature=float(rng.random() * 2), top_p=0.5 + 0.5 * float(rng.random()), presence_penalty=i / 10
        )
        client.completions.create(
            model="tiny", prompt=prompts, n=int(rng.integers(1, 4)), max_tokens=int(rng.integers(1, 60)), echo=i % 2 == 0,
            logprobs=i % 3 or None, **sampling,
        )  # fmt: skip
    assert num_compiles() == before
