"""Passages keep what a document says and where; answers come with their source; and what bad input gets."""

import itertools
import subprocess
import sys

import pytest

from experiments.ask import Passage, answers, read_passages


def test_passages_cover_a_document_and_know_their_lines(tmp_path):
    lines = [" ".join(f"w{number}_{i}" for i in range(number % 7)) for number in range(200)]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.md").write_text("\n".join(lines))
    (tmp_path / "b.png").write_bytes(b"\xff\xfe")
    passages = list(read_passages(tmp_path))
    assert len(passages) > 3
    for passage in passages:
        assert passage.text.split()[0] in lines[passage.line - 1].split()
        assert passage.text in "\n".join(lines)
    words = [passage.text.split() for passage in passages]
    joined = words[0] + [word for _, part in itertools.pairwise(words) for word in part[30:]]
    assert joined == " ".join(lines).split()


def test_answers_come_from_the_likelier_passage_with_their_line(tmp_path):
    def reader(asked, top_k):
        assert top_k == 2
        return [
            [
                {"answer": text, "score": score, "start": item["context"].find(text)}
                for text, score in (("Paris", 0.5), ("Rome", 0.2))
            ]
            for item in asked
        ]

    far = Passage(tmp_path / "far.txt", 1, "Paris Rome")
    near = Passage(tmp_path / "near.txt", 10, "France:\nits capital\nis Paris, not Rome")
    found = answers(reader, "Where?", [(near, 0.9), (far, 0.3)], 2)
    assert [(a["answer"], a["file"], a["line"]) for a in found] == [
        ("Paris", str(near.file), 12),
        ("Rome", str(near.file), 12),
    ]
    assert found[0]["score"] == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        (None, [], "is not a folder"),
        ({"a.png": b"x"}, [], "holds no text"),
        ({"a.txt": b"\xff\xfe"}, [], "a.txt is not UTF-8"),
        ({"a.txt": b"x"}, ["--num_passages", "0"], "--num_passages 0 must be at least 1"),
        ({"a.txt": b"x"}, ["--question", " "], "must not be empty"),
        ({"a.txt": b"x"}, ["--retriever", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(tmp_path, files, flags, words):
    folder = tmp_path / "documents"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    command = [sys.executable, "-m", "experiments.ask", "--documents", str(folder), "--retriever", "r", "--reader", "r"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1
