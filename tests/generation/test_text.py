"""Text comes whole characters at a time, and adds up to the whole, however the ids arrive."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models

from gptjax.data.tokenizers import build_tokenizer
from gptjax.generation.text import TextStream

TEXT = "Grüße, 你好世界! 👩‍👩‍👧 naïve — the cat’s STOP here\n\n" * 3
BPE = build_tokenizer("bpe", documents=lambda: iter([TEXT * 20]), vocab_size=300)
BYTES = build_tokenizer("byte", documents=lambda: iter([]), vocab_size=0)
CHARS = build_tokenizer("char", documents=lambda: iter(["abc xyz"]), vocab_size=0)
TOKENIZERS = {"bpe": BPE, "byte": BYTES, "char": CHARS}


def stream(decode, ids, **options):
    text = TextStream(decode, **options)
    parts = []
    for token in ids:
        if text.stopped:
            break
        parts.append(text.add(token))
    return [*parts, text.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_text_adds_up_and_no_character_is_halved(name, text):
    tokenizer = TOKENIZERS[name]
    parts = stream(tokenizer.decode, tokenizer.encode(text).tolist())
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_come_as_the_decoder_spells_them(ids):
    assert "".join(stream(BYTES.decode, ids)) == BYTES.decode(ids)


def test_endless_garbage_is_not_held_for_ever():
    text = TextStream(BYTES.decode)
    given_out = "".join(text.add(0x80) for _ in range(1000))
    assert len(given_out) > 900 and len(text._ids) < 100


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abé", max_size=30),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    name=st.sampled_from(["bpe", "byte"]),
)
def test_stop_strings_end_the_text_however_it_is_cut(text, stop, name):
    tokenizer = TOKENIZERS[name]
    # The stop string that is complete first; of two that end together, the one that begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    parts = stream(tokenizer.decode, tokenizer.encode(text).tolist(), stop=stop)
    assert "".join(parts) == (text[: min(ends)[1]] if ends else text)


def test_spaces_and_bytes_of_sentencepiece():
    """A space that a token begins with is only seen after another token; bytes stand for what has no token."""
    vocab = {"▁a": 0, "▁b": 1, "<0xE4>": 2, "<0xBD>": 3, "<0xA0>": 4, "c": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [0, 1, 2, 3, 4, 5, 1]
    assert stream(tokenizer.decode, ids) == ["a", " b", "", "", "你", "c", " b", ""]
    assert "".join(stream(tokenizer.decode, [2, 3, 4] * 2)) == "你你"
    assert "".join(stream(tokenizer.decode, ids, context=[5])) == " a b你c b"
