"""Tasks that read text."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.data.examples import windows
from gptjax.data.tokenizers import Encoded
from gptjax.models import EncoderDecoder, Model
from gptjax.pipelines.base import ROWS, Pipeline, texts_of


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
    encoded = [_encode_masked(pipe, text) for text in texts_of(inputs)]
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
    encoded = [pipe.tokenizer.encode_with_specials(text) for text in texts_of(inputs)]
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


def _run(pipe: Pipeline, encoded: Sequence[Encoded], *, method: str | None = None, rows: int = ROWS) -> Iterator[Any]:
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
