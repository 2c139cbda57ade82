"""Write text with a trained model: python -m experiments.generate --model M --prompt TEXT [--num_samples N ...]

M is a workdir, a Hugging Face folder, a GGUF file or a hub name. A single text appears as it is written. --prompts FILE
continues each line of a file, --interactive holds a conversation, --suffix TEXT fills in what is between two texts. A
decoder-only model continues past its context by reading the later half of what it has again; to an encoder-decoder, the
prompt is the source.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments import cli

_GROUP = 128  # prompts of a file that are lined up at once; after each such group the results are written
_CONTEXT = 8  # tokens that decide how the first of a text is spelled


def main(argv: Sequence[str]) -> int:
    """Generates; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir, a folder, a .gguf or a hub name")
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; the best, if not given")
    parser.add_argument("--prompt", metavar="TEXT", help="what the text begins with")
    parser.add_argument("--suffix", metavar="TEXT", help="what follows it, for a model trained with objective 'fim'")
    parser.add_argument("--suffix_first", action="store_true", help="let the model read --suffix before --prompt")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line: text, or in .jsonl an object's field `prompt`"
    )
    parser.add_argument("--output", metavar="FILE", help="new JSON lines of prompt, sample and text, for --prompts")
    parser.add_argument(
        "--interactive", action="store_true", help="a conversation: a line each, /reset, Ctrl-D ends it"
    )
    parser.add_argument("--system", metavar="TEXT", help="what a conversation begins with")
    parser.add_argument("--num_samples", type=int, default=1, help="texts to write for each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="the most tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy, 1 the model's own distribution")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="or among the likeliest that reach this probability")
    parser.add_argument("--min_p", type=float, default=0.0, help="or among those this likely beside the likeliest")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 against tokens of the text")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends it; may be repeated"
    )
    parser.add_argument("--num_beams", type=int, help="search for the likeliest texts instead of sampling")
    parser.add_argument("--draft", metavar="M", help="a smaller model of the same tokens that guesses ahead")
    parser.add_argument("--lookup", action="store_true", help="guess ahead what followed in the text before")
    parser.add_argument(
        "--weights", help="float32, bfloat16, int8 or int4; the model's own, and float32 on CPU, if not given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    arguments = parser.parse(argv)
    check(parser, arguments)

    from gptjax.workdir import environment

    with cli.user_errors():
        writer = open_writer(arguments)
        started = time.perf_counter()
        if arguments.interactive:
            converse(writer)
        elif arguments.prompts is None:
            write_prompt(writer, arguments.prompt or "")
        else:
            write_file(writer, read_prompts(arguments.prompts))
    seconds = time.perf_counter() - started
    metrics = {"generation/tokens": writer.num_tokens, "generation/seconds": seconds}
    cli.write_report(arguments.json, environment(), [arguments.seed], metrics)
    return 0


def check(parser: cli.Parser, a: argparse.Namespace) -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if not 0 <= a.seed < 2**32:
        parser.error(f"--seed {a.seed} must be from 0 to 2**32 - 1")
    if a.num_samples < 1:
        parser.error(f"--num_samples {a.num_samples} must be at least 1")
    if a.num_beams is not None and a.num_beams < a.num_samples:
        parser.error(f"--num_beams {a.num_beams} must be at least --num_samples, {a.num_samples}")
    inputs = {"--prompt": a.prompt is not None, "--prompts": a.prompts is not None, "--interactive": a.interactive}
    if sum(inputs.values()) > 1:
        parser.error(f"only one of {', '.join(name for name, given in inputs.items() if given)} can be given")
    ways = {"--num_beams": a.num_beams, "--draft": a.draft, "--lookup": a.lookup}
    if sum(map(bool, ways.values())) > 1:
        parser.error(f"only one of {', '.join(name for name, given in ways.items() if given)} can be given")
    if a.suffix is not None and (a.prompts or a.interactive):
        parser.error("--suffix goes with --prompt")
    if a.suffix_first and a.suffix is None:
        parser.error("--suffix_first goes with --suffix")
    if a.output is not None and not a.prompts:
        parser.error("--output goes with --prompts")
    if a.output is not None and pathlib.Path(a.output).exists():
        parser.error(f"--output {a.output} exists; name a new file")
    if a.system is not None and not a.interactive:
        parser.error("--system goes with --interactive")
    if a.interactive and a.num_samples > 1:
        parser.error("--interactive gives one answer, so --num_samples must be 1")
    if "" in a.stop:
        parser.error("--stop '' must not be empty")


@dataclasses.dataclass
class Writer:
    """A model ready to write.

    Attributes:
      arguments: the command line.
      engine, draft: of the model and of the one that guesses, or None.
      tokenizer: the model's.
      num_tokens: how many were written.
    """

    arguments: argparse.Namespace
    engine: Any
    draft: Any
    tokenizer: Any
    num_tokens: int = 0


def open_writer(a: argparse.Namespace) -> Writer:
    """Loads what the command line names."""
    import gptjax
    from gptjax.generation.engine import Engine

    model, params, tokenizer = gptjax.load(a.model, step=a.step)
    num_texts = a.num_samples * (_GROUP if a.prompts else 1)
    num_slots = min(32, 1 << (num_texts - 1).bit_length())
    engine = Engine(model, params, num_slots=num_slots, weights=a.weights)
    draft = Engine(*gptjax.load(a.draft)[:2], weights=a.weights) if a.draft else None
    return Writer(a, engine, draft, tokenizer)


def new_ids(w: Writer, prompts: list[Any], sources: list[Any] | None, eos_ids: list[int]) -> Iterator[tuple[int, Any]]:
    """(number of the text, new ids) as they come."""
    from gptjax.generation.beam import beam_search
    from gptjax.generation.sampling import Sampling
    from gptjax.generation.speculative import speculate

    a = w.arguments
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty)
    common: dict[str, Any] = {"max_new_tokens": a.max_new_tokens, "eos_ids": eos_ids}
    if a.num_beams:
        found = beam_search(w.engine, prompts, num_beams=a.num_beams, sources=sources, **common)
        for index, texts in enumerate(found):
            yield from ((index * a.num_samples + i, ids) for i, (ids, _) in enumerate(texts[: a.num_samples]))
    elif a.draft or a.lookup:
        for index in range(len(prompts) * a.num_samples):
            prompt, seed = prompts[index // a.num_samples], (a.seed + index) % 2**32
            yield index, speculate(w.engine, prompt, draft=w.draft, sampling=sampling, seed=seed, **common).tokens
    else:
        yield from w.engine.stream(
            prompts,
            sampling=sampling,
            num_samples=a.num_samples,
            seed=a.seed,
            sources=sources,
            tokens_at_once=4 if len(prompts) * a.num_samples == 1 else 64,
            **common,
        )


def pieces(w: Writer, prompts: list[Any], *, answers: bool = False) -> Iterator[tuple[int, str]]:
    """(number of the text, what it gains) as it comes; `answers` begin anew instead of going on after their prompt."""
    from gptjax.data.objectives import decoder_start
    from gptjax.generation.text import TextStream

    eos_ids, sources = {w.tokenizer.eos_id}, None
    if answers:
        eos_ids |= {w.tokenizer.special_id("<|im_end|>")} - {None}
    contexts = [[] if answers else ids[-_CONTEXT:].tolist() for ids in prompts for _ in range(w.arguments.num_samples)]
    if w.engine.memory_len:
        sources, prompts = prompts, [np.array([decoder_start(w.tokenizer)])] * len(prompts)
        contexts = [[] for _ in contexts]
    streams = [TextStream(w.tokenizer.decode, w.arguments.stop, context) for context in contexts]
    for index, ids in new_ids(w, prompts, sources, sorted(eos_ids)):
        w.num_tokens += len(ids)
        if text := "".join(streams[index].add(int(token)) for token in ids):
            yield index, text
        if all(stream.stopped for stream in streams):
            return
    yield from ((index, text) for index, stream in enumerate(streams) if (text := stream.end()))


def prompt_of(w: Writer, text: str) -> np.ndarray:
    """The ids of a prompt, of which there is always one; with --suffix what asks for the middle."""
    from gptjax.data.objectives import infill_ids

    if w.arguments.suffix is not None:
        return infill_ids(w.tokenizer, text, w.arguments.suffix, suffix_first=w.arguments.suffix_first)
    ids = w.tokenizer.encode_with_specials(text).ids
    return ids if len(ids) else np.array([w.tokenizer.eos_id])  # GPT-2's tokenizer puts nothing before a text


def write_prompt(w: Writer, prompt: str) -> None:
    """Prints the texts of one prompt: one as it is written, several when they are whole."""
    before, after = ("" if w.engine.memory_len else prompt), w.arguments.suffix or ""
    gained = pieces(w, [prompt_of(w, prompt)])
    if w.arguments.num_samples == 1:
        first = next(gained, (0, ""))  # what is wrong is said before anything is printed
        print(before + first[1], end="", flush=True)
        for _, text in gained:
            print(text, end="", flush=True)
        print(after)
        return
    for index, text in enumerate(gather(w, gained, 1)[0]):
        print(f"--- sample {index + 1} ---\n{before}{text}{after}")


def gather(w: Writer, gained: Iterator[tuple[int, str]], num_prompts: int) -> list[list[str]]:
    """The whole texts of each prompt."""
    n = w.arguments.num_samples
    texts = [""] * (n * num_prompts)
    for index, text in gained:
        texts[index] += text
    return [texts[i * n : (i + 1) * n] for i in range(num_prompts)]


def read_prompts(path: str) -> list[str]:
    """The prompts of a file.

    Raises:
      UserError: names the line that holds none.
    """
    lines = pathlib.Path(path).read_text().splitlines()
    if not lines:
        raise cli.UserError(f"--prompts {path} is empty")
    if not path.endswith((".jsonl", ".json")):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise cli.UserError(f"--prompts {path}, line {number}: not an object with a text `prompt`")
        prompts.append(prompt)
    return prompts


def write_file(w: Writer, prompts: list[str]) -> None:
    """Writes a JSON line for each text, a group of prompts after the other, to --output or the terminal."""
    ids = [prompt_of(w, prompt) for prompt in prompts]
    longest = w.engine.memory_len or w.engine.cache_len
    for number, tokens in enumerate(ids, 1):
        if len(tokens) > longest:
            raise cli.UserError(
                f"--prompts {w.arguments.prompts}, line {number}: {len(tokens)} tokens; the model's context holds {longest}"
            )
    with open(w.arguments.output, "x") if w.arguments.output else contextlib.nullcontext(sys.stdout) as out:
        for start in range(0, len(prompts), _GROUP):
            group = ids[start : start + _GROUP]
            for prompt, texts in zip(prompts[start:], gather(w, pieces(w, group), len(group)), strict=False):
                for sample, text in enumerate(texts):
                    print(json.dumps({"prompt": prompt, "sample": sample, "text": text}, ensure_ascii=False), file=out)
            out.flush()


def converse(w: Writer) -> None:
    """Answers line after line; the conversation is the prompt, its oldest turns left out when the context is full."""
    from gptjax.data.chat import prompt_ids

    start = [] if w.arguments.system is None else [{"role": "system", "content": w.arguments.system}]
    turns: list[dict[str, str]] = []
    longest = max(1, w.engine.cache_len - min(w.arguments.max_new_tokens, w.engine.cache_len // 2))
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line == "/reset":
            turns = []
        if not line.strip() or line == "/reset":
            continue
        if w.engine.memory_len:
            prompt = prompt_of(w, line)
        else:
            turns.append({"role": "user", "content": line})
            while len(prompt := prompt_ids(w.tokenizer, start + turns)) > longest and len(turns) > 1:
                turns = turns[2:]
                print("(the context is full; the oldest question and answer are forgotten)", file=sys.stderr)
        answer = ""
        try:
            for _, text in pieces(w, [prompt], answers=True):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            w.engine.reset()  # ends the answer, wherever it was, and not the conversation
        except ValueError as error:  # such as a line too long for the context
            print(f"error: {error}", file=sys.stderr)
            turns = turns[:-1]
            continue
        print(flush=True)
        turns.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    cli.run(main)
