"""Tokenizers lose nothing, cannot be tricked into special tokens, and count bytes exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.data import tokenizers
from gptjax.data.tokenizers import EOS, KINDS, Tokenizer, build_tokenizer

TRAINING = [
    "def f(x):\n    return x + 1  # naïve\r\n",
    "The quick brown fox, the lazy dog.\n\n\n" * 5,
    "日本語 text\tα",
]
texts = st.text(st.characters(exclude_categories=["Cs"]))


def build(kind: str, vocab_size: int = 300) -> Tokenizer:
    return build_tokenizer(kind, documents=lambda: iter(TRAINING), vocab_size=vocab_size)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return build(request.param)


@given(text=texts)
@example(text="")
@example(text="\x00\r\n\t \x7f e\u0301 👩‍👩‍👧 \U0010ff00\U0010ff0f \uffff ]^-\\[")
@example(text=f"{EOS} a{EOS}{EOS}b")
def test_lossless_injection_safe_and_byte_counting(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_special_tokens_are_skipped_when_decoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("fox"), tokenizer.eos_id]) == "fox"
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


@given(ids=st.lists(st.integers(0, 256)))
def test_any_bytes_decode_with_replacement_characters(ids: list[int]) -> None:
    assert build("byte").decode(ids) == bytes(i for i in ids if i < 256).decode(errors="replace")


@given(ids=st.lists(st.integers(0, 200)))
def test_any_char_ids_decode_to_text(ids: list[int]) -> None:
    tokenizer = build("char")
    tokenizer.decode([i for i in ids if i < tokenizer.vocab_size]).encode()


@given(text=texts)
def test_a_tokenizer_survives_its_file(tokenizer: Tokenizer, text: str) -> None:
    again = Tokenizer(huggingface.Tokenizer.from_str(tokenizer.to_json()))
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)


def test_saved_and_loaded_from_file_and_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert loaded.to_json() == tokenizer.to_json()
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    batch = [*TRAINING, "", "x" * 1000]
    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_cutting_long_texts_changes_no_token(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TRAINING) * 3
    whole = tokenizer.encode(text)
    for size in range(1, 20):
        monkeypatch.setattr(tokenizers, "_PIECE_CHARACTERS", size)
        np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_vocabularies() -> None:
    byte, char, bpe = (build(kind) for kind in KINDS)
    assert byte.vocab_size == 257 and byte.eos_id == 256
    assert byte.encode("aé\n").tolist() == list("aé\n".encode())
    assert char.vocab_size == len(set("".join(TRAINING))) + 16 + 1
    assert len(char.encode("日本")) == 2 and len(char.encode("Z")) == 2
    assert bpe.vocab_size == 300 and bpe.eos_id == 299
    assert len(bpe.encode(TRAINING[1])) < len(byte.encode(TRAINING[1])) / 2
    assert build("bpe").to_json() == bpe.to_json()


@pytest.mark.parametrize(("vocab_file", "merges_file"), [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_files(tmp_path: Path, vocab_file: str, merges_file: str) -> None:
    bpe = build("bpe")
    model = json.loads(bpe.to_json())["model"]
    (tmp_path / vocab_file).write_text(json.dumps(model["vocab"] | {EOS: bpe.eos_id}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / merges_file).write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id) == (bpe.vocab_size, bpe.eos_id)
    text = TRAINING[0] + EOS
    np.testing.assert_array_equal(loaded.encode(text), bpe.encode(text))
    assert loaded.decode([*loaded.encode(text), loaded.eos_id]) == text


def word_level(words: dict[str, int]) -> huggingface.Tokenizer:
    tokenizer = huggingface.Tokenizer(huggingface.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = huggingface.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("words", "message"), [({"?": 0, "hello": 1}, "lack '<|endoftext|>'"), ({"?": 0, EOS: 1}, "could end a document")]
)
def test_unfit_files_are_refused(tmp_path: Path, words: dict[str, int], message: str) -> None:
    word_level(words).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"data\.tokenizer .*" + message.replace("|", r"\|")):
        Tokenizer.load(tmp_path)


def test_bytes_of_a_tokenizer_that_is_not_byte_level_are_unknown() -> None:
    tokenizer = word_level({"?": 0, "hello": 1})
    tokenizer.add_special_tokens([EOS])
    assert np.isnan(Tokenizer(tokenizer).token_bytes[:2]).all()


@pytest.mark.parametrize(
    ("kind", "vocab_size", "error", "message"),
    [
        ("bpe", 256, ValueError, r"data\.vocab_size 256 .* 257"),
        ("words", 300, FileNotFoundError, r"data\.tokenizer 'words' .*'byte', 'char', 'bpe'"),
        (__file__, 300, ValueError, r"data\.tokenizer .* cannot be used"),
    ],
)
def test_bad_arguments(kind: str, vocab_size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(kind, vocab_size)
