"""Beam search: the texts of highest probability, instead of samples."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.generation import decoding
from gptjax.generation.engine import Engine, at_least, check_ids, pad
from gptjax.models.attention import KVCache


class _Beams(NamedTuple):
    """K texts of each of B prompts that go on, and the best that have ended."""

    step: Array
    logits: Array  # [B K, V]
    cache: list[KVCache]  # [B K, ...]
    tokens: Array  # [B, K, N]
    logprobs: Array  # [B, K]
    ended: Array  # [B, K, N]
    scores: Array  # [B, K], of what has ended, -inf for nothing


@functools.partial(jax.jit, static_argnames=("model", "num_beams", "cache_len", "capacity"))
def _search(
    model: Any,
    params: Params,
    prompts: Array,
    lengths: Array,
    source: tuple[Array, Array] | None,
    max_new: Array,
    eos_ids: Array,
    alpha: Array,
    *,
    num_beams: int,
    cache_len: int,
    capacity: int,
) -> tuple[Array, Array]:
    batch = prompts.shape[0]
    memory_len = 0 if source is None else source[0].shape[1]
    cache = decoding.init_cache(model, batch, cache_len, memory_len)
    logits, cache = decoding.prefill(model, params, cache, prompts, jnp.int32(0), lengths - 1, source)
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, num_beams, axis=0), (logits, cache))
    inputs = {} if source is None else {"encoder_segment_ids": jnp.repeat(source[1], num_beams, axis=0)}
    start = jnp.repeat(lengths, num_beams)
    inputs |= decoding.prompt_inputs(model, start)
    vocab_size = logits.shape[1]
    nothing = jnp.full((batch, num_beams, capacity), -1, jnp.int32)
    # All beams of a prompt begin equal; only the first may go on.
    first = jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf)
    beams = _Beams(
        jnp.int32(0),
        logits,
        cache,
        nothing,
        jnp.broadcast_to(first, (batch, num_beams)),
        nothing,
        jnp.full((batch, num_beams), -jnp.inf),
    )

    def going_on(b: _Beams) -> Array:
        # The best that a text may still become: its logprob can only fall, and its length is at most `max_new`.
        longest = jnp.where(alpha > 0, max_new, b.step + 1).astype(jnp.float32)
        hope = jnp.max(b.logprobs, axis=1) / longest**alpha
        return (b.step < max_new) & jnp.any(hope > jnp.min(b.scores, axis=1))

    def step(b: _Beams) -> _Beams:
        totals = b.logprobs[:, :, None] + jax.nn.log_softmax(b.logits).reshape(batch, num_beams, vocab_size)
        # As many as leave `num_beams` that go on, were all ends among them.
        found, flat = jax.lax.top_k(totals.reshape(batch, -1), min(num_beams * (1 + len(eos_ids)), totals[0].size))
        parent, token = flat // vocab_size, flat % vocab_size
        texts = jnp.take_along_axis(b.tokens, parent[:, :, None], axis=1).at[:, :, b.step].set(token)
        last = b.step + 1 == max_new
        is_end = jnp.any(token[:, :, None] == eos_ids, axis=-1) | last
        scores = jnp.where(is_end, found / (b.step + 1.0) ** alpha, -jnp.inf)
        scores, best = jax.lax.top_k(jnp.concatenate([b.scores, scores], axis=1), num_beams)
        ended = jnp.take_along_axis(jnp.concatenate([b.ended, texts], axis=1), best[:, :, None], axis=1)
        logprobs, chosen = jax.lax.top_k(jnp.where(is_end, -jnp.inf, found), num_beams)
        parent, token = (jnp.take_along_axis(x, chosen, axis=1) for x in (parent, token))
        rows = (jnp.arange(batch)[:, None] * num_beams + parent).reshape(-1)
        # What the encoder gave is the same for all beams of a prompt, and stays where it is.
        cache = [c._replace(key=c.key[rows], value=c.value[rows]) for c in b.cache]
        positions = jnp.minimum(start + b.step, model.config.max_seq_len - 1)[:, None]
        logits, cache = model.apply(
            {"params": params}, token.reshape(-1, 1), positions, cache, **inputs, method=model.decode
        )
        texts = jnp.take_along_axis(texts, chosen[:, :, None], axis=1)
        return _Beams(b.step + 1, logits[:, 0].astype(jnp.float32), cache, texts, logprobs, ended, scores)

    beams = jax.lax.while_loop(going_on, step, beams)
    return beams.ended, beams.scores


def beam_search(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    length_penalty: float = 1.0,
    sources: Sequence[np.ndarray] | None = None,
) -> list[list[tuple[np.ndarray, float]]]:
    """The likeliest continuations of prompts that a search of bounded width finds.

    A text's score is its log-probability over its length, end and all, to the power `length_penalty`. The search goes on
    until no text that goes on can beat what has ended.

    Args:
      engine: whose model and weights are used; its batch is left alone.
      prompts: token ids, at least one each.
      num_beams: K, texts that are kept for each prompt.
      max_new_tokens: the most tokens to write.
      eos_ids: ids that end a text.
      length_penalty: above 0 favours long texts.
      sources: of an encoder-decoder, token ids for each prompt.

    Returns:
      For each prompt up to `num_beams` (new ids without the end, score), best first.

    Raises:
      ValueError: numbers out of range, or prompts that leave no room for `max_new_tokens`.
    """
    c = engine.model.config
    if num_beams < 1 or max_new_tokens < 1:
        raise ValueError(f"num_beams {num_beams} and max_new_tokens {max_new_tokens} must be at least 1")
    if not np.isfinite(length_penalty):
        raise ValueError(f"length_penalty {length_penalty} must be finite")
    if (sources is not None) != (engine.memory_len > 0) or (sources is not None and len(sources) != len(prompts)):
        raise ValueError("sources must be given for an encoder-decoder, one for each prompt, and only for one")
    if not prompts:
        return []
    texts = [check_ids("prompt", ids, engine.cache_len, c.vocab_size) for ids in prompts]
    longest = max(map(len, texts))
    new_len = min(max_new_tokens, engine.cache_len + 1 - longest)  # the last token is not read again
    source = None
    if sources is not None:
        checked = [check_ids("source", ids, engine.memory_len, c.vocab_size) for ids in sources]
        padded = pad(checked, len(texts), at_least(max(map(len, checked)), engine.memory_len), fill=-1)
        source = (np.maximum(padded, 0), (padded >= 0).astype(np.int32))
    width = at_least(longest, engine.cache_len)
    cache_len = at_least(min(longest + new_len, engine.cache_len), engine.cache_len)
    ended, scores = _search(
        engine.model,
        engine.params,
        pad(texts, len(texts), width),
        np.array([len(ids) for ids in texts], np.int32),
        source,
        np.int32(new_len),
        np.array([*eos_ids] or [-2], np.int32),
        np.float32(length_penalty),
        num_beams=num_beams,
        cache_len=cache_len,
        capacity=cache_len,
    )
    results: list[list[tuple[np.ndarray, float]]] = []
    for rows, row_scores in zip(np.asarray(ended), np.asarray(scores), strict=True):
        results.append([])
        for row, score in zip(rows, row_scores, strict=True):
            if np.isfinite(score):
                ids = row[row >= 0]
                results[-1].append((ids[:-1] if ids[-1] in eos_ids else ids, float(score)))
    return results
