"""The data pipeline: a corpus, tokenized and packed once into rows on disk, and read back as batches.

Rows are read in a seeded order by random access, so that one number, the rows consumed so far, is the state of the
data, whatever the number of processes and threads. What an objective draws at random for a row is seeded by (seed, epoch,
row), so it too depends on nothing else.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.cache import build_once, fingerprint
from gptjax.data.chat import with_template
from gptjax.data.corpora import Corpus, open_corpus
from gptjax.data.examples import make_encoder
from gptjax.data.objectives import (
    SUPERVISED,
    TEXT_IN_ORDER,
    Objective,
    ObjectiveFn,
    decoder_start,
    make_objective,
    special_tokens,
    texts_per_row,
)
from gptjax.data.rows import open_rows, row_dtype, write_rows
from gptjax.data.tokenizers import KINDS, Tokenizer, build_tokenizer

TOO_LONG = ("error", "drop", "truncate")
_FORMAT = 3  # of the rows on disk; a new number leaves those of the old format alone
_EVAL_SEED = 1 << 32  # no run's: theirs are below

Batch = dict[str, np.ndarray]


class PackedData(NamedTuple):
    """A corpus as rows on disk.

    Attributes:
      path: the folder with the rows and tokenizer.json.
      tokenizer: made from the training documents, or loaded.
      seq_len: T, the length of a row.
      objective: what batches ask of a model.
      num_rows: by split.
      num_tokens: targets that are not padding, by split, before an objective chooses among them.
      largest_target: the greatest token or label of all.
      columns: by split, arrays [rows, ...] by name, that are added to the examples.
    """

    path: Path
    tokenizer: Tokenizer
    seq_len: int
    objective: Objective
    num_rows: dict[str, int]
    num_tokens: dict[str, int]
    largest_target: int
    columns: dict[str, dict[str, np.ndarray]]


def prepare(
    *,
    corpus: str,
    files: str,
    validation_files: str = "",
    text_field: str,
    tokenizer: str | Tokenizer,
    vocab_size: int,
    validation_fraction: float,
    seq_len: int,
    cache_dir: Path,
    objective: Objective = Objective(),  # noqa: B008 - immutable
    target_field: str | None = None,
    too_long: str = "drop",
) -> PackedData:
    """Tokenizes and packs a corpus, or finds that done already in `cache_dir`.

    Args:
      corpus, files, validation_files, text_field, validation_fraction: as `corpora.open_corpus` takes them.
      tokenizer: a kind, a path or a tokenizer, as `tokenizers.build_tokenizer` takes it.
      vocab_size: V, for the tokenizer 'bpe'.
      seq_len: T, the length of a row.
      cache_dir: the prepared rows lie in a folder of it named by all that determines them.
      objective: what to train for; rows are the same for all objectives with the same special tokens and frame.
      target_field: as `corpora.open_corpus` takes it, for 'seq2seq' alone: where the targets are.
      too_long: pairs and examples that do not fit in a row are counted, aloud, and an 'error', left out ('drop') or cut
        ('truncate').

    Raises:
      ValueError: if an argument or a document breaks its rule, the training documents do not fill a row, or the tokenizer
        lacks a special token of the objective.
      FileNotFoundError: if files or the tokenizer are not there.
    """
    cache_dir = Path(cache_dir).expanduser().resolve()
    if (objective.name == "seq2seq") != (target_field is not None):
        raise ValueError(
            f"data.target_field {target_field!r}: 'seq2seq' needs one, data.objective {objective.name!r} is set"
        )
    if too_long not in TOO_LONG:
        raise ValueError(f"data.too_long {too_long!r} is not one of {', '.join(TOO_LONG)}")
    source = open_corpus(
        corpus,
        files=files,
        validation_files=validation_files,
        as_records=objective.name in SUPERVISED,
        text_field=text_field,
        target_field=target_field,
        validation_fraction=validation_fraction,
        cache_dir=cache_dir,
    )
    specials = special_tokens(objective.name)
    make_tokenizer = functools.partial(build_tokenizer, tokenizer, vocab_size=vocab_size, special_tokens=specials)
    if isinstance(tokenizer, str) and tokenizer in KINDS:
        identity = " ".join([tokenizer, str(vocab_size) if tokenizer == "bpe" else "", *specials])
    else:
        loaded = make_tokenizer(documents=lambda: iter(()))
        loaded.frame(**objective.frame())  # before its identity, so that one framed in another run is the same
        identity = json.dumps([loaded.roles, loaded.chat_template]) + loaded.to_json()
    rows_of = objective.name if objective.name in SUPERVISED else ""
    settings = [str(objective.frame()), str(seq_len), rows_of, too_long]
    key = fingerprint([str(_FORMAT), source.fingerprint, identity, *settings])
    folder = cache_dir / "rows" / key
    build_once(folder, functools.partial(_write, source, make_tokenizer, seq_len, objective, too_long, folder))
    counts = json.loads((folder / "counts.json").read_text())
    numbers = counts["num_rows"], counts["num_tokens"], max(counts["largest_target"].values())
    return PackedData(folder, Tokenizer.load(folder), seq_len, objective, *numbers, {})


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
      cross_document: of 'causal', let attention and positions run over a whole row, through the documents in it.
      process_index, process_count: which contiguous share of each global batch to return.

    Returns:
      An iterator over dicts of what `objectives.make_objective` says, with an axis B in front, this process's share.

    Raises:
      ValueError: if `batch_size` is not divisible by `process_count`.
    """
    share = _process_share(batch_size, process_count)
    import grain  # more than a second of imports

    source = open_rows(data.path, "train", data.num_rows["train"])
    num_rows, to_example = len(source), _reader(data, "train", cross_document)

    def read(index: int, numbered: tuple[int, bytes]) -> Batch:
        return to_example(*numbered, np.random.default_rng((seed, index // num_rows, numbered[0])))

    numbered = grain.MapDataset.source(source).map_with_index(lambda row, content: (row, content))
    examples = numbered.seed(seed).shuffle().repeat().map_with_index(read)[start_row:]
    # Nothing remains of an endless sequence; but without drop_remainder its length overflows when share is 1.
    batches = examples.batch(share, drop_remainder=True, batch_fn=_stack)[process_index::process_count]

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
    """Returns each row of `split` once, in order, in batches as `train_batches` has them, the same every time.

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
    to_example = _reader(data, split, cross_document)
    padding = empty_batch(data, share)

    def read(batch_start: int) -> Batch:
        start = batch_start + process_index * share
        examples = [
            to_example(row, source[row], np.random.default_rng((_EVAL_SEED, 0, row)))
            for row in range(start, min(start + share, num_rows))
        ]
        return {key: np.stack([*(e[key] for e in examples), *zeros[len(examples) :]]) for key, zeros in padding.items()}

    return map(read, range(0, num_rows, batch_size)[:max_batches])


def empty_batch(data: PackedData, num_rows: int) -> Batch:
    """Returns a batch of `num_rows` rows of padding: the names, shapes and types of every batch."""
    rng = np.random.default_rng(0)
    example = _objective(data)(np.zeros((data.objective.num_fields, data.seq_len), np.int32), rng)
    example |= {name: np.zeros_like(rows[0]) for name, rows in data.columns.get("train", {}).items()}
    return {key: np.zeros((num_rows, *value.shape), value.dtype) for key, value in example.items()}


def target_bytes(data: PackedData) -> np.ndarray | None:
    """Returns the UTF-8 bytes each token stands for, [V], if targets are text read in order; else None."""
    return data.tokenizer.token_bytes if data.objective.name in TEXT_IN_ORDER else None


def _process_share(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    return batch_size // process_count


def _objective(data: PackedData, cross_document: bool = False) -> ObjectiveFn:
    return make_objective(data.objective, data.tokenizer, data.seq_len, cross_document=cross_document)


def _reader(data: PackedData, split: str, cross_document: bool) -> Callable[[int, bytes, np.random.Generator], Batch]:
    """From a row's number and bytes to an example."""
    dtype = row_dtype(data.tokenizer.vocab_size, data.seq_len)
    objective = _objective(data, cross_document)
    columns = data.columns.get(split, {})

    def read(number: int, content: bytes, rng: np.random.Generator) -> Batch:
        # grain counts on in the next epoch.
        example = objective(np.frombuffer(content, dtype).reshape(-1, data.seq_len).astype(np.int32), rng)
        return example | {name: rows[number % len(rows)] for name, rows in columns.items()}

    return read


def _stack(examples: Sequence[Batch]) -> Batch:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _write(
    corpus: Corpus,
    make_tokenizer: Callable[..., Tokenizer],
    seq_len: int,
    objective: Objective,
    too_long: str,
    destination: Path,
    folder: Path,
) -> None:
    """Writes the tokenizer, the rows of both splits, and their counts into `folder`."""
    started = time.monotonic()
    is_pairs, is_supervised = objective.name == "seq2seq", objective.name in SUPERVISED

    def texts() -> Iterator[Any]:
        documents: Iterator[Any] = corpus.splits["train"]()
        if is_supervised:
            return itertools.chain.from_iterable(_strings(record.fields) for record in documents)
        return itertools.chain.from_iterable(documents) if is_pairs else documents

    tokenizer = make_tokenizer(documents=texts)
    tokenizer.frame(**objective.frame())
    if objective.name in ("sft", "dpo"):
        with_template(tokenizer)
    tokenizer.save(folder)
    how: dict[str, Any] = {
        "start_id": decoder_start(tokenizer) if is_pairs else None,
        "encode": make_encoder(objective.name, tokenizer, seq_len) if is_supervised else None,
        "most": texts_per_row(objective.name, seq_len),
        "too_long": too_long,
    }
    counts = {split: write_rows(folder, split, d, tokenizer, seq_len, **how) for split, d in corpus.splits.items()}
    num_long, num_all = (sum(count[name] for count in counts.values()) for name in ("num_too_long", "num_documents"))
    if num_long and too_long == "error":
        raise ValueError(
            f"data.files: {num_long} of {num_all} examples do not fit in a row of {seq_len} tokens, and data.too_long is "
            "'error'; 'drop' leaves them out, 'truncate' cuts their ends off, a greater data.seq_len has room for more"
        )
    for split, count in counts.items():
        if (is_pairs or is_supervised) and not count["num_rows"]:
            raise ValueError(
                f"data.corpus {corpus.name!r}: none of the {count['num_documents']} examples of the {split} split fits in "
                f"a row of {seq_len} tokens"
            )
    if not is_pairs and not is_supervised and counts["train"]["num_tokens"] < seq_len:
        raise ValueError(
            f"data.files: the training documents of data.corpus {corpus.name!r} hold {counts['train']['num_tokens']} "
            f"tokens, which do not fill one row of {seq_len}"
        )
    by_kind = {kind: {split: count[kind] for split, count in counts.items()} for kind in counts["train"]}
    (folder / "counts.json").write_text(json.dumps(by_kind, indent=2) + "\n")
    summary = "; ".join(
        f"{split} {c['num_documents']:,} documents, "
        + (f"{c['num_bytes']:,} bytes, " if c["num_bytes"] else "")
        + f"{c['num_tokens']:,} tokens, "
        f"{c['num_rows']:,} rows"
        + (f", {c['num_too_long']:,} too long (data.too_long={too_long!r})" if c["num_too_long"] else "")
        for split, c in counts.items()
    )
    seconds = time.monotonic() - started
    print(f"{corpus.name}: {summary}; prepared in {seconds:.1f} s in {destination}", file=sys.stderr)


def _strings(value: Any) -> Iterator[str]:
    """The texts within a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
