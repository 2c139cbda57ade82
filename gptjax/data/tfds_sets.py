"""TFDS data sets, as array_record only: the one format that TFDS writes and reads whole without TensorFlow."""

import contextlib
import functools
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from gptjax.data import standard_library
from gptjax.data.cache import build_once, fingerprint
from gptjax.data.corpora import Record


class StandardLibrary(tfds.core.GeneratorBasedBuilder):
    """The running Python's standard library: a split 'train' of documents keyed by their names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}), license="PSF-2.0"
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in standard_library.documents():
            yield name, {"text": text}


def read_standard_library(folder: Path) -> Iterator[str]:
    """Yields the documents of the standard library from `folder`, preparing the data set there if it does not exist."""
    build_once(folder, _write_standard_library)
    builder = tfds.builder_from_directory(folder / StandardLibrary.name / str(StandardLibrary.VERSION))
    return _read_texts(builder, "train", "text")


def _write_standard_library(folder: Path) -> None:
    tfds.disable_progress_bar()  # half a second: bars would only flicker
    builder = StandardLibrary(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    written, read = sum(1 for _ in standard_library.documents()), sum(1 for _ in _read_texts(builder, "train", "text"))
    if read != written:
        raise RuntimeError(f"TFDS wrote {written} documents to {folder} and read back {read}")


def open_data_set(
    name: str, *, fields: Sequence[str], data_dir: Path
) -> tuple[str, dict[str, Callable[[], Iterator[Any]]]]:
    """Opens any TFDS data set, downloading and preparing it if `data_dir` does not hold it yet.

    Args:
      name: as `tfds.builder` takes it: 'lm1b', 'wikipedia/20230601.en'.
      fields: the feature that holds the text, or those of a pair's two texts; none for records of all features.
      data_dir: where TFDS keeps its data sets.

    Returns:
      A fingerprint, and by the data set's own split names functions that read the documents.

    Raises:
      ValueError: if there is no such data set or text feature, or it is not prepared and its host cannot be reached.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"data.corpus 'tfds:{name}': TFDS {tfds.__version__} has no such data set") from error
    text_features = [key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    for option, field in zip(("text_field", "target_field"), fields, strict=False):
        if field not in text_features:
            raise ValueError(f"data.{option} {field!r} is not a text feature of tfds:{name}; it has {text_features}")
    if not builder.is_prepared():
        _check_online(name, builder)
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    splits = sorted(builder.info.splits.items())
    parts = [builder.info.full_name, *fields, *(f"{s}: {info.num_examples} {info.num_bytes}" for s, info in splits)]
    return fingerprint(parts), {s: functools.partial(_read_texts, builder, s, *fields) for s, _ in splits}


def _check_online(name: str, builder: Any) -> None:
    """Tries one of the data set's own addresses: offline, TFDS itself would retry for minutes."""
    for url in list(builder.url_infos or ())[:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
        except urllib.error.HTTPError:
            return  # a server answered
        except OSError as error:
            raise ValueError(
                f"data.corpus 'tfds:{name}' is not prepared in {builder.data_dir}, and {url} cannot be reached: {error}"
            ) from error


def _read_texts(builder: Any, split: str, *fields: str) -> Iterator[Any]:
    """Yields the texts, or pairs of texts, of `split`, but those with an empty text; without fields, records."""
    for number, example in enumerate(builder.as_data_source(split)):
        if not fields:
            yield Record(f"tfds:{builder.info.full_name} {split} {number}", _plain(example))
            continue
        texts = tuple(example[field].decode() for field in fields)
        if all(texts):
            yield texts if len(texts) > 1 else texts[0]


def _plain(value: Any) -> Any:
    """TFDS' arrays and bytes as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value.item() if isinstance(value, np.generic) else value
