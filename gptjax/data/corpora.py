"""Corpora: where the documents come from, and which of them are for validation."""

import csv
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gptjax.data import standard_library
from gptjax.data.cache import file_contents, fingerprint


class Record(NamedTuple):
    """The fields of an example, and where they stand, for messages."""

    where: str
    fields: dict[str, Any]


Document = str | tuple[str, str] | Record  # a text, a pair of source and target, or an example to be recognised
Documents = Callable[[], Iterator[Document]]
FILE_CORPORA = ("text", "jsonl", "json", "csv", "tsv", "lines")


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
    validation_files: str = "",
    text_field: str = "text",
    target_field: str | None = None,
    as_records: bool = False,
    validation_fraction: float = 0.1,
    cache_dir: Path,
) -> Corpus:
    """Opens a corpus; its documents are read when a split is.

    Validation is `validation_files` or the data set's own split if there is one; else the round(`validation_fraction` * n)
    documents, at least one, with the smallest content hash, so that equal documents stay together, and of questions all of
    one article; or, of one document, its last part.

    Args:
      corpus: 'stdlib', the running Python's standard library; 'text', each file a document; 'jsonl', each line of each
        file a JSON object; 'json', each file an array of objects, or SQuAD's; 'csv', lines whose names are the first line;
        'tsv', the same between tabs and without quotes (a first line with a number in it is no names: the two fields
        are then `text` and `label`); 'lines', two files of which each line is a `source` and a `target`; or 'tfds:NAME', a
        TFDS data set. Names that end in .gz are decompressed.
      files: for all but 'stdlib' and TFDS: files, folders (all that is in them but hidden files) and globs,
        comma-separated. What two entries name is read twice, and so counts twice in training.
      validation_files: the same for validation; empty to take some of `files`.
      text_field: where the text is in what has fields.
      target_field: where the second text of a pair is; then documents are pairs (source, target). None for plain texts.
      as_records: documents are `Record`s with all their fields, whatever those two say.
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
    if (target_field is not None or as_records) and corpus in ("stdlib", "text"):
        raise ValueError(
            f"data.corpus {corpus!r} has texts without fields; use {_list(FILE_CORPORA[1:])} or 'tfds:NAME'"
        )
    if validation_files and corpus not in FILE_CORPORA:
        raise ValueError(f"data.validation_files {validation_files!r} has no use with data.corpus {corpus!r}")
    fields = () if as_records else (text_field,) if target_field is None else (text_field, target_field)
    if corpus == "stdlib":
        names = standard_library.source_files()
        contents = file_contents(standard_library.root() / name for name in names)
        identity = fingerprint([*names, *contents])
        documents: Documents = functools.partial(_read_standard_library, cache_dir / "tfds" / f"stdlib-{identity}")
    elif corpus in FILE_CORPORA:
        identity, documents = _open_files(corpus, files, fields)
        if validation_files:
            own_identity, validation = _open_files(corpus, validation_files, fields)
            return Corpus(corpus, fingerprint([identity, own_identity]), {"train": documents, "validation": validation})
    elif corpus.startswith("tfds:"):
        from gptjax.data import tfds_sets  # half a second of imports

        name = corpus.removeprefix("tfds:")
        identity, own = tfds_sets.open_data_set(name, fields=fields, data_dir=cache_dir / "tfds")
        if "train" not in own:
            raise ValueError(f"data.corpus {corpus!r} has no split 'train', only {sorted(own)}")
        documents = own["train"]
        if held_out := own.get("validation") or own.get("test"):
            return Corpus(corpus, identity, {"train": documents, "validation": held_out})
    else:
        raise ValueError(f"data.corpus {corpus!r} is not one of 'stdlib', {_list(FILE_CORPORA)}, 'tfds:NAME'")
    split_identity = fingerprint([identity, repr(validation_fraction)])
    origin = f"data.files {files!r}" if files else f"data.corpus {corpus!r}"
    return Corpus(corpus, split_identity, _split(documents, validation_fraction, origin))


def _open_files(corpus: str, files: str, fields: Sequence[str]) -> tuple[str, Documents]:
    """A fingerprint of the files, and what reads their documents."""
    paths = _list_files(files)
    if corpus == "text":
        return fingerprint(file_contents(paths)), functools.partial(_read_text, paths)
    if corpus == "lines" and len(paths) != 2:
        raise ValueError(f"data.files {files!r}: data.corpus 'lines' needs two files, of sources and of targets")
    identity = fingerprint([corpus, *fields, *file_contents(paths)])
    return identity, functools.partial(_read_fields, lambda: _read_records(corpus, paths), fields)


def _read_records(corpus: str, paths: list[Path]) -> Iterator[Record]:
    if corpus == "lines":
        return _read_lines(*paths)
    read = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "tsv": _read_tsv}[corpus]
    return itertools.chain.from_iterable(map(read, paths))


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
            raise ValueError(f"{origin} holds one example, so that none is left for validation")
        cut = int(len(text) * (1 - validation_fraction))
        if not 0 < cut < len(text):
            raise ValueError(f"{origin} holds {len(text)} characters, too few to cut some off for validation")
        yield text[:cut] if split == "train" else text[cut:]

    return {split: functools.partial(read, split) for split in ("train", "validation")}


def _digest(document: Document) -> int:
    if isinstance(document, Record):
        fields = document.fields
        of_article = fields.get("title", fields["context"]) if {"question", "context"} <= fields.keys() else None
        text = json.dumps(fields, sort_keys=True) if of_article is None else of_article
    else:
        text = document if isinstance(document, str) else "\0".join(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _list_files(files: str) -> list[Path]:
    """Returns the files that the comma-separated entries stand for: entries as given, sorted within one."""
    found: list[Path] = []
    for entry in filter(None, map(str.strip, files.split(","))):
        path = os.path.expanduser(entry)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), "**")
        matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not matches:
            raise FileNotFoundError(f"data.files: {entry!r} matches no file")
        found += (Path(match).resolve() for match in matches)
    if not found:
        raise ValueError(f"data.files is empty; data.corpus {_list(FILE_CORPORA)} need files, folders or globs")
    return found


def _read_standard_library(folder: Path) -> Iterator[Document]:
    from gptjax.data import tfds_sets  # half a second of imports

    return tfds_sets.read_standard_library(folder)


def _read_text(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with _open(path) as file:
                text = file.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.files: {path} is not UTF-8: {error.reason} at byte offset {error.start}") from error
        if text:
            yield text


def _read_fields(records: Callable[[], Iterator[Record]], fields: Sequence[str]) -> Iterator[Document]:
    """Yields the text, or the pair, under `fields` of each record, but empty ones; without `fields`, records."""
    for record in records():
        if not fields:
            yield record
            continue
        texts = [
            _text(record.fields, n, field, record.where) for n, field in zip(("text", "target"), fields, strict=False)
        ]
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


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name of each line and the line, without its end."""
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield f"{path} line {number}", line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"data.files: {path} line {number} is not UTF-8: {error.reason}") from error


def _object(content: Any, where: str) -> Record:
    if not isinstance(content, dict):
        raise ValueError(f"data.files: {where} is not a JSON object but a {type(content).__name__}")
    return Record(where, content)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            where = f"{path} line {number}"
            try:
                content = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"data.files: {where} is not a JSON object in UTF-8: {error}") from error
            yield _object(content, where)


def _read_json(path: Path) -> Iterator[Record]:
    """Reads an array of objects, or SQuAD's articles, paragraphs and questions (Rajpurkar et al., 2016)."""
    try:
        with _open(path) as file:
            content = json.loads(file.read().decode())
    except ValueError as error:
        raise ValueError(f"data.files: {path} is not JSON in UTF-8: {error}") from error
    if isinstance(content, list):
        yield from (_object(item, f"{path} item {i}") for i, item in enumerate(content, 1))
        return
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                shared = {"title": article.get("title", paragraph["context"]), "context": paragraph["context"]}
                yield from (Record(f"{path} question {qa['id']!r}", shared | qa) for qa in paragraph["qas"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data.files: {path} is neither an array of objects nor laid out as SQuAD: {error!r}"
        ) from error


def _read_csv(path: Path) -> Iterator[Record]:
    with io.TextIOWrapper(_open(path), encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for fields in reader:
                where = f"{path} line {reader.line_num}"
                if None in fields or None in fields.values():
                    raise ValueError(f"data.files: {where} has not the {len(reader.fieldnames or ())} fields of line 1")
                yield Record(where, fields)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"data.files: {path} line {reader.line_num + 1} is not CSV in UTF-8: {error}") from error


def _read_tsv(path: Path) -> Iterator[Record]:
    names: list[str] = []
    for where, line in _lines(path):
        values = line.split("\t")
        if not names:
            if not any(value.replace(".", "", 1).isdigit() for value in values):
                names = values
                continue
            names = ["text", "label"]
            if len(values) != 2:
                raise ValueError(f"data.files: {where} has {len(values)} fields and must name them, as one is a number")
        if len(values) != len(names):
            raise ValueError(f"data.files: {where} has {len(values)} fields; the first line names {len(names)}")
        yield Record(where, dict(zip(names, values, strict=True)))


def _read_lines(sources: Path, targets: Path) -> Iterator[Record]:
    for (where, source), (_, target) in itertools.zip_longest(_lines(sources), _lines(targets), fillvalue=(None, None)):
        if source is None or target is None:
            raise ValueError(f"data.files: {sources} and {targets} have unequal numbers of lines")
        yield Record(str(where), {"source": source, "target": target})
