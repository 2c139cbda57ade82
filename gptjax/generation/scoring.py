"""How likely each token of a text was, in few programs; a long text is read in parts."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.generation import decoding
from gptjax.generation.decoding import NUM_TOP
from gptjax.generation.engine import Engine, at_least, ladder
from gptjax.models.attention import KVCache

_PARTS = (64, 256)  # tokens read at once


class Scores(NamedTuple):
    """Of each token but the first, given all before it.

    Attributes:
      logprobs: [T - 1].
      top_ids, top_logprobs: [T - 1, NUM_TOP], the likeliest.
    """

    logprobs: Any
    top_ids: Any
    top_logprobs: Any


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _score(
    model: Any, params: Params, cache: list[KVCache], tokens: Array, start: Array, targets: Array
) -> tuple[list[KVCache], Scores]:
    """Reads `tokens` [1, C] from place `start` on, and scores what follows each, `targets` [1, C]."""
    positions = start + jnp.arange(tokens.shape[1])
    logits, cache = model.apply({"params": params}, tokens, positions[None], cache, method=model.decode)
    logprobs = jax.nn.log_softmax(logits[0].astype(jnp.float32))
    top, ids = jax.lax.top_k(logprobs, min(NUM_TOP, logprobs.shape[1]))
    return cache, Scores(jnp.take_along_axis(logprobs, targets[0, :, None], axis=1)[:, 0], ids, top)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _init_cache(model: Any, length: int) -> list[KVCache]:
    return decoding.init_cache(model, 1, length)


def num_compiles() -> int:
    """How many programs scoring has compiled in this process."""
    return _score._cache_size() + _init_cache._cache_size()  # type: ignore[attr-defined]


def score(engine: Engine, tokens: np.ndarray) -> Iterator[Scores | None]:
    """Scores a text of at most `engine.cache_len` tokens with the engine's weights; its batch is left alone.

    Args:
      engine: of a decoder-only model.
      tokens: [T], at least one.

    Yields:
      None after each part of the text that was read, so that other work can be done, and last the scores.

    Raises:
      ValueError: the model is a prefix LM.
    """
    if engine.model.config.prefix_lm:
        raise ValueError("a prefix LM reads a prompt in both directions, so that its tokens have no probabilities")
    length = len(tokens)
    part = min(_PARTS[length > _PARTS[0]], engine.cache_len)
    cache = _init_cache(engine.model, at_least(length, engine.cache_len))
    followed = np.append(tokens, np.zeros(part)).astype(np.int32)
    found: list[Scores] = []
    for done in range(0, length, part):
        start = min(done, max(0, length - part))  # the last part ends with the text, and so reads some tokens again
        inputs, targets = (followed[None, start + shift : start + shift + part] for shift in (0, 1))
        cache, scores = _score(engine.model, engine.params, cache, inputs, np.int32(start), targets)
        found.append(Scores(*(np.asarray(x)[done - start :] for x in scores)))
        yield None
    yield Scores(*(np.concatenate(arrays)[: length - 1] for arrays in zip(*found, strict=True)))


def warm_up(engine: Engine) -> None:
    """Compiles every program that `score` may need."""
    for length in ladder(engine.cache_len):
        next(score(engine, np.zeros(length, np.int32)))
