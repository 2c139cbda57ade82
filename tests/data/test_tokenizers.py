"""Tokenizers lose nothing, cannot be tricked into special tokens, and count bytes exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import example, given
from hypothesis import strategies as st

from gptjax.data import tokenizers
from gptjax.data.tokenizers import EOS, KINDS, ROLES, Tokenizer, build_tokenizer

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


BERT_VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "hello",
    "wor",
    "##ld",
    "##s",
    ",",
    "[",
    "]",
    "mask",
    "naive",
]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n")
    return tmp_path


def test_wordpiece_from_its_vocabulary(bert: Path) -> None:
    tokenizer = Tokenizer.load(bert)
    roles = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(tokenizer, f"{role}_id") for role in roles] == [0, 1, 2, 3, 4]
    assert tokenizer.bos_id is None and tokenizer.eos_id == tokenizer.sep_id
    tokens = " ".join(BERT_VOCAB[i] for i in tokenizer.encode("Hello, worlds naïve zzz [MASK]"))
    assert tokens == "hello , wor ##ld ##s naive [UNK] [ mask ]"
    encoded = tokenizer.encode_with_specials("Hello worlds", "world")
    assert " ".join(BERT_VOCAB[i] for i in encoded.ids) == "[CLS] hello wor ##ld ##s [SEP] wor ##ld [SEP]"
    assert encoded.token_types.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert encoded.sequence.tolist() == [-1, 0, 0, 0, 0, -1, 1, 1, -1]
    assert encoded.offsets.tolist() == [[0, 0], [0, 5], [6, 9], [9, 11], [11, 12], [0, 0], [0, 3], [3, 5], [0, 0]]
    assert tokenizer.decode(encoded.ids) == "hello worlds world"
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert Tokenizer.load(bert / "vocab.txt").encode("Hello").tolist() == [1]


def test_offsets_are_characters_of_the_text(tokenizer: Tokenizer) -> None:
    text = "def f(x): 日本 Z\u2028 naïve"
    encoded = tokenizer.encode_with_specials(text)
    np.testing.assert_array_equal(encoded.ids, tokenizer.encode(text))
    assert not encoded.sequence.any() and encoded.ids.dtype == encoded.offsets.dtype == np.int32
    covered = np.zeros(len(text), bool)
    for i, (start, end) in enumerate(encoded.offsets):
        covered[start:end] = True
        part = tokenizer.decode(encoded.ids[i : i + 1])
        assert text[start:end] == part or "\ufffd" in part  # a piece of a character
    assert covered.all()
    assert tokenizer.encode_with_specials("").offsets.shape == (0, 2)


def test_roles_and_chat_template_survive_the_folder(bert: Path, tmp_path: Path) -> None:
    inner = build("byte")._tokenizer
    inner.add_special_tokens(["<s>", "<p>"])
    roles, template = {"eos": EOS, "bos": "<s>", "pad": "<p>"}, "{{ messages[0]['content'] }} é"
    for tokenizer in (Tokenizer(inner, roles, template), Tokenizer.load(bert)):
        tokenizer.save(tmp_path / "new" / "folder")
        config = json.loads((tmp_path / "new/folder/tokenizer_config.json").read_text())
        assert {role: config[f"{role}_token"] for role in tokenizer.roles} == tokenizer.roles
        loaded = Tokenizer.load(tmp_path / "new" / "folder")
        assert (loaded.roles, loaded.chat_template) == (tokenizer.roles, tokenizer.chat_template)
        assert [getattr(loaded, f"{r}_id") for r in ROLES] == [getattr(tokenizer, f"{r}_id") for r in ROLES]
        assert loaded.to_json() == tokenizer.to_json()


def test_a_config_as_others_write_it(tmp_path: Path) -> None:
    inner = build("byte")._tokenizer
    inner.add_special_tokens(["</s>", "<s>", "<|im_end|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).roles == {"eos": EOS, "bos": "<s>"}  # by their usual names
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": None, "pad_token": "not in it"}
    config["chat_template"] = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.roles == {"eos": "<|im_end|>"} and loaded.chat_template == "b"
    assert (loaded.bos_id, loaded.pad_id) == (None, None)
    (tmp_path / "chat_template.jinja").write_text("c")
    assert Tokenizer.load(tmp_path).chat_template == "c"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"end": EOS}, "role 'end' is not one of eos, bos"),
        ({"eos": EOS, "mask": "[MASK]"}, r"lack '\[MASK\]', its mask token"),
        ({"pad": EOS}, "no token has the role 'eos' or 'sep'"),
    ],
)
def test_bad_roles(roles: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(build("byte")._tokenizer, roles)


def test_text_is_unknown_where_only_a_special_token_spells_it() -> None:
    """T5's vocabulary has '</s>' as one piece like any other, and no '<'."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<extra_id_0>", 0.0), ("\u2581", -2.0), ("a", -3.0)]
    inner = huggingface.Tokenizer(huggingface.models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = huggingface.pre_tokenizers.Metaspace()
    inner.decoder = huggingface.decoders.Metaspace()
    inner.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    assert 1 in inner.encode("a </s>").ids
    tokenizer = Tokenizer(inner, {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"})
    ids = tokenizer.encode("a </s> <extra_id_0> a").tolist()
    assert not {0, 1, 3} & set(ids) and ids.count(2) == 2
    assert not {0, 1, 3} & set(tokenizer.encode_with_specials("a </s><pad>").ids.tolist())


def test_special_tokens_of_an_objective_come_last(tokenizer: Tokenizer) -> None:
    names = ["<|mask|>", "<|sentinel_0|>", "<|sentinel_1|>"]
    for kind in KINDS:
        plain = build(kind, 303 - 3 if kind == "bpe" else 0)
        more = build_tokenizer(kind, documents=lambda: iter(TRAINING), vocab_size=303, special_tokens=names)
        assert more.vocab_size == plain.vocab_size + 3 and more.eos_id == plain.eos_id
        assert [more.special_id(name) for name in names] == list(range(plain.vocab_size, plain.vocab_size + 3))
        assert more.mask_id == plain.vocab_size and plain.mask_id is None and plain.special_id("<|mask|>") is None
        text = TRAINING[0] + "".join(names)
        np.testing.assert_array_equal(more.encode(text), plain.encode(text))
        assert more.decode([*more.encode(text), *range(plain.vocab_size, more.vocab_size)]) == text
        assert np.flatnonzero(more.is_special).tolist() == list(range(plain.eos_id, more.vocab_size))
        assert not more.token_bytes[more.is_special].any()
    with pytest.raises(ValueError, match=r"data\.vocab_size 259 .* 4 special tokens .* at least 260"):
        build_tokenizer("bpe", documents=lambda: iter(TRAINING), vocab_size=259, special_tokens=names)
