"""Tokenizers: byte, character, byte-level BPE, or loaded; all of them Hugging Face tokenizers in a tokenizer.json."""

import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

EOS = "<|endoftext|>"
KINDS = ("byte", "char", "bpe")

# What a special token is for, and the names that say so where no tokenizer_config.json does.
ROLES = {
    "eos": (EOS, "</s>", "<|end_of_text|>", "<eos>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "pad": ("[PAD]", "<pad>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "unk": ("[UNK]", "<unk>"),
}

# The characters that the 'char' kind has no token for are spelled as the hex digits of their UTF-8 bytes, by 16 tokens
# from Unicode's private use area: the vocabulary stays small and every text survives.
_NIBBLES = "".join(chr(0x10FF00 + digit) for digit in range(16))
_HEX_TO_NIBBLES = str.maketrans("0123456789abcdef", _NIBBLES)
_NIBBLES_TO_HEX = str.maketrans(_NIBBLES, "0123456789abcdef")

# Long texts are encoded in pieces, for time and memory, cut where that changes no token: the word patterns of GPT-2 and
# its successors let a space only begin a word.
_PIECE_CHARACTERS = 1 << 12
_ANYWHERE, _BEFORE_LONE_SPACE, _NOWHERE = re.compile(""), re.compile(r"(?<=\S)(?= \S)"), re.compile("(?!)")


class Encoded(NamedTuple):
    """A text, or a pair of texts, as a model with special tokens reads it.

    Attributes:
      ids: int32 [T].
      token_types: int32 [T], 0 or 1, as the tokenizer's post-processor gives them.
      offsets: int32 [T, 2], the characters of its text that a token stands for, (0, 0) for a special token.
      sequence: int32 [T], 0 for tokens of the first text, 1 of the second, -1 for special tokens.
    """

    ids: np.ndarray
    token_types: np.ndarray
    offsets: np.ndarray
    sequence: np.ndarray


class Tokenizer:
    """Text to token ids and back.

    Text never becomes a special token: '<|endoftext|>' in it is encoded as the characters it consists of, or, where the
    vocabulary cannot spell those, as the unknown token.

    Args:
      tokenizer: a Hugging Face tokenizer; its settings are changed.
      roles: special tokens by what they are for: 'eos', 'bos', 'pad', 'mask', 'cls', 'sep', 'unk'.
      chat_template: a Jinja template of messages.

    Attributes:
      vocab_size: V, one more than the largest id.
      eos_id: the id that ends every document; where no token has the role 'eos', that of 'sep'.
      bos_id, pad_id, mask_id, cls_id, sep_id, unk_id: ids of the other roles, or None.
      roles, chat_template: as given.
      special_ids: the id of each special token by name.

    Raises:
      ValueError: if a role is unknown, its token is not in the vocabulary, documents have no end, or text could become a
        special token.
    """

    bos_id: int | None
    pad_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    unk_id: int | None

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        roles: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        tokenizer.encode_special_tokens = True  # that is: encode their names as text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.roles = {"eos": EOS} if roles is None else dict(roles)
        self.chat_template = chat_template
        vocab = tokenizer.get_vocab()
        for role, token in self.roles.items():
            if role not in ROLES:
                raise ValueError(f"role {role!r} is not one of {', '.join(ROLES)}")
            if token not in vocab:
                rule = ", with which documents end" if role == "eos" else f", its {role} token"
                raise ValueError(f"its {len(vocab)} tokens lack {token!r}{rule}")
            setattr(self, f"{role}_id", vocab[token])
        for role in ROLES.keys() - self.roles.keys() - {"eos"}:
            setattr(self, f"{role}_id", None)
        if not {"eos", "sep"} & self.roles.keys():
            raise ValueError("no token has the role 'eos' or 'sep', with which documents end")
        self.eos_id: int = vocab[self.roles.get("eos") or self.roles["sep"]]
        self.vocab_size: int = 1 + max(vocab.values())
        known = _special_tokens(tokenizer)
        tokenizer.add_special_tokens([token for token in self.roles.values() if token not in known])
        self._tokenizer = tokenizer
        self.special_ids = {token: vocab[token] for token in (*known, *self.roles.values())}
        special = self.special_ids

        self._forbidden = np.zeros(self.vocab_size, bool)  # what text must not become
        self._forbidden[list(special.values())] = True
        shares_its_token = Counter(self.roles.values())[self.roles.get("unk", "")] > 1  # GPT-2's is its eos
        self._unknown_id = None if shares_its_token else self.unk_id
        if self._unknown_id is not None:
            self._forbidden[self._unknown_id] = False
        else:
            encodings = tokenizer.encode_batch_fast(list(special), add_special_tokens=False)
            for text, encoding in zip(special, encodings, strict=True):
                if self._forbidden[encoding.ids].any():
                    raise ValueError(
                        f"it takes the text {text!r} for the special token, so that text could end a document"
                    )

        ordinary = vocab.keys() - special.keys()
        self._byte_level = b'"ByteLevel"' in tokenizer.decoder.__getstate__() if tokenizer.decoder else False
        self._unknown = None  # matches the characters to be spelled in nibbles
        if ordinary.issuperset(_NIBBLES):
            characters = "".join(sorted(ordinary.difference(_NIBBLES)))
            self._unknown = re.compile(f"[^{re.escape(characters)}]" if characters else "(?s:.)")
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
            texts = [self._unknown.sub(_spell, text) for text in texts]
        pieces = ((index, piece) for index, text in enumerate(texts) for piece in _pieces(text, self._cut))
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in itertools.batched(pieces, 256):
            encodings = self._tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (index, _), encoding in zip(group, encodings, strict=True):
                ids[index].append(self._unspecial(np.array(encoding.ids, np.int32)))
        return [np.concatenate(parts) for parts in ids]

    def encode_with_specials(self, text: str, pair: str | None = None) -> Encoded:
        """Encodes a text or a pair, with the special tokens that the tokenizer's own post-processor puts around them.

        A BERT tokenizer gives [CLS] text [SEP] pair [SEP], a Llama tokenizer <s> text, and in a workdir others do what
        training did: the end token opens a text, and closes the source of a pair.
        """
        texts = [text] if pair is None else [text, pair]
        spelled = [self._unknown.sub(_spell, t) for t in texts] if self._unknown else texts
        encoding = self._tokenizer.encode(spelled[0], spelled[1] if pair is not None else None)
        sequence = np.array([-1 if i is None else i for i in encoding.sequence_ids], np.int32)
        ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        for number, original in enumerate(texts if self._unknown else []):
            lengths = [len(self._unknown.sub(_spell, character)) for character in original]  # type: ignore[union-attr]
            character_of = np.repeat(np.arange(len(original)), lengths)
            here = sequence == number
            offsets[here] = np.stack([character_of[offsets[here, 0]], character_of[offsets[here, 1] - 1] + 1], axis=1)
        ids = np.where(sequence < 0, ids, self._unspecial(ids))
        return Encoded(ids, np.array(encoding.type_ids, np.int32), offsets, sequence)

    def frame(self, *, opens: bool, closes: bool) -> None:
        """Has `encode_with_specials` put the end token before or after a text, unless it already puts tokens around it."""
        if self._tokenizer.num_special_tokens_to_add(False):
            return
        eos = next(token for token, index in self.special_ids.items() if index == self.eos_id)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([eos] * opens + ["$A"] + [eos] * closes),
            pair=" ".join([eos] * opens + ["$A"] + [eos] * closes + ["$B:1"] + [f"{eos}:1"] * closes),
            special_tokens=[(eos, self.eos_id)],
        )

    def _unspecial(self, ids: np.ndarray) -> np.ndarray:
        """`ids` of text, with the unknown token where the vocabulary has a special token for what was written."""
        if self._unknown_id is None:
            return ids
        return np.where(self._forbidden[ids], np.int32(self._unknown_id), ids)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`, without special tokens, and with U+FFFD for bytes that are not UTF-8."""
        text = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=skip_special_tokens)
        return re.sub(f"[{_NIBBLES}]+", _read_nibbles, text) if self._unknown else text

    def special_id(self, name: str) -> int | None:
        """Returns the id of the special token `name`, or of the one that goes by another spelling of it, or None.

        '<|mask|>' is also '[MASK]' and '<mask>', '<|sentinel_0|>' T5's '<extra_id_0>', '<|fim_prefix|>' '<fim_prefix>'.
        """
        inner = name.strip("<|>")
        spellings = (name, f"<{inner.replace('sentinel', 'extra_id')}>", f"[{inner.upper()}]")
        return next((self.special_ids[s] for s in spellings if s in self.special_ids), None)

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """bool [V]: ids that no text is made of: special tokens, and those that the vocabulary leaves out."""
        special = np.ones(self.vocab_size, bool)
        special[list(self._tokenizer.get_vocab().values())] = False
        special[list(self.special_ids.values())] = True
        return special

    @functools.cached_property
    def word_edges(self) -> np.ndarray:
        """uint8 [2, V]: what kind of character each token begins and ends with.

        A token goes on with the word before it if it begins with 0, or with the kind that the token before ends with and
        that kind is above 2. 0: inside a word or a character (WordPiece's ##, a UTF-8 continuation byte); 1: a special
        token, white space, or a character of a script without spaces, each a word of its own; 2: what no word goes on
        after; 3: letters; 4: digits; 5: punctuation.
        """
        edges = np.ones((2, self.vocab_size), np.uint8)
        to_byte = _byte_of_character()
        is_wordpiece = isinstance(self._tokenizer.model, models.WordPiece)
        for token, index in self._tokenizer.get_vocab().items():
            if token in self.special_ids:
                continue
            if is_wordpiece:
                edges[0, index] = not token.startswith("##")
                continue
            if self._byte_level:
                written = bytes(to_byte[c] for c in token) if to_byte.keys() >= set(token) else token.encode()
            elif self._unknown and token in _NIBBLES:
                written = b"x"
            else:
                written = token.replace("\u2581", " ").encode()  # SentencePiece's space
            edges[:, index] = _first_kind(written), _last_kind(written)
        return edges

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
        sizes[list(self.special_ids.values())] = 0
        return sizes

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, and tokenizer_config.json beside it with the roles and the chat template.

        Args:
          path: a folder, or a file whose name ends in .json.
        """
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {f"{role}_token": token for role, token in self.roles.items()}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        file.write_text(
            self._tokenizer.to_str(pretty=True)
        )  # its own `save` raises a bare Exception for what is an OSError
        file.with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, a vocab.txt, or a folder that holds one of them or GPT-2's vocabulary and merges.

        Roles and chat template are those of the tokenizer_config.json beside it; a role that it does not mention falls to
        a special token of a usual name, and the end of documents, if nothing else has it, to '<|endoftext|>'.

        Raises:
          ValueError: if the file is not a tokenizer, or documents have no end in it.
          FileNotFoundError: if there is nothing of the kind at `path`.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        named = [path] if path.is_file() else []
        try:
            config = _read_config(folder)
            for file in named or [folder / "tokenizer.json"] if path.exists() else []:
                if file.is_file() and file.name != "vocab.txt":
                    return cls(*_with_roles(tokenizers.Tokenizer.from_file(str(file)), config))
            for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")) if path.is_dir() else ():
                if (path / vocab).is_file() and (path / merges).is_file():
                    bpe = _byte_level(models.BPE.from_file(str(path / vocab), str(path / merges)))
                    bpe.add_special_tokens([EOS])
                    return cls(*_with_roles(bpe, config))
            if path.exists() and (folder / "vocab.txt").is_file():
                return cls(*_with_roles(_wordpiece(folder / "vocab.txt", config), config))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"data.tokenizer {str(path)!r} cannot be used: {error}") from error
        raise FileNotFoundError(
            f"data.tokenizer {str(path)!r} is not one of {KINDS}, nor a tokenizer.json, nor a folder with "
            "tokenizer.json, vocab.json and merges.txt, encoder.json and vocab.bpe, or vocab.txt"
        )


def build_tokenizer(
    kind: str | Tokenizer,
    *,
    documents: Callable[[], Iterator[str]],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Makes a tokenizer from the training documents, or loads one.

    Args:
      kind: 'byte': ids 0 to 255 are the bytes; 'char': the characters of the documents, and 16 tokens that spell all
        others; 'bpe': byte-level byte-pair encoding as GPT-2 has it, trained on the documents; else a path to load.
      documents: starts an iteration over the training documents.
      vocab_size: V, for 'bpe' alone: 256 bytes, the merges, '<|endoftext|>' and `special_tokens`. The tokenizer has
        fewer tokens where the documents leave no pair to merge.
      special_tokens: what an objective needs besides '<|endoftext|>'. A tokenizer made here gets them as its last ids; a
        loaded one must have them, under their names here or its own (see `Tokenizer.special_id`).

    Raises:
      ValueError: if `vocab_size` has no room for the bytes and special tokens, or a loaded tokenizer lacks some of them.
      FileNotFoundError: if `kind` is neither a kind nor a path.
    """
    specials = [EOS, *special_tokens]
    if kind == "byte":
        return _made_here(_byte_level(models.BPE(_byte_of_character(), []), split_words=False), specials)
    if kind == "char":
        characters = sorted(set[str]().union(*map(set, documents())).difference(_NIBBLES))
        tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, *_NIBBLES])}, []))
        tokenizer.decoder = decoders.Fuse()
        return _made_here(tokenizer, specials)
    if kind == "bpe":
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"data.vocab_size {vocab_size} is too small: 'bpe' needs 256 bytes and {len(specials)} special tokens "
                f"like {specials[-1]!r}, at least {256 + len(specials)}"
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=sys.stderr.isatty(),
        )
        pieces = (piece for text in documents() for piece in _pieces(text, _BEFORE_LONE_SPACE))
        tokenizer.train_from_iterator(pieces, trainer)
        return _made_here(tokenizer, specials)
    loaded = kind if isinstance(kind, Tokenizer) else Tokenizer.load(kind)
    missing = [name for name in special_tokens if loaded.special_id(name) is None]
    if missing:
        shown = ", ".join(missing[:3]) + (f" ... {missing[-1]}, {len(missing)} in all" if len(missing) > 3 else "")
        name = "" if isinstance(kind, Tokenizer) else f" {kind!r}"
        raise ValueError(f"data.tokenizer{name} lacks special tokens that data.objective needs: {shown}")
    return loaded


def _byte_level(model: models.BPE, *, split_words: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _made_here(tokenizer: tokenizers.Tokenizer, specials: Sequence[str]) -> Tokenizer:
    """Adds `specials`, of which the first ends documents, as the last ids."""
    tokenizer.add_special_tokens(list(specials))
    roles = {"eos": specials[0]} | ({"mask": "<|mask|>"} if "<|mask|>" in specials else {})
    return Tokenizer(tokenizer, roles)


def _wordpiece(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer from its vocabulary; lower case unless the config says otherwise, as in Hugging Face's."""
    vocab = models.WordPiece.read_file(str(file))
    unk, cls, sep = (_token(config.get(f"{role}_token")) or ROLES[role][0] for role in ("unk", "cls", "sep"))
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([name for names in ROLES.values() for name in names if name in vocab])
    if cls in vocab and sep in vocab:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
        )
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of `folder`, or {}; a chat_template.jinja beside it comes first."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _with_roles(
    tokenizer: tokenizers.Tokenizer, config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str], str | None]:
    """The arguments of `Tokenizer`."""
    vocab, special = tokenizer.get_vocab(), _special_tokens(tokenizer)
    roles = {}
    for role, usual in ROLES.items():
        token = next((name for name in usual if name in special), None)
        if f"{role}_token" in config:
            token = _token(config[f"{role}_token"])
        if token is not None and (token in vocab or role == "eos"):
            roles[role] = token
    if not {"eos", "sep"} & roles.keys():
        roles["eos"] = EOS
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return tokenizer, roles, template


def _special_tokens(tokenizer: tokenizers.Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _token(entry: Any) -> str | None:
    """A token of a tokenizer_config.json: a string, or a dict with settings that tokenizer.json has too."""
    return entry["content"] if isinstance(entry, dict) else entry


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet stands for."""
    # It keeps printable bytes and moves the others, in order, to the characters from 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = (byte for byte in range(256) if byte not in kept.values())
    return kept | dict(zip((c for c in alphabet if ord(c) >= 256), others, strict=True))


def _first_kind(written: bytes) -> int:
    """The kind of character that the bytes begin with, see `Tokenizer.word_edges`."""
    if not written:
        return 1
    if 0x80 <= written[0] < 0xC0:
        return 0
    character = written.decode(errors="replace")[0]
    if character == "\ufffd":  # the rest of the character is in the next token; U+3000 to U+9FFF have no spaces
        return 1 if 0xE3 <= written[0] < 0xEA else 3
    return 1 if _is_ideograph(character) or character.isspace() else _kind(character)


def _last_kind(written: bytes) -> int:
    """The kind of character that the bytes end with."""
    character = written.decode(errors="replace")[-1:]
    if character == "\ufffd":
        return 3
    return 2 if not character or _is_ideograph(character) or character.isspace() else _kind(character)


def _kind(character: str) -> int:
    return 3 if character.isalpha() else 4 if character.isnumeric() else 5


def _is_ideograph(character: str) -> bool:
    return "\u3040" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or character >= "\U00020000"


def _pieces(text: str, cut: re.Pattern[str]) -> Iterator[str]:
    """Yields `text` in pieces of `_PIECE_CHARACTERS` or somewhat more, cut only where `cut` matches."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (match := cut.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _spell(match: re.Match[str]) -> str:
    return match[0].encode().hex().translate(_HEX_TO_NIBBLES)


def _read_nibbles(match: re.Match[str]) -> str:
    digits = match[0].translate(_NIBBLES_TO_HEX)
    whole = len(digits) // 2 * 2
    return bytes.fromhex(digits[:whole]).decode(errors="replace") + "\ufffd" * (len(digits) - whole)
