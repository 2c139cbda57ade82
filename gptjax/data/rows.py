"""Packed rows on disk: one array_record a split, one record a row, read by random access."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptjax.data.corpora import Documents
from gptjax.data.packing import pack
from gptjax.data.tokenizers import Tokenizer

_GROUP_CHARACTERS = 1 << 22  # tokenized at once


def row_dtype(vocab_size: int, seq_len: int) -> np.dtype:
    """Returns the smaller of uint16 and int32 that holds tokens, segment_ids and positions."""
    return np.dtype(np.uint16 if max(vocab_size - 1, seq_len) < 1 << 16 else np.int32)


def open_rows(folder: Path, split: str, num_rows: int) -> Sequence[bytes]:
    """Returns the rows of `split` by index, each the bytes of a [4, T] array of `row_dtype`.

    Raises:
      ValueError: if there are not `num_rows` of them.
    """
    import grain  # more than a second of imports

    source = grain.sources.ArrayRecordDataSource(str(_path(folder, split)))
    if len(source) != num_rows:
        raise ValueError(f"{folder} holds {len(source)} {split} rows instead of {num_rows}: delete it")
    return source


def write_rows(folder: Path, split: str, documents: Documents, tokenizer: Tokenizer, seq_len: int) -> dict[str, int]:
    """Tokenizes and packs the documents of `split` into `folder`.

    Returns:
      num_documents, num_bytes (of UTF-8), num_tokens (targets that are not padding), and num_rows.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path, dtype = str(_path(folder, split)), row_dtype(tokenizer.vocab_size, seq_len)
    counts = dict.fromkeys(("num_documents", "num_bytes", "num_tokens", "num_rows"), 0)
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, leave=False, disable=None) as progress:

        def tokenize() -> Iterator[np.ndarray]:
            for group in _groups(documents()):
                num_bytes = sum(len(text.encode()) for text in group)
                counts["num_documents"] += len(group)
                counts["num_bytes"] += num_bytes
                yield from tokenizer.encode_batch(group)
                progress.update(num_bytes)

        writer = ArrayRecordWriter(path, "group_size:1")  # each row by itself: they are read in random order
        for row in pack(tokenize(), seq_len=seq_len, eos_id=tokenizer.eos_id):
            writer.write(row.astype(dtype).tobytes())
            counts["num_rows"] += 1
            counts["num_tokens"] += int(np.count_nonzero(row[2]))
        writer.close()
    reader = ArrayRecordReader(path)
    if reader.num_records() != counts["num_rows"]:
        raise OSError(f"wrote {counts['num_rows']} rows to {path} and found {reader.num_records()}")
    reader.close()
    return counts


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.array_record"


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    """Yields the documents in lists of about `_GROUP_CHARACTERS` together."""
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
