"""Log-likelihoods of texts under a decoder-only language model, in batches of few shapes."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.data.objectives import document_start, opening
from gptjax.data.tokenizers import Tokenizer
from gptjax.models import GPT, Model

_TOKENS = 2048  # of a batch, so that its logits fit
_ROWS = 64


class Request(NamedTuple):
    """A continuation to score.

    Attributes:
      context: token ids, at least one; of a longer one than fits, the end counts.
      continuation: token ids, at least one.
    """

    context: np.ndarray
    continuation: np.ndarray


class Score(NamedTuple):
    """What a model thinks of a continuation of n tokens.

    Attributes:
      log_probs: float32 [n], nats, of each token given all before it.
      hits: bool [n], whether it is the likeliest.
      is_cut: whether the beginning of the context was left out.
    """

    log_probs: np.ndarray
    hits: np.ndarray
    is_cut: bool


def log_likelihoods(model: Model, params: Params, requests: Sequence[Request]) -> list[Score]:
    """Scores continuations given contexts.

    Rows of about the same length make a batch, padded to a power of two; there are at most 8 such lengths, and as many
    programs are compiled, whatever is asked.

    Args:
      model, params: a decoder-only language model.
      requests: what to score.

    Returns:
      A score for each, in order.

    Raises:
      ValueError: another kind of model, an empty context or continuation, or a continuation longer than the context.
    """
    c = model.config
    if not isinstance(model, GPT) or c.head != "language_model":
        raise ValueError(
            f"likelihoods need a GPT with model.head 'language_model'; this is a {type(model).__name__} with {c.head!r}"
        )
    for index, (context, continuation) in enumerate(requests):
        if not len(context) or not 1 <= len(continuation) <= c.max_seq_len:
            raise ValueError(
                f"request {index} continues {len(context)} tokens by {len(continuation)}: it takes at least 1 and 1, and "
                f"at most the model's context of {c.max_seq_len}"
            )
    rows = [np.concatenate(request)[-c.max_seq_len - 1 :] for request in requests]
    longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores: list[Score | None] = [None] * len(rows)
    while longest_first:
        length = _padded(len(rows[longest_first[0]]) - 1, c.max_seq_len)
        num_rows = min(_ROWS, max(1, _TOKENS // length))
        chunk = [i for i in longest_first[:num_rows] if _padded(len(rows[i]) - 1, c.max_seq_len) == length]
        longest_first = longest_first[len(chunk) :]
        tokens, context = np.zeros((num_rows, length + 1), np.int32), np.zeros((num_rows, 1), np.int32)
        for row, i in zip(tokens, chunk, strict=False):
            row[: len(rows[i])] = rows[i]
        context[: len(chunk), 0] = [len(rows[i]) - len(requests[i].continuation) for i in chunk]
        log_probs, hits = map(np.asarray, _score(model, params, tokens[:, :-1], tokens[:, 1:], context))
        for place, i in enumerate(chunk):
            asked = slice(len(rows[i]) - 1 - len(requests[i].continuation), len(rows[i]) - 1)
            is_cut = len(rows[i]) < sum(map(len, requests[i]))
            scores[i] = Score(log_probs[place, asked], hits[place, asked], is_cut)
    return scores  # type: ignore[return-value]  # all are filled in


def _padded(length: int, longest: int) -> int:
    return min(longest, max(16, longest // 64, 1 << (length - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("model",))
def _score(model: GPT, params: Params, inputs: Array, targets: Array, context: Array) -> tuple[Array, Array]:
    """Of each of `targets` [B, T], after a context of [B, 1] tokens: its log-probability, and whether none is likelier."""
    prefix = jnp.arange(inputs.shape[1]) < context if model.config.prefix_lm else None
    logits = model.apply({"params": params}, inputs, prefix=prefix).astype(jnp.float32)  # type: ignore[union-attr]
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return target_logits - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


def encode_request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Encodes a text whose end is to be scored.

    Both are encoded as one. The context is what it shares with the context's own encoding, white space at its end left
    out, so a token that spans the border, as of a space and a word, is scored with the continuation.
    """
    whole, head = tokenizer.encode(context + continuation), tokenizer.encode(context.rstrip())
    shared = min(len(whole), len(head))
    shared = int(np.argmin([*(whole[:shared] == head[:shared]), False]))
    before = np.concatenate([opening(tokenizer), whole[:shared]])
    return Request(before if len(before) else document_start(tokenizer), whole[shared:])


def windows(tokens: np.ndarray, start: np.ndarray, length: int, stride: int) -> Iterator[Request]:
    """Cuts a long text so that each token is scored once, after as much as the model's context holds.

    Args:
      tokens: [N], the text.
      start: of a document, given before the first token.
      length: tokens that the model reads at once.
      stride: tokens scored in each window but the first, which scores all it can, and the last; each but those of the
        first comes after at least length - stride others.

    Raises:
      ValueError: stride is not from 1 to length.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride {stride} must be from 1 to {length}, the tokens that the model reads at once")
    first = length - len(start) + 1
    yield Request(start, tokens[:first])
    for begin in range(first, len(tokens), stride):
        end = min(begin + stride, len(tokens))
        yield Request(tokens[max(0, end - length - 1) : begin], tokens[begin:end])
