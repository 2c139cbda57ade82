"""The pipeline: prepared once and whole, read in an order that only the seed determines."""

import itertools
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.data import cache, pipeline, rows
from gptjax.data.pipeline import Batch, PackedData, eval_batches, prepare, train_batches

KEYS = ("inputs", "targets", "segment_ids", "positions", "loss_weights")
ROWS = 23


def prepare_jsonl(folder: Path, texts: list[str], **changes: Any) -> PackedData:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments: dict[str, Any] = {
        "corpus": "jsonl",
        "files": str(file),
        "text_field": "text",
        "tokenizer": "byte",
        "vocab_size": 300,
    }
    arguments |= {"validation_fraction": 0.2, "seq_len": 16, "cache_dir": folder / "cache"}
    return prepare(**arguments | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    texts = [f"{i}: " + "abcdefg" * (i % 5) for i in range(28)]
    return prepare_jsonl(tmp_path_factory.mktemp("data"), texts)


def take(data: PackedData, count: int, **arguments: Any) -> list[Batch]:
    iterator = train_batches(data, **{"batch_size": 4, "seed": 0} | arguments)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def rows_of(batches: list[Batch]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in np.stack([batch[key] for key in KEYS[:4]], axis=1)]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_their_shapes_and_types(data: PackedData) -> None:
    (batch,) = take(data, 1)
    assert tuple(batch) == KEYS
    assert all(batch[key].shape == (4, 16) and batch[key].flags.c_contiguous for key in KEYS)
    assert [str(batch[key].dtype) for key in KEYS] == ["int32"] * 4 + ["float32"]
    np.testing.assert_array_equal(batch["loss_weights"], batch["segment_ids"] > 0)


def test_each_epoch_is_a_new_permutation_of_all_rows(data: PackedData) -> None:
    num_rows = data.num_rows["train"]
    every_row = Counter(rows_of(list(eval_batches(data, "train", batch_size=num_rows))))
    sequence = rows_of(take(data, 3 * num_rows, batch_size=1))
    epochs = [tuple(sequence[i * num_rows : (i + 1) * num_rows]) for i in range(3)]
    assert all(Counter(epoch) == every_row for epoch in epochs)
    other_seed = tuple(rows_of(take(data, num_rows, batch_size=1, seed=1)))
    assert len({*epochs, other_seed}) == 4
    assert rows_of(take(data, num_rows, batch_size=1)) == list(epochs[0])


@pytest.mark.parametrize("consumed", [1, 5, 40])
def test_resuming_continues_exactly(data: PackedData, consumed: int) -> None:
    whole = take(data, consumed + 6)
    assert_equal(take(data, 6, start_row=consumed * 4), whole[consumed:])
    assert rows_of(take(data, 12, batch_size=2, start_row=consumed * 4)) == rows_of(whole[consumed:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_shares_of_the_processes_make_the_global_batch(data: PackedData, process_count: int) -> None:
    def join(shares: Any) -> list[Batch]:
        return [{key: np.concatenate([s[key] for s in parts]) for key in KEYS} for parts in zip(*shares, strict=True)]

    split: dict[str, Any] = {"process_count": process_count}
    shares = [take(data, 12, start_row=8, process_index=p, **split) for p in range(process_count)]
    assert_equal(join(shares), take(data, 12, start_row=8))
    shares = [list(eval_batches(data, batch_size=4, process_index=p, **split)) for p in range(process_count)]
    assert_equal(join(shares), list(eval_batches(data, batch_size=4)))


def test_closing_ends_the_threads(data: PackedData) -> None:
    before = set(threading.enumerate())
    iterator = train_batches(data, batch_size=4, seed=0)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    deadline = time.monotonic() + 5
    while started & set(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started & set(threading.enumerate())


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_evaluation_covers_all_tokens_once(data: PackedData, split: str, batch_size: int) -> None:
    batches = list(eval_batches(data, split, batch_size=batch_size))
    assert len(batches) == -(-data.num_rows[split] // batch_size)
    assert all(batch[key].shape == (batch_size, 16) for batch in batches for key in KEYS)
    assert sum(batch["loss_weights"].sum() for batch in batches) == data.num_tokens[split]
    assert_equal(list(eval_batches(data, split, batch_size=batch_size, max_batches=2)), batches[:2])
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert not targets[data.num_rows[split] :].any()


def test_the_documents_come_back(data: PackedData) -> None:
    texts = {f"{i}: " + "abcdefg" * (i % 5) for i in range(28)}
    found = []
    for split in ("train", "validation"):
        (batch,) = eval_batches(data, split, batch_size=data.num_rows[split])
        targets = batch["targets"][batch["loss_weights"] > 0]
        ends = np.flatnonzero(targets == data.tokenizer.eos_id)
        found += [data.tokenizer.decode(part) for part in np.split(targets, ends)[:-1]]
    assert sorted(found) == sorted(texts)


def test_cross_document_makes_a_row_one_segment(data: PackedData) -> None:
    for plain, crossing in zip(
        eval_batches(data, "train", batch_size=5),
        eval_batches(data, "train", batch_size=5, cross_document=True),
        strict=True,
    ):
        real = plain["segment_ids"] > 0
        np.testing.assert_array_equal(crossing["segment_ids"], real)
        np.testing.assert_array_equal(crossing["positions"], np.where(real, np.arange(16), 0))
        for key in ("inputs", "targets", "loss_weights"):
            np.testing.assert_array_equal(crossing[key], plain[key])
    assert take(data, 1, cross_document=True)[0]["segment_ids"].max() == 1


def test_a_batch_that_processes_cannot_share(data: PackedData) -> None:
    for batches in (lambda **k: train_batches(data, seed=0, **k), lambda **k: eval_batches(data, **k)):
        with pytest.raises(ValueError, match="batch_size 4 is not a positive multiple of the 3 processes"):
            batches(batch_size=4, process_count=3)


def test_prepared_once_and_again_when_an_input_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"some words {i}" for i in range(30)]
    first = prepare_jsonl(tmp_path, texts)
    folders = {
        first.path,
        prepare_jsonl(tmp_path, texts, seq_len=8).path,
        prepare_jsonl(tmp_path, texts, tokenizer="char").path,
        prepare_jsonl(tmp_path, texts, tokenizer="bpe", vocab_size=260).path,
        prepare_jsonl(tmp_path, texts, tokenizer="bpe", vocab_size=261).path,
        prepare_jsonl(tmp_path, texts, validation_fraction=0.5).path,
        prepare_jsonl(tmp_path, [*texts, "more"]).path,
    }
    assert len(folders) == 7
    loaded = prepare_jsonl(tmp_path, texts, tokenizer=str(first.path))
    assert loaded.path not in folders
    assert loaded.num_tokens == first.num_tokens
    monkeypatch.setattr(pipeline, "_write", lambda *_: pytest.fail("prepared again"))
    again = prepare_jsonl(tmp_path, texts, vocab_size=999)  # of no meaning to the tokenizer 'byte'
    assert (again.path, again.num_rows, again.num_tokens) == (first.path, first.num_rows, first.num_tokens)


def test_large_vocabularies_are_stored_whole(data: PackedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [f"some words {i}" for i in range(30)]
    small = prepare_jsonl(tmp_path, texts)
    for module in (pipeline, rows):
        monkeypatch.setattr(module, "row_dtype", lambda *_: np.dtype(np.int32))
    large = prepare_jsonl(tmp_path, texts, cache_dir=tmp_path / "other")
    batches = list(eval_batches(large, "train", batch_size=4))
    monkeypatch.undo()
    assert_equal(batches, list(eval_batches(small, "train", batch_size=4)))


def test_a_train_split_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.files: .* 'jsonl' hold 2 tokens, .* one row of 16"):
        prepare_jsonl(tmp_path, ["aa", "b"])
    assert not list(tmp_path.glob("cache/rows/*/"))


def test_a_short_validation_split_is_padded(tmp_path: Path) -> None:
    data = prepare_jsonl(tmp_path, ["a" * 50, "b"])
    assert min(data.num_rows.values()) == 1


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"some words {i}" for i in range(30)]

    def fail(documents: Any, **_: Any) -> Any:
        yield np.zeros((4, 16), np.int32)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rows, "pack", fail)
        prepare_jsonl(tmp_path, texts)
    assert not list(tmp_path.glob("cache/rows/*/"))
    assert prepare_jsonl(tmp_path, texts).num_rows["train"] > 1


def test_rows_cut_off_later_are_noticed(tmp_path: Path) -> None:
    data = prepare_jsonl(tmp_path, [f"some words {i}" for i in range(30)])
    (data.path / "train.array_record").write_bytes((data.path / "validation.array_record").read_bytes())
    with pytest.raises(ValueError, match=r"train.array_record holds \d+ rows instead of \d+; delete"):
        next(train_batches(data, batch_size=2, seed=0))


def count_build(folder: Path) -> None:
    def build(partial: Path) -> None:
        (partial / "half").touch()
        time.sleep(0.2)
        (folder.parent / f"built-{os.getpid()}").touch()

    cache.build_once(folder, build)


def test_processes_that_want_the_same_folder_build_it_once(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "left by a process that was killed").touch()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_build, args=(tmp_path / "folder",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if "built" not in path.name) == ["folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["half"]
