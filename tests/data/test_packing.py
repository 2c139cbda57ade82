"""Packing loses nothing, duplicates nothing, and never lets a target cross into another document."""

import doctest

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import packing

EOS = 99
documents_strategy = st.lists(st.lists(st.integers(0, 98), max_size=20), max_size=12)
shapes = {"documents": documents_strategy, "seq_len": st.integers(1, 9), "block": st.integers(1, 40)}


def pack(documents: list[list[int]], seq_len: int, block: int = 1 << 20) -> np.ndarray:
    arrays = (np.array(document, np.int32) for document in documents)
    original, packing._BLOCK_TOKENS = packing._BLOCK_TOKENS, block
    try:
        rows = list(packing.pack(arrays, seq_len=seq_len, eos_id=EOS))
    finally:
        packing._BLOCK_TOKENS = original
    return np.stack(rows) if rows else np.zeros((0, 4, seq_len), np.int32)


@given(**shapes)
def test_nothing_is_lost_duplicated_or_reordered(documents: list[list[int]], seq_len: int, block: int) -> None:
    inputs, targets, segment_ids, _ = pack(documents, seq_len, block).swapaxes(0, 1)
    real = segment_ids > 0
    assert targets[real].tolist() == [token for document in documents for token in [*document, EOS]]
    assert inputs[real].tolist() == [token for document in documents for token in [EOS, *document]]


@given(**shapes)
def test_rows_equal_a_plain_reference(documents: list[list[int]], seq_len: int, block: int) -> None:
    stream = [
        (source, target, index, offset)
        for index, document in enumerate(documents)
        for offset, (source, target) in enumerate(zip([EOS, *document], [*document, EOS], strict=True))
    ]
    expected = []
    for start in range(0, len(stream), seq_len):
        row = stream[start : start + seq_len]
        first_in_row: dict[int, int] = {}
        for _, _, index, offset in row:
            first_in_row.setdefault(index, offset)
        segments = {index: 1 + rank for rank, index in enumerate(first_in_row)}
        columns = [(i, t, segments[index], offset - first_in_row[index]) for i, t, index, offset in row]
        expected.append(np.array(columns + [(0, 0, 0, 0)] * (seq_len - len(row))).T)
    rows = pack(documents, seq_len, block)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, np.array(expected).reshape(-1, 4, seq_len))


@given(**shapes)
def test_only_the_end_of_the_last_row_is_padding(documents: list[list[int]], seq_len: int, block: int) -> None:
    rows = pack(documents, seq_len, block)
    padding = (rows[:, 2] == 0).ravel()
    assert padding.sum() < seq_len
    assert not padding[: len(padding) - padding.sum()].any()
    assert not rows.swapaxes(1, 2).reshape(-1, 4)[padding].any()


@given(**shapes)
def test_a_target_is_the_next_input_of_its_document(documents: list[list[int]], seq_len: int, block: int) -> None:
    inputs, targets, segment_ids, positions = pack(documents, seq_len, block).swapaxes(0, 1)
    same_document = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    assert (targets[:, :-1][same_document] == inputs[:, 1:][same_document]).all()
    assert (np.diff(positions, axis=1)[same_document] == 1).all()
    last_of_document = (segment_ids[:, 1:] > segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    assert (targets[:, :-1][last_of_document] == EOS).all()


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(packing).failed == 0
