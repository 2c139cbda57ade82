"""Corpora: where the documents come from, and which of them are for validation."""

import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data import standard_library
from gptjax.data.cache import file_contents, fingerprint

Document = str | tuple[str, str]  # a text, or a pair of source and target
Documents = Callable[[], Iterator[Document]]
FILE_CORPORA = ("text", "jsonl", "tsv")


class Corpus(NamedTuple):
    """Documents in two splits.

    Attributes:
      name: as the config calls it.
      fingerprint: hex digits that change whenever the documents of a split do.
      splits: for 'train' and 'validation' a function that starts a fresh iteration over the split's documents.
    """

    name: str
    fingerprint: str
    splits: dict[str, Documents]


def open_corpus(
    corpus: str,
    *,
    files: str = "",
    text_field: str = "text",
    target_field: str | None = None,
    validation_fraction: float = 0.1,
    cache_dir: Path,
) -> Corpus:
    """Opens a corpus; its documents are read when a split is.

    Validation is the data set's own split if it has one; else the round(`validation_fraction` * n) documents, at least
    one, with the smallest content hash, so that equal documents stay together; or, of one document, its last part.

    Args:
      corpus: 'stdlib', the running Python's standard library; 'text', each file a document; 'jsonl', each line of each
        file a JSON object with the document under `text_field`; 'tsv', the same in lines of fields between tabs, whose
        names are the first line; or 'tfds:NAME', a TFDS data set.
      files: for all but 'stdlib' and TFDS: files, folders (all that is in them but hidden files) and globs,
        comma-separated.
      text_field: for 'jsonl', 'tsv' and 'tfds:NAME', where the text is.
      target_field: where the second text of a pair is; then documents are pairs (source, target). None for plain texts.
      validation_fraction: the share of documents, or of the one document's characters, for validation.
      cache_dir: where the TFDS data sets are kept.

    Raises:
      ValueError: if an argument breaks its rule, here; if a document does, or a split is empty, when it is read.
      FileNotFoundError: if an entry of `files` matches nothing.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"data.validation_fraction {validation_fraction} is not between 0 and 1")
    if files and corpus not in FILE_CORPORA:
        raise ValueError(
            f"data.files {files!r} has no use with data.corpus {corpus!r}; only {_list(FILE_CORPORA)} read files"
        )
    if target_field is not None and corpus in ("stdlib", "text"):
        raise ValueError(f"data.corpus {corpus!r} has no pairs of texts; use 'jsonl', 'tsv' or 'tfds:NAME'")
    fields = (text_field,) if target_field is None else (text_field, target_field)
    if corpus == "stdlib":
        names = standard_library.source_files()
        contents = file_contents(standard_library.root() / name for name in names)
        identity = fingerprint([*names, *contents])
        documents: Documents = functools.partial(_read_standard_library, cache_dir / "tfds" / f"stdlib-{identity}")
    elif corpus == "text":
        paths = _list_files(files)
        identity = fingerprint(file_contents(paths))
        documents = functools.partial(_read_text, paths)
    elif corpus in ("jsonl", "tsv"):
        paths = _list_files(files)
        identity = fingerprint([*fields, *file_contents(paths)])
        read_records = _read_jsonl if corpus == "jsonl" else _read_tsv
        documents = functools.partial(_read_fields, paths, read_records, fields)
    elif corpus.startswith("tfds:"):
        from gptjax.data import tfds_sets  # half a second of imports

        name = corpus.removeprefix("tfds:")
        identity, own = tfds_sets.open_data_set(name, fields=fields, data_dir=cache_dir / "tfds")
        if "train" not in own:
            raise ValueError(f"data.corpus {corpus!r} has no split 'train', only {sorted(own)}")
        documents = own["train"]
        if validation := own.get("validation") or own.get("test"):
            return Corpus(corpus, identity, {"train": documents, "validation": validation})
    else:
        raise ValueError(f"data.corpus {corpus!r} is not one of 'stdlib', {_list(FILE_CORPORA)}, 'tfds:NAME'")
    split_identity = fingerprint([identity, repr(validation_fraction)])
    origin = f"data.files {files!r}" if files else f"data.corpus {corpus!r}"
    return Corpus(corpus, split_identity, _split(documents, validation_fraction, origin))


def _split(documents: Documents, validation_fraction: float, origin: str) -> dict[str, Documents]:
    @functools.cache
    def last_validation_digest() -> int | None:  # None: there is one document
        digests = np.sort(np.fromiter(map(_digest, documents()), np.uint64))
        if len(digests) == 0:
            raise ValueError(f"{origin} holds no text")
        if len(digests) == 1:
            return None
        last = digests[max(1, round(validation_fraction * len(digests))) - 1]
        below_all = digests[digests < digests[-1]]  # train keeps at least one document
        if len(below_all) == 0:
            raise ValueError(f"{origin} holds {len(digests)} equal documents, so that none is left for validation")
        return int(min(last, below_all[-1]))

    def read(split: str) -> Iterator[Document]:
        last = last_validation_digest()
        if last is not None:
            yield from (text for text in documents() if (_digest(text) <= last) == (split == "validation"))
            return
        (text,) = documents()
        if not isinstance(text, str):
            raise ValueError(f"{origin} holds one pair of texts, so that none is left for validation")
        cut = int(len(text) * (1 - validation_fraction))
        if not 0 < cut < len(text):
            raise ValueError(f"{origin} holds {len(text)} characters, too few to cut some off for validation")
        yield text[:cut] if split == "train" else text[cut:]

    return {split: functools.partial(read, split) for split in ("train", "validation")}


def _digest(document: Document) -> int:
    text = document if isinstance(document, str) else "\0".join(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _list_files(files: str) -> list[Path]:
    """Returns the files that the comma-separated entries stand for, each once: entries as given, sorted within one."""
    found: dict[Path, None] = {}
    for entry in filter(None, map(str.strip, files.split(","))):
        path = os.path.expanduser(entry)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), "**")
        matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            raise FileNotFoundError(f"data.files: {entry!r} matches no file")
        found |= dict.fromkeys(Path(match).resolve() for match in matches)
    if not found:
        raise ValueError(f"data.files is empty; data.corpus {_list(FILE_CORPORA)} need files, folders or globs")
    return list(found)


def _read_standard_library(folder: Path) -> Iterator[Document]:
    from gptjax.data import tfds_sets  # half a second of imports

    return tfds_sets.read_standard_library(folder)


def _read_text(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.files: {path} is not UTF-8: {error.reason} at byte offset {error.start}") from error
        if text:
            yield text


def _read_fields(
    paths: list[Path], read_records: Callable[[Path], Iterator[tuple[str, dict[str, Any]]]], fields: Sequence[str]
) -> Iterator[Document]:
    """Yields the text, or the pair, under `fields` of each record; those with an empty text are left out."""
    for path in paths:
        for where, record in read_records(path):
            texts = [_text(record, name, field, where) for name, field in zip(("text", "target"), fields, strict=False)]
            if all(texts):
                yield texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _text(record: dict[str, Any], name: str, field: str, where: str) -> str:
    if field not in record:
        raise ValueError(f"data.{name}_field {field!r} is not in {where}, which has {sorted(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"data.{name}_field {field!r} in {where} is not a string: {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair
        raise ValueError(f"data.files: {where} is not Unicode text: {error.reason}") from error
    return text


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each line and its object."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"data.files: {where} is not a JSON object in UTF-8: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"data.files: {where} is not a JSON object but a {type(record).__name__}")
            yield where, record


def _read_tsv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each line after the first and its fields by name; nothing is quoted."""
    names: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            try:
                values = line.decode().rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"data.files: {where} is not UTF-8: {error.reason}") from error
            if not names:
                names = values
            elif len(values) != len(names):
                raise ValueError(f"data.files: {where} has {len(values)} fields; the first line names {len(names)}")
            else:
                yield where, dict(zip(names, values, strict=True))
