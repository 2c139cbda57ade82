"""The one-line tasks: `pipeline(task, model)` gives a function of texts that returns what Transformers' of that name does.

Question answering, translation and text-to-text, which Transformers 5 dropped, return what its last version 4 did.
"""

import dataclasses
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import loading
from gptjax.array_types import Array, Params
from gptjax.data.chat import prompt_ids
from gptjax.data.examples import windows
from gptjax.data.objectives import decoder_start, document_start
from gptjax.data.tokenizers import Encoded, Tokenizer
from gptjax.generation.engine import Engine
from gptjax.generation.sampling import Sampling
from gptjax.models import BERT, GPT, EncoderDecoder, Model

_ROWS = 8  # texts that a model reads at once
# What a generating task does where neither the call nor the model's files say; `top_k` counts if it samples.
_SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 256}
_GREEDY = {"do_sample": False, "max_new_tokens": 256}
_CHOOSING = ("temperature", "top_k", "top_p", "min_p")  # only where it samples
# What a model's files may ask for and generation does not do, with the values that ask for nothing.
_UNSUPPORTED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
    "bad_words_ids": None,
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A task with its model: call it with inputs, and with arguments that then replace those given to `pipeline`.

    Attributes:
      task: a name in `TASKS`.
      model, params, tokenizer: as `gptjax.load` gives them.
      facts: as `source_facts` gives them.
      arguments: of every call.
    """

    task: str
    model: Model
    params: Params
    tokenizer: Tokenizer
    facts: dict[str, Any]
    arguments: dict[str, Any]

    @functools.cached_property
    def engine(self) -> Engine:
        """What writes texts; made at the first call that does."""
        return Engine(self.model, self.params, num_slots=_ROWS)

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Does the task; see the function of that name in this module for inputs, arguments and what it returns."""
        return _task(self.task).function(self, *inputs, **(self.arguments | arguments))


def pipeline(task: str, model: Any, **arguments: Any) -> Pipeline:
    """Makes a one-line task.

    >>> generator = pipeline("text-generation", model="gpt2")  # doctest: +SKIP
    >>> generator("The quick brown fox jumps over the ", max_length=50, num_return_sequences=3)  # doctest: +SKIP

    Args:
      task: a name in `TASKS`, or 'translation_XX_to_YY'.
      model: a workdir, a Hugging Face folder, a GGUF file or a hub name, as `gptjax.load` takes it, or what that returned.
      arguments: of every call.

    Raises:
      ValueError: an unknown task, a source that cannot be loaded, or a model without the head that the task needs.
    """
    needs = _task(task)
    facts: dict[str, Any] = {}
    if isinstance(model, str | os.PathLike):
        path = _local(model)
        facts, model = source_facts(path), loading.load(path)
    module, params, tokenizer = model
    family, head = type(module).__name__, module.config.head
    if not isinstance(module, needs.families) or (needs.head and head != needs.head):
        families = " or ".join(kind.__name__ for kind in needs.families)
        with_head = f" with model.head {needs.head!r}" if needs.head else ""
        raise ValueError(f"task {task!r} needs a {families}{with_head}; this is a {family} with model.head {head!r}")
    if needs.generates:
        for name, neutral in _UNSUPPORTED.items():
            wanted = _file_defaults(task, facts).get(name, neutral)
            if wanted != neutral:
                warnings.warn(f"the model's files ask for {name}={wanted}, which gptjax does not do", stacklevel=2)
    return Pipeline(task, module, params, tokenizer, facts, arguments)


def source_facts(source: str | os.PathLike) -> dict[str, Any]:
    """What a model's files say besides its weights and tokens.

    Args:
      source: as `pipeline` takes it.

    Returns:
      `config` and `generation_config`, the contents of the files of that name; {} where there is none, and for a workdir,
      whose config.json is not a model's.

    Raises:
      ValueError: no such source, or a file that is not a JSON object.
    """
    path = _local(source)
    files = {name: path / f"{name}.json" for name in ("config", "generation_config")}
    is_workdir = (path / "model.json").exists()
    return {name: _read_object(file) if file.exists() and not is_workdir else {} for name, file in files.items()}


def eos_ids(tokenizer: Tokenizer, facts: dict[str, Any]) -> list[int]:
    """The tokens that end a text: what the model's files say in `facts`, else the tokenizer's own."""
    ids = facts.get("generation_config", {}).get("eos_token_id")
    ids = tokenizer.eos_id if ids is None else ids
    return ids if isinstance(ids, list) else [ids]


def _local(source: str | os.PathLike) -> pathlib.Path:
    """The file or folder of a source, for a hub name the one that was fetched."""
    path = pathlib.Path(source).expanduser()
    return path if path.exists() else loading.fetch(os.fspath(source))


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object but a {type(content).__name__}")
    return content


def text_generation(pipe: Pipeline, inputs: Any, *, return_full_text: bool = True, **generation: Any) -> list[Any]:
    """Continues prompts, or answers in chats.

    Args:
      pipe: with a decoder-only language model.
      inputs: one prompt or several; or one chat, [{'role': ..., 'content': ...}, ...], or several, written out by the
        tokenizer's chat template. A chat whose last message is the assistant's is continued there.
      return_full_text: whether texts begin with their prompt, and chats are whole and not the answer alone.
      generation: max_new_tokens, or max_length with the prompt; do_sample, temperature, top_k, top_p, min_p,
        repetition_penalty; num_return_sequences; seed, None for a new one each time. What is not given comes from the
        model's files: `task_specific_params` in config.json, then generation_config.json; and else is what Transformers
        has: sampling at temperature 0.7 among 50 tokens, for at most 256.

    Returns:
      [{'generated_text': text}, ...], `num_return_sequences` of them, for a chat the messages with the answer after them;
      for several prompts or chats a list of such lists.

    Raises:
      ValueError: a prompt longer than the context or than max_length, numbers out of range, a chat for a tokenizer without
        a template or that is none.
    """
    alone = isinstance(inputs, str) or _is_chat(inputs)
    items = [inputs] if alone else inputs if isinstance(inputs, list) and any(map(_is_chat, inputs)) else _texts(inputs)
    prompts = [_prompt(pipe, item) for item in items]
    new, num_samples = _generate(pipe, prompts, _SAMPLES, generation)
    results = []
    for i, item in enumerate(items):
        texts = [pipe.tokenizer.decode(ids) for ids in new[i * num_samples : (i + 1) * num_samples]]
        results.append([{"generated_text": _join(item, text) if return_full_text else text} for text in texts])
    return results[0] if alone else results


def _is_chat(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and isinstance(item[0], dict)


def _prompt(pipe: Pipeline, item: Any) -> np.ndarray:
    """The tokens of a prompt or chat, of which there is always one."""
    if isinstance(item, str):
        ids = pipe.tokenizer.encode_with_specials(item).ids
        return ids if len(ids) else document_start(pipe.tokenizer)
    for message in item if _is_chat(item) else [item]:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise ValueError(f"inputs: {message!r:.60} is no message: a dict of the texts 'role' and 'content'")
    if pipe.tokenizer.chat_template is None:
        raise ValueError("inputs are a chat, and the model's tokenizer has no chat template")
    return prompt_ids(pipe.tokenizer, item, continue_final=item[-1]["role"] == "assistant")


def _join(item: Any, text: str) -> Any:
    """A prompt or chat with what the model wrote."""
    if isinstance(item, str):
        return item + text
    if item[-1]["role"] == "assistant":
        return [*item[:-1], item[-1] | {"content": item[-1]["content"] + text}]
    return [*item, {"role": "assistant", "content": text}]


def text2text_generation(
    pipe: Pipeline, inputs: str | list[str], *, key: str = "generated_text", **generation: Any
) -> list[Any]:
    """Writes the target for sources.

    Args:
      pipe: with an encoder-decoder.
      inputs: one source or several.
      key: the name of the result.
      generation: as of `text_generation`, where max_length counts the token that the target begins with; greedy if neither
        the call nor the model's files say otherwise. A `prefix` in the files comes before each source.

    Returns:
      [{'generated_text': text}, ...]: with one sequence each, one for each source; else for several sources, lists of them.
    """
    texts = _texts(inputs)
    prefix = _file_defaults(pipe.task, pipe.facts).get("prefix") or pipe.facts.get("config", {}).get("prefix") or ""
    sources = [pipe.tokenizer.encode_with_specials(prefix + text).ids for text in texts]
    eos_id = pipe.tokenizer.eos_id
    sources = [ids if len(ids) and ids[-1] == eos_id else np.append(ids, eos_id) for ids in sources]
    files = pipe.facts.get("config", {}) | pipe.facts.get("generation_config", {})
    start = files.get("decoder_start_token_id")
    if start is None:
        start = decoder_start(pipe.tokenizer)
    new, num_samples = _generate(pipe, [np.array([start])] * len(texts), _GREEDY, generation, sources)
    results = [{key: pipe.tokenizer.decode(ids)} for ids in new]
    if isinstance(inputs, str) or num_samples == 1:
        return results
    return [results[i : i + num_samples] for i in range(0, len(results), num_samples)]


def translation(
    pipe: Pipeline, inputs: str | list[str], *, src_lang: str = "", tgt_lang: str = "", **generation: Any
) -> list[Any]:
    """As `text2text_generation`, with the key 'translation_text'.

    Args:
      src_lang, tgt_lang: choose among the tasks 'translation_XX_to_YY' in the model's files, as the name of the task can.
    """
    if src_lang or tgt_lang:
        pipe = dataclasses.replace(pipe, task=f"translation_{src_lang}_to_{tgt_lang}")
    known = [name for name in _task_params(pipe.facts) if name.startswith("translation_")]
    if known and pipe.task not in known:
        raise ValueError(f"task {pipe.task!r} is not one of this model's: {', '.join(known)}")
    return text2text_generation(pipe, inputs, key="translation_text", **generation)


def text_classification(
    pipe: Pipeline, inputs: Any, *, top_k: int | str | None = "", function_to_apply: str | None = None
) -> Any:
    """Labels texts or pairs of texts.

    Args:
      pipe: with the head 'sequence_classification'.
      inputs: a text or {'text': ..., 'text_pair': ...}, or a list of such.
      top_k: how many labels, the likeliest first; None for all.
      function_to_apply: 'softmax', 'sigmoid' or 'none' of the logits; by default none for regression, the sigmoid for
        labels that do not exclude each other or a single one that is named, else the softmax.

    Returns:
      {'label': name, 'score': number} for each text, in a list also for one text alone; with `top_k`, a list of
      them for each text, in a list also for one text if `top_k` was given to `pipeline`.

    Raises:
      ValueError: a text longer than the context, or an unknown function.
    """
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "softmax": _softmax,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "none": lambda x: x,
    }
    function = function_to_apply or _label_function(pipe)
    if function not in functions:
        raise ValueError(f"function_to_apply {function!r} is not one of {', '.join(functions)}")
    items = inputs if isinstance(inputs, list) else [inputs]
    pairs = [item if isinstance(item, dict) else {"text": item} for item in items]
    encoded = [pipe.tokenizer.encode_with_specials(pair["text"], pair.get("text_pair")) for pair in pairs]
    names = pipe.facts.get("config", {}).get("id2label", {})
    results: list[Any] = []
    for logits in _run(pipe, encoded):
        scores = functions[function](logits)
        order = np.argsort(-scores, kind="stable")
        labels = [{"label": names.get(str(i), f"LABEL_{i}"), "score": float(scores[i])} for i in order]
        results.append(labels[0] if top_k == "" else labels[: len(labels) if top_k is None else int(top_k)])
    in_list = isinstance(inputs, list) or (isinstance(inputs, str) and (top_k == "" or "top_k" in pipe.arguments))
    return results if in_list else results[0]


def _label_function(pipe: Pipeline) -> str:
    config, num_labels = pipe.facts.get("config", {}), pipe.model.config.num_labels
    if config.get("problem_type") == "regression" or (num_labels == 1 and "id2label" not in config):
        return "none"
    if config.get("problem_type") == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


def question_answering(
    pipe: Pipeline,
    inputs: Any = None,
    *,
    question: str | list[str] | None = None,
    context: str | list[str] | None = None,
    top_k: int = 1,
    doc_stride: int | None = None,
    max_answer_len: int = 15,
    max_seq_len: int | None = None,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
) -> Any:
    """Finds the answer to a question in a context.

    Args:
      pipe: with the head 'span'.
      inputs: {'question': ..., 'context': ...} or a list of such, in place of:
      question, context: texts, or lists of as many; one context may serve several questions.
      top_k: how many answers.
      doc_stride: tokens that neighbouring windows of a long context share; None for 128, or half a shorter window.
      max_answer_len: the most tokens of an answer.
      max_seq_len: tokens of a window, question included; None for 384, or the model's context if that is shorter.
      handle_impossible_answer: whether '' may be the answer, scored by the first token.
      align_to_words: whether answers grow to whole words.

    Returns:
      {'score', 'start', 'end', 'answer'} with characters of the context; a list of them for `top_k` above 1; for a list of
      questions, a list.

    Raises:
      ValueError: an empty text, or a question that leaves no room for the context.
    """
    examples = _examples(inputs, question, context)
    window = min(max_seq_len or 384, pipe.model.config.max_seq_len)
    stride = min(window // 2, 128) if doc_stride is None else doc_stride
    if top_k < 1 or max_answer_len < 1:
        raise ValueError(f"top_k {top_k} and max_answer_len {max_answer_len} must be at least 1")
    results = []
    for asked, text in examples:
        cut = windows(pipe.tokenizer.encode_with_specials(asked, text), window, stride)
        answers: dict[tuple[int, int], float] = {}
        null_score = 1.0
        for encoded, scores in zip(cut, _run(pipe, cut), strict=True):
            candidates, null = _spans(encoded, scores, pipe.tokenizer.cls_id, top_k, max_answer_len)
            null_score = min(null_score, null)
            for score, first, last in candidates:
                span = int(encoded.offsets[first, 0]), int(encoded.offsets[last, 1])
                span = _whole_words(text, *span) if align_to_words else span
                answers[span] = max(score, answers.get(span, 0.0))
        found = [{"score": s, "start": a, "end": b, "answer": text[a:b]} for (a, b), s in answers.items()]
        if handle_impossible_answer:
            found.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
        found = sorted(found, key=lambda answer: -answer["score"])[:top_k]  # type: ignore[operator]
        results.append(found[0] if len(found) == 1 else found)
    return results if isinstance(inputs, list) or isinstance(question, list) else results[0]


def _examples(inputs: Any, question: Any, context: Any) -> list[tuple[str, str]]:
    """Questions and their contexts."""
    if inputs is not None:
        items = inputs if isinstance(inputs, list) else [inputs]
        pairs = [(item["question"], item["context"]) for item in items]
    else:
        questions = question if isinstance(question, list) else [question]
        contexts = context if isinstance(context, list) else [context] * len(questions)
        if len(questions) != len(contexts):
            raise ValueError(f"question and context: {len(questions)} questions for {len(contexts)} contexts")
        pairs = list(zip(questions, contexts, strict=True))
    for pair in pairs:
        for name, text in zip(("question", "context"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name} {text!r} must be a text that is not empty")
    return pairs


def _spans(
    encoded: Encoded, scores: np.ndarray, cls_id: int | None, top_k: int, max_answer_len: int
) -> tuple[list[tuple[float, int, int]], float]:
    """The likeliest spans of a window from scores [T, 2], as (probability, first, last), and that of no answer."""
    allowed = encoded.sequence == 1
    null = np.flatnonzero(encoded.ids == cls_id)[:1] if cls_id is not None else np.zeros(0, np.int64)
    counted = allowed.copy()
    counted[null] = True  # no answer takes its share
    probability = _softmax(np.where(counted[:, None], scores, -1e4), axis=0)
    null_score = float(np.prod(probability[null])) if len(null) else 0.0
    start, end = np.where(allowed[:, None], probability, 0.0).T
    joint = np.tril(np.triu(start[:, None] * end[None]), max_answer_len - 1)
    best = np.argsort(-joint, axis=None, kind="stable")[:top_k]
    first, last = np.unravel_index(best, joint.shape)
    spans = [(float(joint[i, j]), int(i), int(j)) for i, j in zip(first, last, strict=True)]
    return [span for span in spans if allowed[span[1]] and allowed[span[2]]], null_score


def _whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Moves the ends of a part of `text` outwards to where its words end."""
    while 0 < start < len(text) and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    while 0 < end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    return start, end


def fill_mask(pipe: Pipeline, inputs: str | list[str], *, top_k: int = 5) -> list[Any]:
    """Fills masks in.

    Args:
      pipe: with the head 'masked_lm'.
      inputs: one text or several with the tokenizer's mask, such as '[MASK]', in them.
      top_k: how many tokens for each mask.

    Returns:
      [{'score', 'token', 'token_str', 'sequence'}, ...], likeliest first; for several masks a list of such lists, where
      each sequence has the other masks in it; for several texts a list of results.

    Raises:
      ValueError: a text without a mask, or longer than the context.
    """
    tokenizer, mask_id = pipe.tokenizer, pipe.tokenizer.mask_id
    if mask_id is None:
        raise ValueError("task 'fill-mask' needs a tokenizer with a mask token")
    encoded = [_encode_masked(pipe, text) for text in _texts(inputs)]
    results = []
    for row, logits in zip(encoded, _run(pipe, encoded, rows=1), strict=True):
        by_mask = []
        masks = np.flatnonzero(row.ids == mask_id)
        for place in masks:
            probability = _softmax(logits[place])
            answers = []
            for token in np.argsort(-probability, kind="stable")[:top_k]:
                ids = row.ids.copy()
                ids[place] = token
                answers.append(
                    {
                        "score": float(probability[token]),
                        "token": int(token),
                        "token_str": tokenizer.decode([token], skip_special_tokens=False),
                        "sequence": tokenizer.decode(ids, skip_special_tokens=len(masks) == 1),
                    }
                )
            by_mask.append(answers)
        results.append(by_mask[0] if len(by_mask) == 1 else by_mask)
    return results[0] if isinstance(inputs, str) or len(results) == 1 else results


def _encode_masked(pipe: Pipeline, text: str) -> Encoded:
    """Encodes a text with masks in it, which `Tokenizer` never takes for special tokens."""
    tokenizer = pipe.tokenizer
    parts = text.split(tokenizer.roles["mask"])
    if len(parts) == 1:
        raise ValueError(f"there is no mask {tokenizer.roles['mask']!r} in {text!r}")
    # In byte-level BPE a space belongs to the word after it, here to what is hidden.
    probe = tokenizer.encode("a a")
    if len(probe) == 2 and tokenizer.decode(probe[1:]) == " a":
        parts = [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]]
    pieces = [tokenizer.encode(parts[0])]
    for part in parts[1:]:
        pieces += [np.array([tokenizer.mask_id], np.int32), tokenizer.encode(part)]
    frame = tokenizer.encode_with_specials("a")
    text_at = np.flatnonzero(frame.sequence == 0)
    before, after = frame.ids[: text_at[0]], frame.ids[text_at[-1] + 1 :]
    ids = np.concatenate([before, *pieces, after]).astype(np.int32)
    return Encoded(ids, np.zeros_like(ids), np.zeros((len(ids), 2), np.int32), np.zeros_like(ids))


def feature_extraction(pipe: Pipeline, inputs: str | list[str]) -> list[Any]:
    """The hidden states of texts.

    Args:
      pipe: with any model; of an encoder-decoder, the encoder's are returned.
      inputs: one text or several.

    Returns:
      floats [1][T][D] as nested lists; for several texts a list of them.

    Raises:
      ValueError: a text longer than the context.
    """
    encoded = [pipe.tokenizer.encode_with_specials(text) for text in _texts(inputs)]
    method = "encode" if isinstance(pipe.model, EncoderDecoder) else "hidden_states"
    results = [[hidden.tolist()] for hidden in _run(pipe, encoded, method=method)]
    return results[0] if isinstance(inputs, str) else results


def embeddings(pipe: Pipeline, encoded: Sequence[Encoded]) -> list[np.ndarray]:
    """One vector of length 1 for each text, [D], pooled as the model's config says.

    Raises:
      ValueError: a text that is empty or longer than the context.
    """
    config = dataclasses.replace(pipe.model.config, head="embedding")
    return list(_run(dataclasses.replace(pipe, model=type(pipe.model)(config)), encoded))


class Task(NamedTuple):
    """What a task runs and needs.

    Attributes:
      function: of a pipeline, inputs and arguments.
      families: models that can do it.
      head: the `model.head` that it needs, None for any.
      generates: whether it writes text.
    """

    function: Callable[..., Any]
    families: tuple[type[Model], ...]
    head: str | None = None
    generates: bool = False


TASKS = {
    "text-generation": Task(text_generation, (GPT,), "language_model", True),
    "text2text-generation": Task(text2text_generation, (EncoderDecoder,), "language_model", True),
    "translation": Task(translation, (EncoderDecoder,), "language_model", True),
    "text-classification": Task(text_classification, (BERT, GPT), "sequence_classification"),
    "question-answering": Task(question_answering, (BERT, GPT), "span"),
    "fill-mask": Task(fill_mask, (BERT,), "masked_lm"),
    "feature-extraction": Task(feature_extraction, (BERT, GPT, EncoderDecoder)),
}


def _task(name: str) -> Task:
    known = "translation" if name.startswith("translation_") else name
    if known not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[known]


def _texts(inputs: Any) -> list[str]:
    texts = inputs if isinstance(inputs, list) else [inputs]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"inputs must be a text or a list of texts, not {text!r:.60}")
    return texts


def _task_params(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return facts.get("config", {}).get("task_specific_params") or {}


def _file_defaults(task: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a model's files say about generating, the task's own parameters first."""
    return facts.get("generation_config", {}) | _task_params(facts).get(task, {})


def _generate(
    pipe: Pipeline,
    prompts: list[np.ndarray],
    defaults: dict[str, Any],
    call: dict[str, Any],
    sources: list[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], int]:
    """Generates as the call, the model's files and `defaults` say, in that order; returns the ids and how many a prompt."""
    numbers = ("max_new_tokens", "max_length", "do_sample", "num_return_sequences", "repetition_penalty", *_CHOOSING)
    unknown = call.keys() - {*numbers, "seed"}
    if unknown:
        raise ValueError(f"unknown argument {sorted(unknown)[0]!r}; known are {', '.join([*numbers, 'seed'])}")
    call = {name: value for name, value in call.items() if value is not None}
    files = {name: value for name, value in _file_defaults(pipe.task, pipe.facts).items() if value is not None}
    if "max_length" in call or ("max_length" in files and "max_new_tokens" not in files):
        defaults = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
    if {"max_length", "max_new_tokens"} & call.keys():
        files = {name: value for name, value in files.items() if name not in ("max_length", "max_new_tokens")}
    chosen = defaults | files | call
    do_sample, num_samples = bool(chosen.get("do_sample", False)), int(chosen.get("num_return_sequences", 1))
    if not do_sample:
        unused = [name for name in _CHOOSING if name in call]
        if unused:
            warnings.warn(f"{unused[0]} has no use without do_sample=True", stacklevel=4)
        if num_samples > 1:
            raise ValueError(f"num_return_sequences {num_samples} needs do_sample=True: greedy texts are all the same")
        chosen = {name: value for name, value in chosen.items() if name not in _CHOOSING} | {"temperature": 0.0}
    elif not chosen.get("temperature", 1.0) > 0:
        raise ValueError(f"temperature {chosen['temperature']} must be above 0; do_sample=False is greedy")
    longest = max(map(len, prompts), default=0)
    if "max_new_tokens" in chosen:
        new_tokens = [int(chosen["max_new_tokens"])] * len(prompts)
    else:
        new_tokens = [int(chosen["max_length"]) - len(ids) for ids in prompts]
        if min(new_tokens, default=1) < 1:
            raise ValueError(f"max_length {chosen['max_length']} leaves nothing to write after {longest} tokens")
    seed = call.get("seed")
    ids = pipe.engine.generate(
        prompts,
        max_new_tokens=max(new_tokens, default=1),
        eos_ids=eos_ids(pipe.tokenizer, pipe.facts),
        sampling=Sampling(**{name: chosen[name] for name in Sampling._fields if name in chosen}),
        num_samples=num_samples,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
        sources=sources,
    )
    lengths = [n for n in new_tokens for _ in range(num_samples)]
    return [row[:length] for row, length in zip(ids, lengths, strict=True)], num_samples


def _run(pipe: Pipeline, encoded: Sequence[Encoded], *, method: str | None = None, rows: int = _ROWS) -> Iterator[Any]:
    """Applies the model to texts, some at once; yields what it gives for each, padding left out, in float32."""
    c = pipe.model.config
    for row in encoded:
        if not 1 <= len(row.ids) <= c.max_seq_len:
            raise ValueError(f"the input has {len(row.ids)} tokens; the model's context holds 1 to {c.max_seq_len}")
        if row.ids.max() >= c.vocab_size:
            raise ValueError(f"the input has token id {row.ids.max()}, beyond the model's vocabulary of {c.vocab_size}")
    for start in range(0, len(encoded), rows):
        chunk = encoded[start : start + rows]
        # Few shapes, whatever the texts: powers of two.
        length = min(c.max_seq_len, _power_of_two(max(16, *(len(row.ids) for row in chunk))))
        tokens, types, segments = np.zeros((3, _power_of_two(len(chunk)), length), np.int32)
        for i, row in enumerate(chunk):
            here = i, slice(0, len(row.ids))
            tokens[here], types[here], segments[here] = row.ids, row.token_types, 1
        outputs = _apply(pipe.model, pipe.params, tokens, segments, types if c.token_types else None, method)
        for row, output in zip(chunk, np.asarray(outputs, np.float32), strict=False):
            yield output[: len(row.ids)] if output.ndim == 2 else output


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(
    model: Model, params: Params, tokens: Array, segment_ids: Array, token_types: Array | None, method: str | None
) -> Array:
    types: dict[str, Any] = {} if token_types is None else {"token_types": token_types}
    output: Any = model.apply({"params": params}, tokens, segment_ids=segment_ids, method=method, **types)
    return output


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    exp = np.exp(x - x.max(axis=axis, keepdims=True))
    return exp / exp.sum(axis=axis, keepdims=True)
