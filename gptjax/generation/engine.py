"""Text generation: prompts are read once into a fixed-shape cache, then one jitted loop writes all new tokens."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.generation.sampling import Sampling, check_sampling, sample
from gptjax.models import GPT, EncoderDecoder, Model
from gptjax.models.attention import KVCache
from gptjax.models.config import DTYPES


def init_cache(model: Model, batch_size: int, cache_len: int, memory_len: int = 0) -> KVCache:
    """An empty cache [L, B, S, G, K] in the model's dtype, for `memory_len` places of an encoder's output besides."""
    c = model.config

    def empty(length: int) -> Array:
        return jnp.zeros((c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim), DTYPES[c.dtype])

    if memory_len:
        return KVCache(empty(cache_len), empty(cache_len), empty(memory_len), empty(memory_len))
    return KVCache(empty(cache_len), empty(cache_len))


@functools.partial(jax.jit, static_argnames=("model", "cache_len"))
def _generate(
    model: GPT | EncoderDecoder,
    params: Params,
    prompts: Array,
    prompt_lens: Array,
    source: tuple[Array, Array] | None,
    num_new: Array,
    eos_ids: Array,
    ended: Array,
    sampling: Sampling,
    key: Array,
    cache_len: int,
) -> Array:
    """Continues `prompts` [B, P], right-padded to `prompt_lens` [B], by up to `num_new` tokens.

    Returns [B, S]: the new tokens, and the first of `eos_ids` after a text's end. `source` is (tokens, segment_ids) [B, S]
    of an encoder-decoder; rows that have `ended` stay so.
    """
    apply: Any = functools.partial(model.apply, {"params": params})
    batch_size, padded_len = prompts.shape
    memory = {}
    later = {}
    if source is not None:
        tokens, segments = source
        memory["memory"] = apply(tokens, segment_ids=segments, method=model.encode)
        later["encoder_segment_ids"] = segments

    def decode(tokens: Array, positions: Array, cache: KVCache, **inputs: Array) -> tuple[Array, KVCache]:
        return apply(tokens, positions, cache, **inputs, **later, method=model.decode)

    cache = init_cache(model, batch_size, cache_len, 0 if source is None else source[0].shape[1])
    # Slots past a prompt's end hold padding until the loop overwrites them; a query never looks past its own position.
    logits, cache = decode(prompts, jnp.broadcast_to(jnp.arange(padded_len), prompts.shape), cache, **memory)
    last = jnp.take_along_axis(logits, (prompt_lens - 1)[:, None, None], axis=1)[:, 0]
    new = jnp.full((batch_size, cache_len), eos_ids[0], jnp.int32)

    def going_on(carry: tuple) -> Array:
        index, _, _, _, ended = carry
        return (index < num_new) & ~jnp.all(ended)

    def write_token(carry: tuple) -> tuple:
        index, new, logits, cache, ended = carry
        token = jnp.where(ended, eos_ids[0], sample(_row_keys(key, index, batch_size), logits, sampling))
        new = new.at[:, index].set(token)
        logits, cache = decode(token[:, None], (prompt_lens + index)[:, None], cache)
        return index + 1, new, logits[:, 0], cache, ended | jnp.any(token[:, None] == eos_ids, axis=1)

    return jax.lax.while_loop(going_on, write_token, (jnp.zeros((), jnp.int32), new, last, cache, ended))[1]


def _row_keys(key: Array, index: Array, batch_size: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, index), batch_size)


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    num_samples: int = 1,
    seed: int = 0,
    sources: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Continues prompts, all in one batch.

    Shapes are padded to powers of two, so few programs are compiled, whatever the lengths. When a decoder-only model's
    context is full, the later half of it is read again as a new prompt and generation goes on.

    Args:
      model, params: a decoder-only model or an encoder-decoder.
      prompts: token ids, at least one each; of an encoder-decoder, what the target begins with.
      max_new_tokens: the most tokens to write for each text.
      eos_ids: ids that end a text; none if empty.
      sampling: how to choose tokens.
      num_samples: independent continuations of each prompt.
      seed: of the random choices.
      sources: of an encoder-decoder, the source of each prompt, token ids.

    Returns:
      `num_samples` arrays of new ids for each prompt, one prompt's after another's, without the id that ended them.

    Raises:
      ValueError: a model that does not generate, an empty prompt, one longer than the context, ids outside the vocabulary,
        or numbers out of range.
    """
    c = model.config
    if not isinstance(model, GPT | EncoderDecoder) or c.head != "language_model":
        raise ValueError(f"a {type(model).__name__} with model.head {c.head!r} does not generate text")
    if isinstance(model, EncoderDecoder) != (sources is not None):
        raise ValueError("sources must be given for an encoder-decoder, and only for one")
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and num_samples {num_samples} must be at least 1")
    check_sampling(sampling)
    texts = [_check_ids("prompt", ids, c.max_seq_len, c.vocab_size) for ids in prompts]
    if not texts:
        return []
    if sources is not None:
        if len(sources) != len(texts):
            raise ValueError(f"sources: {len(sources)} for {len(texts)} prompts")
        sources = [
            _check_ids("source", ids, c.max_seq_len, c.vocab_size) for ids in sources for _ in range(num_samples)
        ]
    if jax.default_backend() == "cpu":  # where a matrix-vector product in bfloat16 is ten times slower than in float32
        model = type(model)(dataclasses.replace(c, dtype="float32"))
    texts = [ids for ids in texts for _ in range(num_samples)]
    prompt_lens = [len(ids) for ids in texts]
    source = None
    if sources is not None:
        padded = _pad(sources, min(c.max_seq_len, _bucket(max(map(len, sources)))))
        source = (padded, (np.arange(padded.shape[1]) < np.array([[len(s)] for s in sources])).astype(np.int32))
    ends = np.asarray([*eos_ids] or [-1], np.int32)
    ended = np.zeros(len(texts), bool)
    key = jax.random.key(seed)
    written = 0
    while written < max_new_tokens and not ended.all():
        contexts = [ids if len(ids) < c.max_seq_len else ids[-(c.max_seq_len // 2 or 1) :] for ids in texts]
        longest = max(map(len, contexts))
        num_new = min(max_new_tokens - written, max(1, c.max_seq_len - longest))
        if sources is not None and longest == c.max_seq_len:
            break  # a target does not go on past the context
        key, chunk_key = jax.random.split(key)
        new = _generate(
            model,
            params,
            _pad(contexts, min(c.max_seq_len, _bucket(longest))),
            np.array([len(ids) for ids in contexts], np.int32),
            source,
            num_new,
            ends,
            ended,
            sampling,
            chunk_key,
            min(c.max_seq_len, _bucket(longest + num_new)),
        )
        new = np.asarray(new)[:, :num_new]
        texts = [np.concatenate([ids, row]) for ids, row in zip(texts, new, strict=True)]
        ended |= np.isin(new, ends).any(axis=1)
        written += num_new
    return [_until(ids[n:], ends) for ids, n in zip(texts, prompt_lens, strict=True)]


def _check_ids(what: str, ids: np.ndarray, longest: int, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int32)
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the {what} has {len(ids)} tokens; the model's context holds 1 to {longest}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"the {what} holds token id {wrong}; the vocabulary's are 0 to {vocab_size - 1}")
    return ids


def _pad(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    padded = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def _bucket(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def _until(row: np.ndarray, eos_ids: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(np.isin(row, eos_ids))
    return row[: ends[0]] if len(ends) else row
