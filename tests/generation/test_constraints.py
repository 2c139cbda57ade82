"""What a constraint lets through is what it should: whatever is drawn among the tokens that it allows."""

import json

import numpy as np
import pytest

from gptjax.data.tokenizers import build_tokenizer
from gptjax.generation.constraints import Vocabulary

TOKENIZER = build_tokenizer("byte", documents=lambda: iter([]), vocab_size=0)
EOS, V = TOKENIZER.eos_id, 260  # some ids are no tokens
VOCABULARY = Vocabulary(TOKENIZER.to_json(), V, [EOS])
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


def draw(constraint, seed):
    rng, ids = np.random.default_rng(seed), []
    while len(ids) < 500:
        allowed = constraint.allowed()
        assert allowed.shape == (V,) and allowed.any() and not allowed[257:].any()
        # The end, or something that ends a part, often enough that texts are short.
        short = [i for i in (EOS, *b'",}') if allowed[i]]
        ids.append(int(rng.choice(short if short and rng.random() < 0.5 else np.flatnonzero(allowed))))
        constraint.advance(ids[-1])
        assert not constraint.error
        if ids[-1] == EOS:
            return TOKENIZER.decode(ids[:-1])
    raise AssertionError("no end")


def test_json_fits_the_schema():
    once = VOCABULARY.json_schema(SCHEMA)
    for seed in range(20):
        value = json.loads(draw(once.copy(), seed))
        assert list(value) == ["name", "age", "ok"]
        assert [type(item) for item in value.values()] == [str, int, bool] and len(value["name"]) <= 8


def test_regex_is_matched_as_a_whole():
    texts = {draw(VOCABULARY.regex("(ab|c)[0-9]{2}"), seed) for seed in range(20)}
    assert len(texts) > 3 and all(text[-2:].isdigit() and text[:-2] in ("ab", "c") for text in texts)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://localhost/"},
        {"pattern": "(", "type": "string"},
    ],
)
def test_bad_schemas_are_one_line(schema):
    with pytest.raises(ValueError, match="the JSON schema cannot be used") as error:
        VOCABULARY.json_schema(schema)
    assert "\n" not in str(error.value)


def test_bad_expressions_are_one_line():
    with pytest.raises(ValueError, match="the regular expression cannot be used"):
        VOCABULARY.regex("(ab")
