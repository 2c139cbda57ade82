"""Files of examples: what they hold, that splits share nothing, and that a model is asked what they say."""

import json
import struct
import zipfile

from experiments import cli, prepare_data
from gptjax.evaluation.task_files import Task, read_task
from gptjax.evaluation.tasks import run_task
from tests.evaluation.test_tasks import subject


def made(*arguments):
    return cli.exit_code(lambda: prepare_data.main([str(a) for a in arguments]))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def catalogue(messages):
    """The bytes of a .mo file: a header, two tables of lengths and places, and the texts."""
    columns = [[text.encode() for text in column] for column in zip(*sorted(messages.items()), strict=True)]
    place, n = 28 + 16 * len(messages), len(messages)
    tables, texts = b"", b""
    for text in columns[0] + columns[1]:
        tables += struct.pack("<2I", len(text), place + len(texts))
        texts += text + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, 0) + tables + texts


def test_pairs(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    assert made("pairs", tmp_path / "out.jsonl", tmp_path / "a.en", tmp_path / "a.de") == 0
    assert read(tmp_path / "out.jsonl")[1] == {"prompt": "two\n", "completion": "zwei", "references": ["zwei"]}
    assert read_task(str(tmp_path / "out.jsonl")).kind == "generate"


def test_splits_of_catalogues_and_descriptions(tmp_path, capsys):
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | {f"message {i}": f"消息 {i}" for i in range(99)}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        more = {"same": "same", "menu\x04open": "打开"}  # not translated; only within a context
        wheel.writestr("a/locale/zh_Hans/LC_MESSAGES/django.mo", catalogue(messages | more))
        wheel.writestr("a/locale/de/LC_MESSAGES/django.mo", catalogue({"message 1": "Nachricht 1"}))
    body = "".join(f" It is a line about program {{0}}, number {i}.\n" for i in range(6))
    entries = [
        f"Package: p{i}\nDescription-en: synopsis {i}\n{body.format(i // 2)} .\n The end.\n\n" for i in range(200)
    ]
    (tmp_path / "Translation-en").write_text("".join(entries) + "Package: q\nDescription-en: short\n Too short.\n\n")
    assert made("catalogues", tmp_path / "zh", tmp_path / "a.whl") == 0
    assert made("descriptions", tmp_path / "debian", tmp_path / "Translation-en") == 0
    assert "the first sentence: rougeL" in capsys.readouterr().out
    for folder, num_sources in (("zh", 99), ("debian", 100)):
        splits = [read(tmp_path / folder / f"{name}.jsonl") for name in ("train", "validation", "test")]
        sources = [{e["prompt"] for e in split} for split in splits]
        assert all(splits) and len(set.union(*sources)) == sum(map(len, splits)) == num_sources
    (first, *_) = read(tmp_path / "zh/train.jsonl")
    assert first["completion"] == first["prompt"].replace("message", "消息")
    assert read(tmp_path / "debian/test.jsonl")[0]["prompt"].endswith("number 5. The end.\n")


def test_middles_are_the_ends_of_lines():
    document = "".join(f"def function_{i}(x):\n    return x + {i}\n\n" for i in range(60))
    examples = list(prepare_data.middles([document], 20))
    for e in examples:
        assert e["prefix"] + e["middle"] + e["suffix"] in document and "\n" not in e["middle"]
        assert e["suffix"].startswith("\n") and e["middle"].strip()
    # A model that was not trained to fill in goes on from what stands before.
    result = run_task(Task("t", "infill", examples[:2]), subject(max_seq_len=512))
    assert [s["prefix_first"] for s in result.samples] == [s["suffix_first"] for s in result.samples]


def test_bad_input(tmp_path, capsys):
    (tmp_path / "short").write_text("Package: q\nDescription-en: short\n Too short.\n\n")
    zipfile.ZipFile(tmp_path / "empty", "w").close()
    (tmp_path / "packed").write_bytes(b"\xfd7zXZ\x00")
    for arguments, words in (
        (["middles", "out", "--num_examples", "0"], "--num_examples 0 must be at least 1"),
        (["catalogues", tmp_path / "out", tmp_path / "short"], "short is no wheel"),
        (["descriptions", tmp_path / "out", tmp_path / "short"], "0 descriptions are too few for three splits"),
        (["catalogues", tmp_path / "out", tmp_path / "empty"], "0 messages in zh_Hans are too few for three splits"),
        (["descriptions", tmp_path / "out", tmp_path / "packed"], "packed is no text in UTF-8; unpack it first"),
        (["pairs", "out", "one"], "pairs needs 2 files, not 1"),
        (["catalogues", "out"], "catalogues needs some files"),
        (["catalogues", "out", "no.whl"], "no.whl: no such file"),
    ):
        assert made(*arguments) == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
