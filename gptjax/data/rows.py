"""Packed rows on disk: one array_record a split, one record a row, read by random access."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptjax.data.corpora import Document, Documents
from gptjax.data.examples import Encode, Example
from gptjax.data.packing import pack, pack_pairs, pack_whole
from gptjax.data.tokenizers import Tokenizer

_GROUP_CHARACTERS = 1 << 22  # tokenized at once


def row_dtype(vocab_size: int, seq_len: int) -> np.dtype:
    """Returns the smaller of uint16 and int32 that holds tokens, segment_ids and positions."""
    return np.dtype(np.uint16 if max(vocab_size - 1, seq_len) < 1 << 16 else np.int32)


def open_rows(folder: Path, split: str, num_rows: int) -> Sequence[bytes]:
    """Returns the rows of `split` by index, each the bytes of a [fields, T] array of `row_dtype`.

    Raises:
      ValueError: if there are not `num_rows` of them, or the file is gone or damaged.
    """
    import grain  # more than a second of imports

    path = _path(folder, split)
    try:
        source = grain.sources.ArrayRecordDataSource(str(path))
        found = len(source)
    except Exception as error:  # the library raises what C++ raises
        problem = "is damaged" if path.exists() else "is gone"
        raise ValueError(f"{path} {problem}; delete {folder} to have it prepared again") from error
    if found != num_rows:
        raise ValueError(f"{path} holds {found} rows instead of {num_rows}; delete {folder} to have it prepared again")
    return source


def write_rows(
    folder: Path,
    split: str,
    documents: Documents,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    start_id: int | None = None,
    encode: Encode | None = None,
    most: int | None = None,
    too_long: str = "drop",
) -> dict[str, int]:
    """Tokenizes and packs the documents of `split` into `folder`.

    Args:
      start_id: where documents are pairs, what a decoder's input begins with.
      encode: where they are records, what makes examples of them.
      most: of examples that are read whole, how many a row may have; None for others.
      too_long: of pairs and examples that do not fit in a row, 'truncate' cuts the ends off, and the rest leaves them out.

    Returns:
      num_documents, num_bytes (of UTF-8), num_tokens (targets that are not padding), num_rows, num_too_long, the pairs and
      examples of which a text does not fit in a row, and largest_target.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path, dtype = str(_path(folder, split)), row_dtype(tokenizer.vocab_size, seq_len)
    names = ("num_documents", "num_bytes", "num_tokens", "num_rows", "num_too_long", "largest_target")
    counts = dict.fromkeys(names, 0)
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, leave=False, disable=None) as progress:

        def tokenize() -> Iterator[list[np.ndarray]]:
            """Yields each document's ids, of a pair two."""
            for group in _groups(documents()):
                texts = [text for document in group for text in _texts(document)]
                num_bytes = sum(len(text.encode()) for text in texts)
                counts["num_documents"] += len(group)
                counts["num_bytes"] += num_bytes
                ids = iter(tokenizer.encode_batch(texts))
                yield from ([next(ids) for _ in _texts(document)] for document in group)
                progress.update(num_bytes)

        def fitting() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for source, target in tokenize():
                is_long = max(len(source), len(target)) >= seq_len  # with an end
                counts["num_too_long"] += is_long
                if not is_long or too_long == "truncate":
                    yield source[: seq_len - 1], target[: seq_len - 1]

        def examples(encode: Encode) -> Iterator[list[Example]]:
            for record in documents():
                counts["num_documents"] += 1
                groups = encode(record)  # type: ignore[arg-type]
                is_long = any(_length(group) > seq_len for group in groups)
                counts["num_too_long"] += is_long
                if is_long and too_long == "truncate":
                    groups = [
                        [_cut(example, seq_len // len(group), most is not None) for example in group]
                        for group in groups
                    ]
                    groups = [group for group in groups if most or all(other.any() for _, _, other in group)]
                if not is_long or too_long == "truncate":
                    yield from groups

        if encode is not None:
            packed = pack_whole(examples(encode), seq_len=seq_len, most=most)
        elif start_id is None:
            packed = pack((ids for (ids,) in tokenize()), seq_len=seq_len, eos_id=tokenizer.eos_id)
        else:
            packed = pack_pairs(fitting(), seq_len=seq_len, eos_id=tokenizer.eos_id, start_id=start_id)
        writer = ArrayRecordWriter(path, "group_size:1")  # each row by itself: they are read in random order
        for row in packed:
            writer.write(row.astype(dtype).tobytes())
            counts["num_rows"] += 1
            counts["num_tokens"] += int(np.count_nonzero(row[2]))
            counts["largest_target"] = max(counts["largest_target"], int(row[1].max()))
        writer.close()
    reader = ArrayRecordReader(path)
    if reader.num_records() != counts["num_rows"]:
        raise OSError(f"wrote {counts['num_rows']} rows to {path} and found {reader.num_records()}")
    reader.close()
    return counts


def _length(group: list[Example]) -> int:
    return sum(example.shape[1] for example in group)


def _cut(example: Example, length: int, is_whole: bool) -> Example:
    """The beginning of an example; of one that is read whole, with its last token, which is special."""
    if example.shape[1] <= length:
        return example
    return np.concatenate([example[:, : length - 1], example[:, -1:]], axis=1) if is_whole else example[:, :length]


def _texts(document: Document) -> tuple[str, ...]:
    return (document,) if isinstance(document, str) else document  # type: ignore[return-value]


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.array_record"


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yields the documents in lists of about `_GROUP_CHARACTERS` together."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += sum(map(len, _texts(document)))
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
