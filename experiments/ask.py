"""Ask documents: python -m experiments.ask --documents DIR --retriever M --reader M [--question TEXT] [--json_lines]

The retriever, a sentence encoder such as MiniLM, finds the passages that are most like the question; the reader, a model
with a span head such as one trained with configs/xquad_minilm.py, marks the answer in them. Each answer comes with its
file, the line it stands in, and the passage. Without --question, questions are read from standard input, a line each.
"""

import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import cli

SUFFIXES = (".txt", ".md", ".rst")
_WORDS = 120  # of a passage, about what a sentence encoder was trained on
_OVERLAP = 30  # words that a passage shares with the next, so that an answer is whole in one of them


class Passage(NamedTuple):
    """A part of a document.

    Attributes:
      file: where it stands.
      line: the number of its first line, from 1.
      text: as it is there.
    """

    file: pathlib.Path
    line: int
    text: str


def main(argv: Sequence[str]) -> int:
    """Answers; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--documents", required=True, metavar="DIR", help=f"its {', '.join(SUFFIXES)} files are read")
    parser.add_argument("--retriever", required=True, metavar="M", help="an encoder, for one vector a text")
    parser.add_argument("--reader", required=True, metavar="M", help="a model with the head 'span'")
    parser.add_argument("--question", metavar="TEXT", help="what to ask; standard input, if not given")
    parser.add_argument("--num_passages", type=int, default=5, help="that the reader sees")
    parser.add_argument("--num_answers", type=int, default=1, help="to give for each question")
    parser.add_argument("--json_lines", action="store_true", help="print an object for each answer")
    arguments = parser.parse(argv)
    for name in ("num_passages", "num_answers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.question is not None and not arguments.question.strip():
        parser.error(f"--question {arguments.question!r} must not be empty")
    passages = list(read_passages(pathlib.Path(arguments.documents)))

    from gptjax import pipeline
    from gptjax.models import BERT
    from gptjax.pipelines import embeddings
    from gptjax.workdir import environment

    with cli.user_errors():
        retriever = pipeline("feature-extraction", arguments.retriever)
        reader = pipeline("question-answering", arguments.reader)
        if not isinstance(retriever.model, BERT):
            raise cli.UserError(
                f"--retriever {arguments.retriever} is a {type(retriever.model).__name__}; texts are compared by an encoder"
            )
        longest = retriever.model.config.max_seq_len

        def embed(texts: Sequence[str]) -> np.ndarray:
            # What is beyond the context, in a passage of very long words, is not searched; the reader reads all of it.
            encoded = (retriever.tokenizer.encode_with_specials(text) for text in texts)
            return np.stack(embeddings(retriever, [type(e)(*(x[:longest] for x in e)) for e in encoded]))

        index = embed([passage.text for passage in passages])
        lines = sys.stdin if arguments.question is None else [arguments.question]
        for question in (line.strip() for line in lines):
            if question:
                similarity = index @ embed([question])[0]
                nearest = np.argsort(-similarity, kind="stable")[: arguments.num_passages]
                found = [(passages[i], float(similarity[i])) for i in nearest]
                for answer in answers(reader, question, found, arguments.num_answers):
                    print(json.dumps(answer, ensure_ascii=False) if arguments.json_lines else show(answer), flush=True)
    cli.write_report(arguments.json, environment(), [], {"ask/passages": len(passages)})
    return 0


def read_passages(folder: pathlib.Path) -> Iterator[Passage]:
    """Cuts the documents of a folder into passages that overlap.

    Raises:
      UserError: it is no folder, or holds no text; names the file that is not UTF-8.
    """
    if not folder.is_dir():
        raise cli.UserError(f"--documents {folder} is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    found = False
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise cli.UserError(f"--documents: {file} is not UTF-8: {error}") from error
        words = list(re.finditer(r"\S+", text))
        for start in range(0, max(1, len(words) - _OVERLAP), _WORDS - _OVERLAP):
            part = words[start : start + _WORDS]
            if part:
                found = True
                begin = part[0].start()
                yield Passage(file, 1 + text.count("\n", 0, begin), text[begin : part[-1].end()])
    if not found:
        raise cli.UserError(f"--documents {folder} holds no text in {', '.join(SUFFIXES)} files")


def answers(
    reader: Any, question: str, passages: Sequence[tuple[Passage, float]], num_answers: int
) -> list[dict[str, Any]]:
    """The best answers of passages, given with their similarity to the question; each text once, best first.

    The reader's probabilities add up to 1 in every passage, with an answer in it or not; so an answer's score is the
    probability times the similarity.
    """
    asked = [{"question": question, "context": passage.text} for passage, _ in passages]
    best: dict[str, dict[str, Any]] = {}
    for (passage, similarity), spans in zip(passages, reader(asked, top_k=num_answers), strict=True):
        for span in spans if isinstance(spans, list) else [spans]:
            answer = {"question": question, "answer": span["answer"], "score": max(0.0, similarity) * span["score"]}
            answer["file"], answer["passage"] = str(passage.file), passage.text
            answer["line"] = passage.line + passage.text.count("\n", 0, span["start"])
            if answer["score"] > best.get(span["answer"], {"score": -1})["score"]:
                best[span["answer"]] = answer
    return sorted(best.values(), key=lambda answer: -answer["score"])[:num_answers]


def show(answer: dict[str, Any]) -> str:
    """For the terminal."""
    passage = " ".join(answer["passage"].split())
    return f"{answer['answer']}  (score {answer['score']:.2f}, {answer['file']}:{answer['line']})\n    {passage}"


if __name__ == "__main__":
    cli.run(main)
