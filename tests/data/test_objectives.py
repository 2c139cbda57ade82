"""Objectives: what is hidden comes back, rates are right, and only (seed, epoch, row) decides."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import tokenizers as huggingface

from experiments import build, cli
from gptjax.data.objectives import (
    NUM_SENTINELS,
    OBJECTIVES,
    SUPERVISED,
    Example,
    Objective,
    decoder_start,
    infill_ids,
    make_objective,
    special_tokens,
    target_len,
)
from gptjax.data.packing import pack, pack_pairs
from gptjax.data.pipeline import PackedData, empty_batch, eval_batches, prepare, target_bytes, train_batches
from gptjax.data.tokenizers import Tokenizer, build_tokenizer

SEQ_LEN = 64
WORDS = ["alpha", "be", "gamma", "delta", "x1", "(y)", "naïve", "日本", "+="]
_rng = np.random.default_rng(0)
TEXTS = [" ".join(_rng.choice(WORDS, _rng.integers(0, 120))) for _ in range(150)]


def tokenizer_for(name: str, kind: str = "bpe") -> Tokenizer:
    return build_tokenizer(kind, documents=lambda: iter(TEXTS), vocab_size=400, special_tokens=special_tokens(name))


def rows_of(tokenizer: Tokenizer, seq_len: int = SEQ_LEN) -> list[np.ndarray]:
    return list(pack(tokenizer.encode_batch(TEXTS), seq_len=seq_len, eos_id=tokenizer.eos_id))


def apply(objective: Objective, tokenizer: Tokenizer, rows: list[np.ndarray]) -> list[Example]:
    fn = make_objective(objective, tokenizer, rows[0].shape[1])
    originals = [row.copy() for row in rows]
    examples = [fn(row, np.random.default_rng((7, 0, i))) for i, row in enumerate(rows)]
    np.testing.assert_array_equal(rows, originals)  # nothing is changed in place
    return examples


def joined(examples: list[Example], key: str) -> np.ndarray:
    return np.stack([example[key] for example in examples])


def pieces(segment_ids: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(segment_ids == number) for number in range(1, segment_ids.max() + 1)]


def assert_rate(count: float, total: float, rate: float) -> None:
    """Within five deviations of a binomial."""
    assert abs(count - total * rate) < 5 * (total * rate * (1 - rate)) ** 0.5


def test_masked_hides_at_bert_s_rates_and_never_a_special_token() -> None:
    tokenizer = tokenizer_for("masked")
    rows = rows_of(tokenizer)
    examples = apply(Objective("masked"), tokenizer, rows)
    inputs, targets, weights = (joined(examples, key) for key in ("inputs", "targets", "loss_weights"))
    original, segment_ids = np.stack(rows)[:, 0], np.stack(rows)[:, 2]
    np.testing.assert_array_equal(targets, original)
    np.testing.assert_array_equal(inputs[weights == 0], original[weights == 0])
    can = (segment_ids > 0) & (original != tokenizer.eos_id)
    assert not weights[~can].any()
    assert_rate(weights.sum(), can.sum(), 0.15)
    chosen = weights > 0
    masks, kept = inputs[chosen] == tokenizer.mask_id, inputs[chosen] == original[chosen]
    assert_rate(masks.sum(), chosen.sum(), 0.8)
    assert_rate(kept.sum(), chosen.sum(), 0.1 + 0.1 / tokenizer.vocab_size)
    random = inputs[chosen][~masks & ~kept]
    assert not tokenizer.is_special[random].any()
    assert len(np.unique(random)) > 0.6 * min(len(random), tokenizer.vocab_size)  # not always the same


@pytest.mark.parametrize("kind", ["bpe", "byte", "char", "wordpiece"])
def test_whole_words_are_masked_whole(tmp_path: Path, kind: str) -> None:
    if kind == "wordpiece":
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), "本", "日"]
        tokens += [f"##{chr(c)}" for c in range(97, 123)] + ["al", "##pha", "de", "##lta"]
        (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
        kind = str(tmp_path)
    tokenizer = tokenizer_for("masked", kind)
    rows = rows_of(tokenizer)
    examples = apply(Objective("masked", whole_word=True), tokenizer, rows)
    total = hidden = 0
    for example, row in zip(examples, rows, strict=True):
        for piece in pieces(row[2]):
            # Words by another way: the characters that each token ends at, in the text of the piece.
            text, ends = "", [0]
            for place in piece:
                text = tokenizer.decode(row[0][piece[0] : place + 1])
                ends.append(len(text.rstrip("\ufffd")))
            weights = example["loss_weights"][piece]
            for start, end in word_spans(text):
                inside = [i for i in range(len(piece)) if max(start, ends[i]) < min(end, ends[i + 1])]
                assert len({weights[i] for i in inside}) <= 1, (text[start:end], weights)
                total, hidden = total + 1, hidden + bool(inside and weights[inside[0]])
    assert total > 1000
    assert_rate(hidden, total, 0.15)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where runs of ASCII letters are."""
    spans, position = [], 0
    for is_word, group in itertools.groupby(text, lambda c: c.isascii() and c.isalpha()):
        length = len(list(group))
        spans += [(position, position + length)] if is_word else []
        position += length
    return spans


def test_words_of_byte_level_tokens() -> None:
    tokenizer = tokenizer_for("masked", "byte")
    edges = tokenizer.word_edges
    words, previous = [], 1
    for token in tokenizer.encode("don't  x12 naïve 日本x"):
        first, last = edges[:, token]
        if first == 0 or (first > 2 and first == previous):
            words[-1] += bytes([token])
        else:
            words.append(bytes([token]))
        previous = last
    expected = [
        "don",
        "'",
        "t",
        " ",
        " ",
        "x",
        "12",
        " ",
        "naïve",
        " ",
        "日",
        "本x",
    ]  # the end of a cut character is a letter
    assert [word.decode() for word in words] == expected


def test_prefix_is_a_prefix_of_each_document_and_loss_comes_after_it() -> None:
    tokenizer = tokenizer_for("prefix")
    rows = rows_of(tokenizer)
    shares = []
    for example, row in zip(apply(Objective("prefix"), tokenizer, rows), rows, strict=True):
        for key, value in zip(("inputs", "targets", "segment_ids", "positions"), row, strict=True):
            np.testing.assert_array_equal(example[key], value)
        for piece in pieces(row[2]):
            size = int(example["prefix"][piece].sum())
            assert 1 <= size <= len(piece)
            assert example["prefix"][piece][:size].all()
            np.testing.assert_array_equal(example["loss_weights"][piece], np.arange(len(piece)) >= size - 1)
            shares += [size / len(piece)] if len(piece) > 20 else []
        padding = row[2] == 0
        assert not example["prefix"][padding].any() and not example["loss_weights"][padding].any()
    assert example["prefix"].dtype == bool
    assert 0.4 < np.mean(shares) < 0.6 and min(shares) < 0.15 and max(shares) > 0.85


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_fim_can_be_undone(rate: float) -> None:
    tokenizer = tokenizer_for("fim")
    pre, suf, mid = (tokenizer.special_id(name) for name in special_tokens("fim"))
    rows = rows_of(tokenizer)
    orders = {"PSM": 0, "SPM": 0, "plain": 0}
    sizes, prompted, inside_tokens = [], 0, 0
    for example, row in zip(apply(Objective("fim", fim_rate=rate), tokenizer, rows), rows, strict=True):
        for key, value in zip(("segment_ids", "positions"), row[2:], strict=True):
            np.testing.assert_array_equal(example[key], value)
        assert not example["loss_weights"][row[2] == 0].any()
        for piece in pieces(row[2]):
            inputs, targets, was = example["inputs"][piece], example["targets"][piece], row[0][piece]
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            length = int(example["loss_weights"][piece].sum())
            np.testing.assert_array_equal(example["loss_weights"][piece], np.arange(len(piece)) < length)
            if pre not in inputs:
                np.testing.assert_array_equal(inputs, was)
                np.testing.assert_array_equal(targets, row[1][piece])
                assert length == len(piece)
                orders["plain"] += len(piece) > 4
                continue
            opening = was[:1] if was[0] == tokenizer.eos_id else was[:0]
            tokens = [*inputs[:length], targets[length - 1]][len(opening) :]
            assert tokens[0] == pre and tokens[-1] == tokenizer.eos_id
            s, m = tokens.index(suf), tokens.index(mid)
            parts = tokens[1:s], tokens[m + 1 : -1], tokens[s + 1 : m]
            before, middle, after = (tokenizer.decode(part) for part in parts)
            # In both orders, as the prefix is in the middle's place or its own; a character in two parts is lost.
            text, original = before + middle + after, tokenizer.decode(was[len(opening) : -3]).strip("\ufffd")
            assert text.strip("\ufffd") in original
            sizes.append((len(text), len(original)))
            is_spm = s == 1 and m - s > 1
            orders["SPM" if is_spm else "PSM"] += 1
            if original.startswith(before + middle) and not is_spm:  # as one who asks for the middle writes it
                prompted += 1
                asked = infill_ids(tokenizer, before, original[len(before + middle) :])
                np.testing.assert_array_equal(tokens[:m], asked[:m])
                inside_tokens += not np.array_equal(tokens[1:s], tokenizer.encode(original)[: s - 1])
    total = sum(orders.values())
    assert_rate(orders["plain"], total, 1 - rate) if 0 < rate < 1 else None
    assert (orders["plain"] == total) == (rate == 0) and (orders["plain"] == 0) == (rate == 1)
    if rate:
        assert_rate(orders["SPM"], orders["PSM"] + orders["SPM"], 0.5)
        kept, had = np.sum(sizes, axis=0)
        assert 0.9 * had < kept < had  # a cut costs a token or two, of pieces of forty
        assert prompted > 100 * rate and inside_tokens > prompted / 4


def undo_span(tokenizer: Tokenizer, source: np.ndarray, target: np.ndarray) -> list[int]:
    """The text of a source with each sentinel replaced by what follows it in the target."""
    sentinels = [tokenizer.special_id(name) for name in special_tokens("span")]
    assert source[-1] == target[-1] == tokenizer.eos_id
    spans: list[list[int]] = []
    for token in target[:-1].tolist():
        if token in sentinels:
            assert token == sentinels[len(spans)]  # each once, in order
            spans.append([])
        else:
            spans[-1].append(token)
    assert all(spans)
    parts = [spans[sentinels.index(t)] if t in sentinels else [t] for t in source[:-1].tolist()]
    assert [t for t in source.tolist() if t in sentinels] == sentinels[: len(spans)]
    return list(itertools.chain.from_iterable(parts))


def test_span_corruption_can_be_undone() -> None:
    tokenizer = tokenizer_for("span")
    rows, objective = rows_of(tokenizer), Objective("span")
    examples = apply(objective, tokenizer, rows)
    noise = spans = kept = dropped = 0
    for example, row in zip(examples, rows, strict=True):
        texts = [row[1][piece] for piece in pieces(row[2])]
        texts = [text[:-1] if text[-1] == tokenizer.eos_id else text for text in texts]
        texts = [text.tolist() for text in texts if len(text) > 1]
        assert pieces(example["segment_ids"]) and len(example["inputs"]) == target_len(objective, SEQ_LEN)
        found = []
        for number in range(1, example["segment_ids"].max() + 1):
            here, there = example["segment_ids"] == number, example["encoder_segment_ids"] == number
            inputs, target, source = example["inputs"][here], example["targets"][here], example["encoder_tokens"][there]
            np.testing.assert_array_equal(inputs, [decoder_start(tokenizer), *target[:-1]])
            for key, mask in (("positions", here), ("encoder_positions", there)):
                np.testing.assert_array_equal(example[key][mask], np.arange(mask.sum()))
            found.append(undo_span(tokenizer, source, target))
            if len(found[-1]) > 30:
                num_spans = int(tokenizer.is_special[target].sum()) - 1
                noise, spans = noise + len(target) - 1 - num_spans, spans + num_spans
                kept += len(source) - 1 - num_spans
        assert found == [text for text in texts if text in found]
        dropped += len(texts) - len(found)
        np.testing.assert_array_equal(example["loss_weights"], example["segment_ids"] > 0)
    assert 0.14 < noise / (noise + kept) < 0.16
    assert 2.5 < noise / spans < 3.5
    assert dropped < 0.02 * len(rows)


def test_more_spans_than_sentinels_get_longer() -> None:
    tokenizer = tokenizer_for("span")
    tokens = np.tile(tokenizer.encode(TEXTS[0] + TEXTS[1]), 100)[:5000]
    (row,) = pack([tokens], seq_len=5001, eos_id=tokenizer.eos_id)
    (example,) = apply(Objective("span"), tokenizer, [row])
    source, target = (example[key][example[key] > 0] for key in ("encoder_tokens", "targets"))
    assert undo_span(tokenizer, source, target) == tokens.tolist()
    assert tokenizer.is_special[target].sum() == NUM_SENTINELS + 1


@pytest.mark.parametrize("name", ["span", "masked", "fim", "prefix"])
def test_tiny_documents_fit_in_their_shapes(name: str) -> None:
    tokenizer = tokenizer_for(name, "byte")
    documents = [tokenizer.encode(text) for text in ["", "a", "bc", "def", "", "ghij"] * 20]
    rows = list(pack(documents, seq_len=24, eos_id=tokenizer.eos_id))
    examples = apply(Objective(name, fim_rate=1.0), tokenizer, rows)
    shapes = {tuple((k, v.shape, str(v.dtype)) for k, v in example.items()) for example in examples}
    assert len(shapes) == 1
    zeros = make_objective(Objective(name), tokenizer, 24)(np.zeros((4, 24), np.int32), np.random.default_rng(0))
    assert tuple((k, v.shape, str(v.dtype)) for k, v in zeros.items()) in shapes
    assert not any(value.any() for value in zeros.values())


def test_pairs_are_packed_whole_and_stay_together() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(1, 90, rng.integers(0, 15)), rng.integers(1, 90, rng.integers(0, 15))) for _ in range(200)]
    rows = list(pack_pairs(pairs, seq_len=32, eos_id=99, start_id=98))
    assert len(rows) < 100
    found = []
    for row in rows:
        example = make_objective(Objective("seq2seq"), tokenizer_for("seq2seq", "byte"), 32)(row, rng)
        assert example["segment_ids"].max() == example["encoder_segment_ids"].max()
        for number in range(1, example["segment_ids"].max() + 1):
            here, there = example["segment_ids"] == number, example["encoder_segment_ids"] == number
            inputs, targets, source = (
                example["inputs"][here],
                example["targets"][here],
                example["encoder_tokens"][there],
            )
            assert targets[-1] == source[-1] == 99
            np.testing.assert_array_equal(inputs, [98, *targets[:-1]])
            for key, mask in (("positions", here), ("encoder_positions", there)):
                np.testing.assert_array_equal(example[key][mask], np.arange(mask.sum()))
            found.append((source[:-1].tolist(), targets[:-1].tolist()))
        np.testing.assert_array_equal(example["loss_weights"], example["segment_ids"] > 0)
    assert found == [(source.tolist(), target.tolist()) for source, target in pairs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    lines = [{"source": text[:40], "target": text[:40][::-1], "text": text} for text in TEXTS if text]
    records = [
        {
            "prompt": text[:9],
            "text": text[:30],
            "completion": text[9:20] + "x",
            "chosen": text[:2] + "y",
            "rejected": "no",
        }
        | {"label": len(text) % 2, "question": text[:6], "context": text[:30], "answers": []}
        for text in TEXTS
        if text
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = ["source\ttarget\ttext"] + ["\t".join(line.values()) for line in lines]
    (folder / "texts.tsv").write_text("\n".join(table) + "\n")
    return folder


def prepared(folder: Path, name: str, **changes: Any) -> PackedData:
    is_pairs = name == "seq2seq"
    arguments: dict[str, Any] = {
        "corpus": "jsonl",
        "files": str(folder / ("records.jsonl" if name in SUPERVISED else "texts.jsonl")),
        "text_field": "source" if is_pairs else "text",
        "target_field": "target" if is_pairs else None,
        "tokenizer": "bpe",
        "vocab_size": 400,
        "validation_fraction": 0.2,
        "seq_len": 2 * SEQ_LEN if name == "dpo" else SEQ_LEN,
        "cache_dir": folder / "cache",
        "objective": Objective(name),
    }
    return prepare(**arguments | changes)


def take(data: PackedData, count: int, **arguments: Any) -> list[Example]:
    iterator = train_batches(data, **{"batch_size": 4, "seed": 0} | arguments)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def same(left: list[Example], right: list[Example]) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


def concatenated(shares: list[list[Example]]) -> list[Example]:
    return [{key: np.concatenate([s[key] for s in parts]) for key in parts[0]} for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_is_the_same_on_any_start_and_process(folder: Path, name: str) -> None:
    data = prepared(folder, name)
    num_rows = data.num_rows["train"]
    whole = take(data, num_rows)  # four epochs
    assert same(take(data, 3, start_row=4 * (num_rows - 3)), whole[-3:])
    assert same(
        take(data, 4, batch_size=2, start_row=8),
        [{k: v[i : i + 2] for k, v in b.items()} for b in whole[2:4] for i in (0, 2)],
    )
    assert same(concatenated([take(data, 5, process_index=i, process_count=2) for i in range(2)]), whole[:5])
    shapes = {key: (value.shape, value.dtype) for key, value in empty_batch(data, 4).items()}
    for batch in [*whole, *eval_batches(data, batch_size=4)]:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == shapes
    once, again = (list(eval_batches(data, batch_size=4)) for _ in range(2))
    assert same(once, again)
    assert same(
        concatenated([list(eval_batches(data, batch_size=4, process_index=i, process_count=2)) for i in range(2)]), once
    )
    assert same(list(eval_batches(data, batch_size=4, max_batches=1)), once[:1])


@pytest.mark.parametrize("num_threads", [1, 5])
def test_threads_change_nothing(folder: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(folder, "masked")
    expected = take(data, 20)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    monkeypatch.setattr(grain, "ReadOptions", lambda **_: options)
    assert same(take(data, 20), expected)


@pytest.mark.parametrize("name", ["prefix", "fim", "masked", "span"])
def test_epochs_and_seeds_differ(folder: Path, name: str) -> None:
    data = prepared(folder, name)
    num_rows = data.num_rows["train"]
    epochs = [
        {bytes(np.concatenate([row.ravel().view(np.uint8) for row in batch.values()])) for batch in batches}
        for batches in itertools.batched(take(data, 2 * num_rows, batch_size=1), num_rows)
    ]
    other = take(data, num_rows, batch_size=1, seed=1)
    epochs.append({bytes(np.concatenate([row.ravel().view(np.uint8) for row in batch.values()])) for batch in other})
    for one, two in itertools.combinations(epochs, 2):
        assert len(one & two) < 0.2 * num_rows
    if name == "masked":  # each row by itself, too
        assert len({batch["loss_weights"].tobytes() for batch in other}) > 0.9 * num_rows


def test_rows_are_shared_by_objectives_with_the_same_tokens(folder: Path) -> None:
    assert prepared(folder, "prefix").path == prepared(folder, "causal").path
    assert prepared(folder, "masked").path != prepared(folder, "causal").path


def test_bytes_of_targets_only_where_targets_are_text(folder: Path) -> None:
    for name in OBJECTIVES:
        sizes = target_bytes(prepared(folder, name))
        assert (sizes is None) == (name in ("masked", "span", "dpo", "classification", "question_answering"))
        assert sizes is None or np.isfinite(sizes).all()


def test_pairs_from_a_table_are_those_of_the_objects(folder: Path) -> None:
    table = prepared(folder, "seq2seq", corpus="tsv", files=str(folder / "texts.tsv"))
    assert same(take(table, 5), take(prepared(folder, "seq2seq"), 5))
    tokenizer = table.tokenizer
    for batch in eval_batches(table, batch_size=1):
        source, target = (
            batch["encoder_tokens"][batch["encoder_segment_ids"] == 1],
            batch["targets"][batch["segment_ids"] == 1],
        )
        assert tokenizer.decode(source) == tokenizer.decode(target)[::-1] != ""


def test_pairs_that_do_not_fit_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared(folder, "seq2seq", tokenizer="byte", seq_len=40)
    words = capsys.readouterr().err
    assert re.search(r"\d+ too long \(data\.too_long='drop'\)", words)
    assert data.num_rows["train"] >= 1
    with pytest.raises(ValueError, match=r"none of the \d+ examples of the train split fits in a row of 2 tokens"):
        prepared(folder, "seq2seq", tokenizer="byte", seq_len=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "body"}, r"data\.text_field 'body' is not in .* line 1"),
        ({"target_field": "body"}, r"data\.target_field 'body' is not in .* line 1"),
        ({"corpus": "text"}, r"data\.corpus 'text' has texts without fields"),
        ({"target_field": None}, r"data\.target_field None: 'seq2seq' needs one"),
    ],
)
def test_bad_pairs(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(folder, "seq2seq", **changes)


def test_a_table_with_a_broken_line(tmp_path: Path) -> None:
    (tmp_path / "bad.tsv").write_text("source\ttarget\na\tb\na\n")
    with pytest.raises(ValueError, match=r"bad\.tsv line 3 has 1 fields; the first line names 2"):
        prepared(tmp_path, "seq2seq", corpus="tsv", files=str(tmp_path / "bad.tsv"))


def test_a_loaded_tokenizer_must_have_the_special_tokens(folder: Path, tmp_path: Path) -> None:
    build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0).save(tmp_path)
    for name, message in (
        ("masked", r"lacks special tokens .*: <\|mask\|>$"),
        ("fim", r": <\|fim_prefix\|>, <\|fim_suffix\|>, <\|fim_middle\|>$"),
        ("span", r"<\|sentinel_0\|>.* \.\.\. <\|sentinel_99\|>, 100 in all"),
    ):
        with pytest.raises(ValueError, match=r"data\.tokenizer .*" + message):
            prepared(folder, name, tokenizer=str(tmp_path))


def test_a_loaded_tokenizer_s_own_names_are_used() -> None:
    names = {"masked": ["[MASK]"], "fim": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]}
    names["span"] = [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
    for name, own in names.items():
        inner = huggingface.Tokenizer.from_str(tokenizer_for("causal", "byte").to_json())
        inner.add_special_tokens(own)
        tokenizer = Tokenizer(inner)
        assert [tokenizer.special_id(wanted) for wanted in special_tokens(name)] == [inner.token_to_id(t) for t in own]
        apply(Objective(name), tokenizer, rows_of(tokenizer))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_wants_its_model(name: str) -> None:
    objective = ("data.objective", name)
    fields = {
        "masked": [("model.family", "bert"), ("model.head", "masked_lm")],
        "span": [("model.family", "encoder_decoder"), ("model.num_encoder_layers", "2")],
        "prefix": [("model.prefix_lm", "true")],
    }
    fields["seq2seq"] = fields["span"]
    fields["classification"] = [("model.family", "bert"), ("model.head", "sequence_classification")]
    fields["question_answering"] = [("model.family", "bert"), ("model.head", "span")]
    right = [objective, *fields.get(name, [])]
    build.check(cli.load_config("configs/default.py", right))
    wrong_family = "encoder_decoder" if "bert" in dict(right).values() else "bert"
    for wrong in ([("model.family", wrong_family)], [("model.head", "none")]):
        with pytest.raises(cli.UserError, match=rf"config\.data\.objective='{name}' needs config\.model\."):
            build.check(cli.load_config("configs/default.py", right + wrong))
    if name in ("causal", "fim", "prefix"):
        with pytest.raises(cli.UserError, match=r"needs config\.model\.prefix_lm="):
            opposite = ("model.prefix_lm", str(name != "prefix").lower())
            build.check(cli.load_config("configs/default.py", [*right, opposite]))
