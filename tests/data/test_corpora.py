"""Corpora: what is read, how it is split, and what is said when it cannot be."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import corpora, standard_library
from gptjax.data.corpora import Corpus, open_corpus


def read(corpus: Corpus, split: str) -> list[str]:
    return list(corpus.splits[split]())


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@given(
    texts=st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=30).filter(lambda t: len(set(t)) > 1),
    fraction=st.floats(0.01, 0.99),
    order=st.randoms(),
)
def test_split_by_document(texts: list[str], fraction: float, order: Any) -> None:
    splits = corpora._split(lambda: iter(texts), fraction, "")
    train, validation = (list(splits[split]()) for split in ("train", "validation"))
    assert train and validation
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)  # equal documents stay together
    assert [text for text in texts if text in set(train)] == train  # in the order of the corpus
    assert list(splits["train"]()) == train
    shuffled = order.sample(texts, len(texts))
    assert set(corpora._split(lambda: iter(shuffled), fraction, "")["validation"]()) == set(validation)


def test_as_many_documents_as_asked_for(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(40)])
    corpus = open_corpus("jsonl", files=str(file), validation_fraction=0.1, cache_dir=tmp_path)
    assert [len(read(corpus, split)) for split in ("train", "validation")] == [36, 4]


@given(length=st.integers(2, 10_000), fraction=st.floats(0.01, 0.9))
def test_one_document_is_cut_by_position(length: int, fraction: float) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    splits = corpora._split(lambda: iter([text]), fraction, "")
    cut = int(length * (1 - fraction))
    if cut == 0:
        with pytest.raises(ValueError, match="too few"):
            next(splits["train"]())
        return
    assert list(splits["train"]()) == [text[:cut]]
    assert list(splits["validation"]()) == [text[cut:]]


def test_the_cut_of_tinyshakespeare() -> None:
    splits = corpora._split(lambda: iter(["x" * 1_115_394]), 0.1, "")
    assert [len(next(splits[split]())) for split in ("train", "validation")] == [1_003_854, 111_540]


def test_text_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/deep/1.txt", "a.txt", "c1.md", "c2.md", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    (tmp_path / "b/empty.txt").touch()
    files = f"{tmp_path}/c*.md, {tmp_path}/b,{tmp_path}/a.txt,{tmp_path}/b/2.txt"
    documents = list(corpora._read_text(corpora._list_files(files)))
    twice = "b/2.txt\r\n"  # named by two entries
    assert documents == ["c1.md\r\n", "c2.md\r\n", twice, "b/deep/1.txt\r\n", "a.txt\r\n", twice]


def test_fingerprint_follows_what_determines_the_splits(tmp_path: Path) -> None:
    def of(kind: str = "text", **arguments: Any) -> str:
        return open_corpus(kind, files=str(tmp_path / "*"), cache_dir=tmp_path, **arguments).fingerprint

    (tmp_path / "a").write_text("one")
    first = of()
    assert of() == first
    assert len({first, of(validation_fraction=0.2), of("jsonl"), of("jsonl", text_field="body")}) == 4
    (tmp_path / "a").rename(tmp_path / "b")
    assert of() == first
    (tmp_path / "b").write_text("two")
    assert of() != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good \xff", r"data\.files: .*bad is not UTF-8: .* byte offset 5"),
        (b"", r"data\.files .* holds no text"),
        (b"x", r"data\.files .* 1 characters, too few"),
    ],
)
def test_bad_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(open_corpus("text", files=str(tmp_path / "bad"), cache_dir=tmp_path), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "open', r"data\.files: .*bad line 3 is not a JSON object"),
        (b'{"text": "\xff"}', r"data\.files: .*bad line 3 is not a JSON object in UTF-8"),
        (b'{"text": "\\ud800"}', r"data\.files: .*bad line 3 is not Unicode text: surrogates"),
        (b'["text"]', r"data\.files: .*bad line 3 is not a JSON object but a list"),
        (b'{"body": "x", "id": 1}', r"data\.text_field 'text' is not in .*bad line 3, which has \['body', 'id'\]"),
        (b'{"text": 5}', r"data\.text_field 'text' in .*bad line 3 is not a string: 5"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "bad").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read(open_corpus("jsonl", files=str(tmp_path / "bad"), cache_dir=tmp_path), "train")


@pytest.mark.parametrize(
    ("corpus", "files", "fraction", "message"),
    [
        ("wiki", "", 0.1, r"data\.corpus 'wiki' is not one of 'stdlib', 'text', 'jsonl', 'json', .*'tfds:NAME'"),
        ("text", "", 0.1, r"data\.files is empty"),
        ("jsonl", "/no/such/file", 0.1, r"data\.files: '/no/such/file' matches no file"),
        ("stdlib", "book.txt", 0.1, r"data\.files 'book.txt' has no use with data\.corpus 'stdlib'"),
        ("stdlib", "", 1.0, r"data\.validation_fraction 1\.0 is not between 0 and 1"),
        ("stdlib", "", 0.0, r"data\.validation_fraction 0\.0 is not between 0 and 1"),
        ("tfds:no_such_set", "", 0.1, r"data\.corpus 'tfds:no_such_set': .* no such data set"),
    ],
)
def test_bad_arguments(tmp_path: Path, corpus: str, files: str, fraction: float, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_corpus(corpus, files=files, validation_fraction=fraction, cache_dir=tmp_path)


def test_equal_documents_cannot_be_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "same.jsonl", ["same"] * 3)
    with pytest.raises(ValueError, match=r"data\.files .* holds 3 equal documents"):
        read(open_corpus("jsonl", files=str(file), cache_dir=tmp_path), "validation")


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = standard_library.source_files()
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py", "LICENSE.txt"} <= {*names, "LICENSE.txt"}
    assert not [name for name in names if "site-packages" in name or name.startswith(("test/", "/"))]

    monkeypatch.setattr(
        standard_library, "source_files", lambda: ["json/decoder.py", "argparse.py", standard_library._TOPICS]
    )
    expected = [text for _, text in standard_library.documents()]
    corpus = open_corpus("stdlib", cache_dir=tmp_path)
    assert not (tmp_path / "tfds").exists()  # opening reads only what the fingerprint needs
    train, validation = read(corpus, "train"), read(corpus, "validation")
    assert sorted(train + validation) == sorted(expected)
    assert len(validation) == round(0.1 * len(expected))
    assert open_corpus("stdlib", cache_dir=tmp_path).fingerprint == corpus.fingerprint
    assert read(open_corpus("stdlib", cache_dir=tmp_path), "train") == train


@pytest.fixture(scope="module")
def tiny_texts() -> Iterator[str]:
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        """Two configs, with and without a validation split."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="train_only"), tfds.core.BuilderConfig(name="with_test")]  # noqa: RUF012

        def _info(self) -> Any:
            features = {"body": tfds.features.Text(), "label": tfds.features.Scalar(np.int32)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> Any:
            splits = {"train": 10, "test": 3} if self.builder_config.name == "with_test" else {"train": 10}
            return {split: self._generate_examples(split, count) for split, count in splits.items()}

        def _generate_examples(self, split: str, count: int) -> Any:
            for i in range(count):
                yield i, {"body": f"{split} é {i}", "label": i}

    yield TinyTexts.name


def test_tfds_set(tmp_path: Path, tiny_texts: str) -> None:
    own = open_corpus(f"tfds:{tiny_texts}/with_test", text_field="body", cache_dir=tmp_path)
    assert sorted(read(own, "train")) == [f"train é {i}" for i in range(10)]
    assert sorted(read(own, "validation")) == [f"test é {i}" for i in range(3)]
    by_document = open_corpus(f"tfds:{tiny_texts}/train_only", text_field="body", cache_dir=tmp_path)
    assert [len(read(by_document, split)) for split in ("train", "validation")] == [9, 1]
    assert by_document.fingerprint != own.fingerprint
    with pytest.raises(ValueError, match=r"data\.text_field 'text' is not a text feature .*\['body'\]"):
        open_corpus(f"tfds:{tiny_texts}/with_test", cache_dir=tmp_path)


def test_offline_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        ValueError, match=r"data\.corpus 'tfds:tiny_shakespeare' is not prepared in .* cannot be reached"
    ):
        open_corpus("tfds:tiny_shakespeare", cache_dir=tmp_path)


def test_local_corpora_import_no_tfds(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, pathlib; from gptjax.data import pipeline; from gptjax.data.corpora import open_corpus;"
        f"open_corpus('stdlib', cache_dir=pathlib.Path({str(tmp_path)!r}));"
        "heavy = {'tensorflow_datasets', 'grain', 'jax', 'array_record'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
