"""The data pipeline: a corpus, tokenized and packed once into rows on disk, and read back as batches.

Rows are read in a seeded order by random access, so that one number, the rows consumed so far, is the state of the
data, whatever the number of processes and threads.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.data.cache import build_once, fingerprint
from gptjax.data.corpora import Corpus, open_corpus
from gptjax.data.rows import open_rows, row_dtype, write_rows
from gptjax.data.tokenizers import KINDS, Tokenizer, build_tokenizer

_FORMAT = 1  # of the rows on disk; a new number leaves those of the old format alone

Batch = dict[str, np.ndarray]


class PackedData(NamedTuple):
    """A corpus as rows on disk.

    Attributes:
      path: the folder with the rows and tokenizer.json.
      tokenizer: made from the training documents, or loaded.
      seq_len: T, the length of a row.
      num_rows: by split.
      num_tokens: targets that are not padding, by split.
    """

    path: Path
    tokenizer: Tokenizer
    seq_len: int
    num_rows: dict[str, int]
    num_tokens: dict[str, int]


def prepare(
    *,
    corpus: str,
    files: str,
    text_field: str,
    tokenizer: str,
    vocab_size: int,
    validation_fraction: float,
    seq_len: int,
    cache_dir: Path,
) -> PackedData:
    """Tokenizes and packs a corpus, or finds that done already in `cache_dir`.

    Args:
      corpus, files, text_field, validation_fraction: as `corpora.open_corpus` takes them.
      tokenizer: a kind or path, as `tokenizers.build_tokenizer` takes it.
      vocab_size: V, for the tokenizer 'bpe'.
      seq_len: T, the length of a row.
      cache_dir: the prepared rows lie in a folder of it named by all that determines them.

    Raises:
      ValueError: if an argument or a document breaks its rule, or the training documents do not fill a row.
      FileNotFoundError: if files or the tokenizer are not there.
    """
    cache_dir = Path(cache_dir).expanduser().resolve()
    source = open_corpus(
        corpus, files=files, text_field=text_field, validation_fraction=validation_fraction, cache_dir=cache_dir
    )
    make_tokenizer = functools.partial(build_tokenizer, tokenizer, vocab_size=vocab_size)
    if tokenizer in KINDS:
        identity = f"{tokenizer} {vocab_size if tokenizer == 'bpe' else ''}"
    else:
        identity = Tokenizer.load(tokenizer).to_json()
    key = fingerprint([str(_FORMAT), source.fingerprint, identity, str(seq_len)])
    folder = cache_dir / "rows" / key
    build_once(folder, functools.partial(_write, source, make_tokenizer, seq_len, folder))
    counts = json.loads((folder / "counts.json").read_text())
    return PackedData(folder, Tokenizer.load(folder), seq_len, counts["num_rows"], counts["num_tokens"])


def train_batches(
    data: PackedData,
    *,
    batch_size: int,
    seed: int,
    start_row: int = 0,
    cross_document: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch, None, None]:
    """Returns the training batches, without end, each epoch a new permutation of all rows.

    Global batch n holds the rows `start_row + n * batch_size` and on of one endless sequence, which `seed` alone
    determines. To resume, pass the rows consumed as `start_row`. Closing the iterator ends its threads.

    Args:
      batch_size: the rows of a global batch, over all processes.
      seed: of the permutations, from 0 to 2**32 - 1.
      start_row: the rows consumed before.
      cross_document: let attention and positions run over a whole row, through the documents in it.
      process_index, process_count: which contiguous share of each global batch to return.

    Returns:
      An iterator over dicts of int32 [B, T] `inputs`, `targets`, `segment_ids` and `positions`, and float32 [B, T]
      `loss_weights`, 1 for each target that is not padding; B is this process's share.

    Raises:
      ValueError: if `batch_size` is not divisible by `process_count`.
    """
    share = _process_share(batch_size, process_count)
    import grain  # more than a second of imports

    source = open_rows(data.path, "train", data.num_rows["train"])
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()[start_row:]
    to_batch = functools.partial(_to_batch, data, cross_document)
    # Nothing remains of an endless sequence; but without drop_remainder its length overflows when share is 1.
    batches = rows.batch(share, drop_remainder=True, batch_fn=to_batch)[process_index::process_count]

    def iterate() -> Generator[Batch, None, None]:
        iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
        try:
            yield from iterator
        finally:
            iterator.close()

    return iterate()


def eval_batches(
    data: PackedData,
    split: str = "validation",
    *,
    batch_size: int,
    cross_document: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Returns each row of `split` once, in order, in batches as `train_batches` has them.

    The last batch is filled up with rows of zeros, `loss_weights` included, so that shapes never change.

    Args:
      split: 'train' or 'validation'.
      max_batches: stop after so many; None reads all.
      batch_size, cross_document, process_index, process_count: as in `train_batches`.

    Raises:
      ValueError: if `batch_size` is not divisible by `process_count`.
    """
    share = _process_share(batch_size, process_count)
    num_rows = data.num_rows[split]
    source = open_rows(data.path, split, num_rows)

    def read(batch_start: int) -> Batch:
        start = batch_start + process_index * share
        rows = [source[row] for row in range(start, min(start + share, num_rows))]
        empty_row = bytes(4 * data.seq_len * row_dtype(data.tokenizer.vocab_size, data.seq_len).itemsize)
        return _to_batch(data, cross_document, rows + [empty_row] * (share - len(rows)))

    return map(read, range(0, num_rows, batch_size)[:max_batches])


def _process_share(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    return batch_size // process_count


def _to_batch(data: PackedData, cross_document: bool, rows: Sequence[bytes]) -> Batch:
    dtype = row_dtype(data.tokenizer.vocab_size, data.seq_len)
    packed = np.frombuffer(b"".join(rows), dtype).reshape(-1, 4, data.seq_len)
    inputs, targets, segment_ids, positions = packed.swapaxes(0, 1).astype(np.int32, order="C")
    is_real = segment_ids > 0
    if cross_document:
        segment_ids = is_real.astype(np.int32)
        positions = np.where(is_real, np.arange(data.seq_len, dtype=np.int32), 0)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": is_real.astype(np.float32),
    }


def _write(
    corpus: Corpus, make_tokenizer: Callable[..., Tokenizer], seq_len: int, destination: Path, folder: Path
) -> None:
    """Writes the tokenizer, the rows of both splits, and their counts into `folder`."""
    started = time.monotonic()
    tokenizer = make_tokenizer(documents=corpus.splits["train"])
    tokenizer.save(folder / "tokenizer.json")
    counts = {
        split: write_rows(folder, split, documents, tokenizer, seq_len) for split, documents in corpus.splits.items()
    }
    if counts["train"]["num_tokens"] < seq_len:
        raise ValueError(
            f"data.files: the training documents of data.corpus {corpus.name!r} hold {counts['train']['num_tokens']} "
            f"tokens, which do not fill one row of model.max_seq_len {seq_len}"
        )
    by_kind = {kind: {split: count[kind] for split, count in counts.items()} for kind in counts["train"]}
    (folder / "counts.json").write_text(json.dumps(by_kind, indent=2) + "\n")
    summary = "; ".join(
        f"{split} {c['num_documents']:,} documents, {c['num_bytes']:,} bytes, {c['num_tokens']:,} tokens, "
        f"{c['num_rows']:,} rows"
        for split, c in counts.items()
    )
    seconds = time.monotonic() - started
    print(f"{corpus.name}: {summary}; prepared in {seconds:.1f} s in {destination}", file=sys.stderr)
