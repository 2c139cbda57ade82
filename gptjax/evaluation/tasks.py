"""Has a model do the tasks of `task_files`, and measures how well."""

import concurrent.futures
import itertools
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.chat import prompt_ids
from gptjax.data.objectives import decoder_start, document_start, infill_ids
from gptjax.evaluation import sandbox
from gptjax.evaluation import text_metrics as measure
from gptjax.evaluation.likelihood import encode_request, log_likelihoods, windows
from gptjax.evaluation.task_files import Task
from gptjax.evaluation.text_metrics import Measurement
from gptjax.generation.beam import beam_search
from gptjax.generation.engine import Engine
from gptjax.generation.sampling import Sampling
from gptjax.loading import Loaded
from gptjax.models import GPT, EncoderDecoder
from gptjax.pipelines import Pipeline, eos_ids
from gptjax.pipelines.reading import question_answering, text_classification

_BEAM_ROWS = 16  # prompts searched at once
CODE_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. (2021), section 2.1
_GENERATION_METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "f1")


class Settings(NamedTuple):
    """How tasks are done.

    Attributes:
      metrics: of generated texts, names as `text_metrics.text_metric` takes them; () for all that need no choice.
      max_new_tokens: of a generated text; None for 512 of code and 128 of others.
      num_samples: programs written for each problem.
      temperature: of the choice of tokens, 0 for the likeliest.
      num_beams: above 1, texts are searched for.
      stride: tokens of a long text scored at a time, None for half of the model's context.
      seed: of the choice of tokens.
    """

    metrics: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    num_beams: int = 1
    stride: int | None = None
    seed: int = 0


class Subject(NamedTuple):
    """A model to be measured, with what `pipelines.source_facts` says of it."""

    loaded: Loaded
    facts: dict[str, Any]


class Result(NamedTuple):
    """Metrics by name, what the model said for each example, and how many contexts had to be cut on the left to fit."""

    metrics: dict[str, Measurement]
    samples: list[dict[str, Any]]
    num_cut: int = 0


def run_task(task: Task, subject: Subject, settings: Settings = Settings()) -> Result:  # noqa: B008 - immutable
    """Has a model do a task.

    Raises:
      ValueError: a model without the head that the task needs, or what the task's metrics refuse.
    """
    model, head = subject.loaded.model, KINDS[task.kind].head
    families: tuple[type, ...] = (GPT, EncoderDecoder) if task.kind in ("generate", "code") else (GPT,)
    if model.config.head != head or (head == "language_model" and not isinstance(model, families)):
        needed = " or ".join(f.__name__ for f in families) if head == "language_model" else "model"
        raise ValueError(
            f"task {task.name!r} ({task.kind}) needs a {needed} with model.head {head!r}; this is a "
            f"{type(model).__name__} with model.head {model.config.head!r}"
        )
    return KINDS[task.kind].run(task, subject, settings)


def _perplexity(task: Task, subject: Subject, settings: Settings) -> Result:
    """Nats a token, bits a byte, of each source if examples name one; long texts by a sliding window."""
    model, params, tokenizer = subject.loaded
    length = model.config.max_seq_len
    start = document_start(tokenizer)
    requests, owners, num_bytes, samples = [], [], [], []
    for index, example in enumerate(task.examples):
        tokens = tokenizer.encode(example["text"])
        parts = list(windows(tokens, start, length, settings.stride or (length + 1) // 2)) if len(tokens) else []
        requests += parts
        owners += [index] * len(parts)
        # A part's share of the bytes, which a tokenizer need not know of a token.
        num_bytes += [len(example["text"].encode()) * len(p.continuation) / len(tokens) for p in parts]
    nats = [-float(score.log_probs.sum(dtype=np.float64)) for score in log_likelihoods(model, params, requests)]
    tokens = np.array([len(request.continuation) for request in requests])
    owner, of_text = np.array(owners), np.zeros(len(task.examples))
    np.add.at(of_text, owner, nats)
    samples = [{"text": e["text"], "nats": n} for e, n in zip(task.examples, of_text, strict=True)]
    bits, sizes = np.array(nats) / math.log(2), np.array(num_bytes)
    metrics = {
        "perplexity": measure.ratio(nats, tokens, exponential=True),
        "bits_per_byte": measure.ratio(bits, sizes),
    }
    for source in sorted({e["source"] for e in task.examples if "source" in e}):
        here = np.array([task.examples[i].get("source") == source for i in owners])
        metrics[f"bits_per_byte/{source}"] = measure.ratio(bits[here], sizes[here])
    return Result(metrics, samples)


def _last_word(task: Task, subject: Subject, settings: Settings) -> Result:
    """Whether every token of the last word is the likeliest (Paperno et al., 2016, arXiv:1606.06031)."""
    model, params, tokenizer = subject.loaded
    requests = []
    for index, example in enumerate(task.examples):
        match = re.fullmatch(r"(.*\S)(\s+\S+)", example["text"].rstrip(), re.DOTALL)
        if match is None:
            raise ValueError(
                f"task {task.name!r}, example {index} has no word before the last: {example['text']!r:.60}"
            )
        requests.append(encode_request(tokenizer, *match.groups()))
    scores = log_likelihoods(model, params, requests)
    metrics = {
        "accuracy": measure.mean([score.hits.all() for score in scores]),
        "perplexity": measure.ratio([-s.log_probs.sum() for s in scores], [1] * len(scores), exponential=True),
    }
    samples = [{**e, "hit": bool(s.hits.all())} for e, s in zip(task.examples, scores, strict=True)]
    return Result(metrics, samples, sum(score.is_cut for score in scores))


def _choice(task: Task, subject: Subject, settings: Settings) -> Result:
    """Which continuation is likeliest, as it is and by the byte; a space comes between it and its context if none does."""
    model, params, tokenizer = subject.loaded
    requests, answers = [], []
    for index, example in enumerate(task.examples):
        choices, answer = example["choices"], example["answer"]
        answer = choices.index(answer) if answer in choices else answer
        if not isinstance(answer, int) or not 0 <= answer < len(choices) or not all(choices):
            raise ValueError(
                f"task {task.name!r}, example {index}: answer {answer!r} is to be one of its {len(choices)} "
                "choices, counted from 0, and none of them empty"
            )
        answers.append(answer)
        for choice in choices:
            joined = not example["context"] or example["context"][-1].isspace() or choice[0].isspace()
            requests.append(encode_request(tokenizer, example["context"], choice if joined else f" {choice}"))
    scores = log_likelihoods(model, params, requests)
    sums, samples = iter([float(score.log_probs.sum()) for score in scores]), []
    plain, by_bytes = [], []
    for example, answer in zip(task.examples, answers, strict=True):
        logs = np.array([next(sums) for _ in example["choices"]])
        sizes = np.array([len(choice.encode()) for choice in example["choices"]])
        plain.append(int(np.argmax(logs)) == answer)
        by_bytes.append(int(np.argmax(logs / sizes)) == answer)
        samples.append({**example, "log_likelihoods": logs.tolist(), "predicted": int(np.argmax(logs))})
    metrics = {"accuracy": measure.mean(plain), "accuracy_by_bytes": measure.mean(by_bytes)}
    return Result(metrics, samples, sum(score.is_cut for score in scores))


def _generate(task: Task, subject: Subject, settings: Settings) -> Result:
    """Texts beside references."""
    given: list[Any] = [example.get("references", example.get("answer")) for example in task.examples]
    references: list[list[str]] = [known if isinstance(known, list) else [known] for known in given]
    for index, known in enumerate(references):
        if not known or not all(isinstance(text, str) for text in known):
            raise ValueError(f"task {task.name!r}, example {index} has no references, which its metrics need")
    names = settings.metrics or _GENERATION_METRICS
    for name in names:
        measure.text_metric(name, references[0][:1], references[:1])  # says before the work what it refuses
    texts, num_cut = _continue(task, subject, settings, 128, _prompts(task, subject))
    metrics = {name: measure.text_metric(name, [t[0] for t in texts], references) for name in names}
    return Result(metrics, [{**e, "output": t[0]} for e, t in zip(task.examples, texts, strict=True)], num_cut)


def _infill(task: Task, subject: Subject, settings: Settings) -> Result:
    """The rest of a line, asked for in both orders; a model that cannot be asked is given what stands before it."""
    tokenizer = subject.loaded.tokenizer

    def asked(example: dict[str, Any], suffix_first: bool) -> np.ndarray:
        try:
            return infill_ids(tokenizer, example["prefix"], example["suffix"], suffix_first=suffix_first)
        except ValueError:
            return tokenizer.encode(example["prefix"])

    metrics, samples = {}, list(task.examples)
    for name, suffix_first in (("prefix_first", False), ("suffix_first", True)):
        prompts = [asked(example, suffix_first) for example in task.examples]
        texts, num_cut = _continue(task, subject, settings, 64, prompts)
        samples = [sample | {name: text[0]} for sample, text in zip(samples, texts, strict=True)]
        metrics[f"exact_match_{name}"] = measure.mean([sample[name] == sample["middle"] for sample in samples])
    return Result(metrics, samples, num_cut)


def _code(task: Task, subject: Subject, settings: Settings) -> Result:
    """Programs that pass their tests, in a sandbox."""
    sandbox.run("")  # refuses before the work
    texts, num_cut = _continue(task, subject, settings, 512, _prompts(task, subject))

    def passes(example: dict[str, Any], text: str) -> tuple[bool, str]:
        done = secrets.token_hex()  # a program that exits before its tests has not passed them
        program = (
            f"{example['prompt'].rstrip()}{text}\n{example['test']}\ncheck({example['entry_point']})\nprint({done!r})"
        )
        ran = sandbox.run(program)
        return ran.status == 0 and ran.output.rstrip().endswith(done), ran.output.replace(done, "")

    jobs = [(example, text) for example, written in zip(task.examples, texts, strict=True) for text in written]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(passes, *zip(*jobs, strict=True)))
    n = settings.num_samples
    passed = [sum(ok for ok, _ in results[i : i + n]) for i in range(0, len(results), n)]
    metrics = {f"pass@{k}": measure.pass_at_k([n] * len(passed), passed, k) for k in (1, 10, 100) if k <= n}
    samples = [
        {"task_id": e.get("task_id"), "prompt": e["prompt"], "output": text, "passed": ok, "printed": printed[-1000:]}
        for (e, text), (ok, printed) in zip(jobs, results, strict=True)
    ]
    return Result(metrics, samples, num_cut)


def _prompts(task: Task, subject: Subject) -> list[np.ndarray]:
    """The ids of the examples' conversations or prompts."""
    tokenizer, prompts = subject.loaded.tokenizer, []
    for example in task.examples:
        if "messages" in example:
            prompts.append(prompt_ids(tokenizer, example["messages"]))
            continue
        # Byte-level tokenizers write the end of a line with the next one's indentation.
        prompt = example["prompt"].rstrip() if task.kind == "code" else example["prompt"]
        prompts.append(tokenizer.encode_with_specials(prompt).ids)
    return prompts


def _continue(
    task: Task, subject: Subject, settings: Settings, max_new_tokens: int, asked: Sequence[np.ndarray]
) -> tuple[list[list[str]], int]:
    """The model's texts for each of the prompts `asked`, up to where they are to end; and how many were cut."""
    model, params, tokenizer = subject.loaded
    new_tokens = settings.max_new_tokens or max_new_tokens
    is_decoder = not isinstance(model, EncoderDecoder)
    room = model.config.max_seq_len - (min(new_tokens, model.config.max_seq_len // 2) if is_decoder else 0)
    prompts = []
    for ids in asked:
        if not is_decoder and (not len(ids) or ids[-1] != tokenizer.eos_id):
            ids = np.append(ids, tokenizer.eos_id)
        prompts.append(ids if len(ids) else document_start(tokenizer))
    # The longest first: the batch is then at once as large as it gets, and fewer programs are compiled.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    cut = [prompts[i][-room:] for i in order]
    starts = cut if is_decoder else [np.array([decoder_start(tokenizer)])] * len(cut)
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_ids": eos_ids(tokenizer, subject.facts)}
    if settings.num_beams > 1:
        texts = _search(Engine(model, params), starts, None if is_decoder else cut, settings.num_beams, arguments)
    else:
        num_texts = len(starts) * (settings.num_samples if task.kind == "code" else 1)
        needed = -(-(max(map(len, starts)) + new_tokens) // 64) * 64
        engine = Engine(
            model, params, num_slots=min(32, num_texts), cache_len=min(needed, model.config.max_seq_len), grows=False
        )
        texts = engine.generate(
            starts,
            sources=None if is_decoder else cut,
            sampling=Sampling(temperature=settings.temperature),
            num_samples=settings.num_samples if task.kind == "code" else 1,
            seed=settings.seed,
            **arguments,
        )
    results: list[list[str]] = [[]] * len(order)
    for index, written in zip(order, itertools.batched(texts, len(texts) // len(order)), strict=True):
        ends = {"code": CODE_ENDS, "infill": ("\n",)}.get(task.kind, task.examples[index].get("stop", ()))
        results[index] = [cut_at(tokenizer.decode(ids), ends) for ids in written]
    return results, sum(len(ids) > room for ids in prompts)


def cut_at(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of `ends` in it."""
    return text[: min([len(text), *(text.index(end) for end in ends if end in text)])]


def _search(
    engine: Engine,
    prompts: list[np.ndarray],
    sources: list[np.ndarray] | None,
    num_beams: int,
    arguments: dict[str, Any],
) -> list[np.ndarray]:
    """The best text of a beam search for each prompt; neighbours are searched together."""
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), _BEAM_ROWS):
        rows = [min(i, len(prompts) - 1) for i in range(start, start + _BEAM_ROWS)]
        given = None if sources is None else [sources[i] for i in rows]
        results = beam_search(engine, [prompts[i] for i in rows], num_beams=num_beams, sources=given, **arguments)
        found += [texts[0][0] for texts in results]
    return found[: len(prompts)]


def _classify(task: Task, subject: Subject, settings: Settings) -> Result:
    """Labels, or numbers where the model has one output."""
    num_labels = subject.loaded.model.config.num_labels
    named = subject.facts["config"].get("id2label", {})
    names = [named.get(str(i), f"LABEL_{i}") for i in range(num_labels)]
    ids = {name: i for i, name in enumerate(names)} | {str(i): i for i in range(num_labels)}
    labels: list[float] = []
    for index, example in enumerate(task.examples):
        label = example["label"]
        if num_labels == 1:
            labels.append(float(label))
            continue
        if str(label) not in ids:
            raise ValueError(
                f"task {task.name!r}, example {index}: label {label!r} is not one of the model's {num_labels}: 0 to "
                f"{num_labels - 1}, or {', '.join(names)}"
            )
        labels.append(ids[str(label)])
    pipe = Pipeline("text-classification", text_classification, *subject.loaded, subject.facts, {})
    inputs = [{"text": e["text"]} | ({"text_pair": e["text_pair"]} if "text_pair" in e else {}) for e in task.examples]
    function = "none" if num_labels == 1 else "softmax"
    outputs = pipe(inputs, top_k=None, function_to_apply=function)
    if num_labels == 1:
        numbers = [output[0]["score"] for output in outputs]
        samples = [{**e, "output": x} for e, x in zip(task.examples, numbers, strict=True)]
        return Result({m.__name__: m(numbers, labels) for m in (measure.pearson, measure.spearman)}, samples)
    predicted = [ids[output[0]["label"]] for output in outputs]
    confidences = [output[0]["score"] for output in outputs]
    metrics = {
        "accuracy": measure.accuracy(predicted, labels),
        **({"f1": measure.f1(predicted, labels)} if num_labels == 2 else {}),
        "f1_macro": measure.f1(predicted, labels, "macro"),
        "mcc": measure.mcc(predicted, labels),
        "calibration_error": measure.calibration_error(confidences, np.equal(predicted, labels)),
    }
    samples = [
        {**e, "predicted": names[label], "confidence": confidence}
        for e, label, confidence in zip(task.examples, predicted, confidences, strict=True)
    ]
    return Result(metrics, samples)


def _span(task: Task, subject: Subject, settings: Settings) -> Result:
    """Answers found in a context, or none where an example has none."""
    pipe = Pipeline("question-answering", question_answering, *subject.loaded, subject.facts, {})
    references = [e["answers"] or [""] for e in task.examples]
    found = pipe(
        [{"question": e["question"], "context": e["context"]} for e in task.examples],
        max_answer_len=30,
        handle_impossible_answer=not all(e["answers"] for e in task.examples),
    )
    texts = [answer["answer"] if isinstance(answer, dict) else "" for answer in found]
    metrics = {name: measure.text_metric(name, texts, references) for name in ("exact_match", "f1")}
    samples = [{**e, "output": text} for e, text in zip(task.examples, texts, strict=True)]
    return Result(metrics, samples)


class Kind(NamedTuple):
    """The `model.head` that a kind of task needs, and what does it."""

    head: str
    run: Callable[[Task, Subject, Settings], Result]


KINDS = {
    "code": Kind("language_model", _code),
    "choice": Kind("language_model", _choice),
    "span": Kind("span", _span),
    "generate": Kind("language_model", _generate),
    "infill": Kind("language_model", _infill),
    "classify": Kind("sequence_classification", _classify),
    "perplexity": Kind("language_model", _perplexity),
    "last_word": Kind("language_model", _last_word),
}
