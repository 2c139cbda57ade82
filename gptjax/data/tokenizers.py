"""Tokenizers: byte, character, byte-level BPE, or loaded; all of them Hugging Face tokenizers in a tokenizer.json."""

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
KINDS = ("byte", "char", "bpe")

# The characters that the 'char' kind has no token for are spelled as the hex digits of their UTF-8 bytes, by 16 tokens
# from Unicode's private use area: the vocabulary stays small and every text survives.
_NIBBLES = "".join(chr(0x10FF00 + digit) for digit in range(16))
_HEX_TO_NIBBLES = str.maketrans("0123456789abcdef", _NIBBLES)
_NIBBLES_TO_HEX = str.maketrans(_NIBBLES, "0123456789abcdef")

# Long texts are encoded in pieces, for time and memory, cut where that changes no token: the word patterns of GPT-2 and
# its successors let a space only begin a word.
_PIECE_CHARACTERS = 1 << 12
_ANYWHERE, _BEFORE_LONE_SPACE, _NOWHERE = re.compile(""), re.compile(r"(?<=\S)(?= \S)"), re.compile("(?!)")


class Tokenizer:
    """Text to token ids and back.

    Text never becomes a special token: '<|endoftext|>' in it is encoded as the characters it consists of.

    Attributes:
      vocab_size: V, one more than the largest id.
      eos_id: the id of '<|endoftext|>', which ends every document.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # that is: encode their names as text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocab = tokenizer.get_vocab()
        if EOS not in vocab:
            raise ValueError(f"its {len(vocab)} tokens lack {EOS!r}, with which documents end")
        if vocab[EOS] in tokenizer.encode(EOS, add_special_tokens=False).ids:
            raise ValueError(f"it takes the text {EOS!r} for the special token, so that text could end a document")
        self._tokenizer = tokenizer
        self.eos_id: int = vocab[EOS]
        self.vocab_size: int = 1 + max(vocab.values())

        ordinary = vocab.keys() - {EOS}
        self._byte_level = b'"ByteLevel"' in tokenizer.decoder.__getstate__() if tokenizer.decoder else False
        self._unknown = None  # matches the characters to be spelled in nibbles
        if ordinary.issuperset(_NIBBLES):
            known = "".join(sorted(ordinary.difference(_NIBBLES)))
            self._unknown = re.compile(f"[^{re.escape(known)}]" if known else "(?s:.)")
        if all(len(token) == 1 for token in ordinary):
            self._cut = _ANYWHERE
        else:
            self._cut = _BEFORE_LONE_SPACE if self._byte_level else _NOWHERE

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [T], with no special tokens added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [T] each, computed on all cores."""
        if self._unknown:
            texts = [self._unknown.sub(lambda m: m[0].encode().hex().translate(_HEX_TO_NIBBLES), t) for t in texts]
        pieces = ((index, piece) for index, text in enumerate(texts) for piece in _pieces(text, self._cut))
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in itertools.batched(pieces, 256):
            encodings = self._tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (index, _), encoding in zip(group, encodings, strict=True):
                ids[index].append(np.array(encoding.ids, np.int32))
        return [np.concatenate(parts) for parts in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens, and with U+FFFD for bytes that are not UTF-8."""
        text = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)
        return re.sub(f"[{_NIBBLES}]+", _read_nibbles, text) if self._unknown else text

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """float32 [V]: how many UTF-8 bytes of text each token stands for, special tokens 0.

        Over the tokens of any text they add up to its bytes, a nibble counting half. NaN in a loaded tokenizer that is
        not byte-level: its tokens do not determine the bytes.
        """
        sizes = np.zeros(self.vocab_size, np.float32)
        for token, index in self._tokenizer.get_vocab().items():
            if self._byte_level:
                sizes[index] = len(token)  # each byte is written as one character
            elif self._unknown:
                sizes[index] = 0.5 if token in _NIBBLES else len(token.encode())
            else:
                sizes[index] = np.nan
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to `path`, a tokenizer.json."""
        self._tokenizer.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, a folder that holds one, or a folder with GPT-2's vocabulary and merges.

        Raises:
          ValueError: if the file is not a tokenizer, or not one that ends documents with '<|endoftext|>'.
          FileNotFoundError: if there is nothing of the kind at `path`.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if file.is_file():
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (path / vocab).is_file() and (path / merges).is_file():
                    return _with_eos(_byte_level(models.BPE.from_file(str(path / vocab), str(path / merges))))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"data.tokenizer {str(path)!r} cannot be used: {error}") from error
        raise FileNotFoundError(
            f"data.tokenizer {str(path)!r} is not one of {KINDS}, nor a tokenizer.json, nor a folder with "
            "tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe"
        )


def build_tokenizer(kind: str, *, documents: Callable[[], Iterator[str]], vocab_size: int) -> Tokenizer:
    """Makes a tokenizer from the training documents, or loads one.

    Args:
      kind: 'byte': ids 0 to 255 are the bytes; 'char': the characters of the documents, and 16 tokens that spell all
        others; 'bpe': byte-level byte-pair encoding as GPT-2 has it, trained on the documents; else a path to load.
      documents: starts an iteration over the training documents.
      vocab_size: V, for 'bpe' alone: 256 bytes, the merges and '<|endoftext|>'. The tokenizer has fewer tokens where
        the documents leave no pair to merge.

    Raises:
      ValueError: if `vocab_size` has no room for the bytes and '<|endoftext|>'.
      FileNotFoundError: if `kind` is neither a kind nor a path.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte":
        # GPT-2's alphabet keeps printable bytes and moves the others, in order, to the characters from 256 on.
        by_value = {ord(c): c for c in alphabet if ord(c) < 256}
        moved = iter(c for c in alphabet if ord(c) >= 256)
        vocab = {by_value[byte] if byte in by_value else next(moved): byte for byte in range(256)}
        return _with_eos(_byte_level(models.BPE(vocab, []), split_words=False))
    if kind == "char":
        characters = sorted(set[str]().union(*map(set, documents())).difference(_NIBBLES))
        tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, *_NIBBLES])}, []))
        tokenizer.decoder = decoders.Fuse()
        return _with_eos(tokenizer)
    if kind == "bpe":
        if vocab_size < 257:
            raise ValueError(
                f"data.vocab_size {vocab_size} is too small: 'bpe' needs 256 bytes and {EOS!r}, at least 257"
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=sys.stderr.isatty()
        )
        pieces = (piece for text in documents() for piece in _pieces(text, _BEFORE_LONE_SPACE))
        tokenizer.train_from_iterator(pieces, trainer)
        return _with_eos(tokenizer)
    return Tokenizer.load(kind)


def _byte_level(model: models.BPE, *, split_words: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_eos(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    """Adds '<|endoftext|>' as the last id, unless the vocabulary has it."""
    tokenizer.add_special_tokens([EOS])
    return Tokenizer(tokenizer)


def _pieces(text: str, cut: re.Pattern[str]) -> Iterator[str]:
    """Yields `text` in pieces of `_PIECE_CHARACTERS` or somewhat more, cut only where `cut` matches."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (match := cut.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _read_nibbles(match: re.Match[str]) -> str:
    digits = match[0].translate(_NIBBLES_TO_HEX)
    whole = len(digits) // 2 * 2
    return bytes.fromhex(digits[:whole]).decode(errors="replace") + "\ufffd" * (len(digits) - whole)
