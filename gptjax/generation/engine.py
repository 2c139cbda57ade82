"""Text generation: a prompt is read once into a fixed-shape cache, then one jitted loop writes all new tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.generation.sampling import Sampling, check_sampling, sample
from gptjax.models import GPT
from gptjax.models.attention import KVCache
from gptjax.models.transformer import DTYPES


def init_cache(model: GPT, batch_size: int, cache_len: int) -> KVCache:
    """An empty cache [L, B, S, G, K] in the model's dtype."""
    c = model.config
    shape = (c.num_layers, batch_size, cache_len, c.num_kv_heads, c.head_dim)
    return KVCache(jnp.zeros(shape, DTYPES[c.dtype]), jnp.zeros(shape, DTYPES[c.dtype]))


@functools.partial(jax.jit, static_argnames=("model", "cache_len"))
def _generate(
    model: GPT,
    params: Params,
    prompt: Array,
    prompt_len: Array,
    num_new: Array,
    eos_id: Array,
    sampling: Sampling,
    key: Array,
    cache_len: int,
) -> Array:
    """Continues `prompt` [B, P], right-padded, by up to `num_new` tokens; returns [B, S], eos_id after the end."""
    batch_size, padded_len = prompt.shape
    variables = {"params": params}
    positions = jnp.broadcast_to(jnp.arange(padded_len), prompt.shape)
    # Slots past prompt_len hold padding until the loop overwrites them; a query never looks past its own position.
    logits, cache = model.apply(
        variables, prompt, positions, init_cache(model, batch_size, cache_len), method=model.decode
    )
    last = jax.lax.dynamic_index_in_dim(logits, prompt_len - 1, axis=1, keepdims=False)
    new = jnp.full((batch_size, cache_len), eos_id, jnp.int32)

    def going_on(carry: tuple) -> Array:
        index, _, _, _, ended = carry
        return (index < num_new) & ~jnp.all(ended)

    def write_token(carry: tuple) -> tuple:
        index, new, logits, cache, ended = carry
        token = jnp.where(ended, eos_id, sample(jax.random.fold_in(key, index), logits, sampling))
        new = new.at[:, index].set(token)
        positions = jnp.full((batch_size, 1), prompt_len + index)
        logits, cache = model.apply(variables, token[:, None], positions, cache, method=model.decode)
        return index + 1, new, logits[:, 0], cache, ended | (token == eos_id)

    carry = (jnp.zeros((), jnp.int32), new, last, cache, jnp.zeros(batch_size, bool))
    return jax.lax.while_loop(going_on, write_token, carry)[1]


def generate(
    model: GPT,
    params: Params,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    num_samples: int = 1,
    seed: int = 0,
) -> list[np.ndarray]:
    """Continues one prompt.

    Shapes are padded to powers of two, so few programs are compiled, whatever the lengths. When the context is full, its
    later half is read again as a new prompt and generation goes on.

    Args:
      model, params: a decoder-only model.
      prompt: [P] token ids, P >= 1.
      max_new_tokens: the most tokens to write for each sample; each ends at `eos_id`.
      eos_id: the id that ends a text.
      sampling: how to choose tokens.
      num_samples: independent continuations.
      seed: of the random choices.

    Returns:
      `num_samples` arrays of new ids, without `eos_id`.

    Raises:
      ValueError: an empty prompt, one longer than the context, ids outside the vocabulary, or numbers out of range.
    """
    context_len = model.config.max_seq_len
    prompt = np.asarray(prompt, np.int32)
    if not 1 <= len(prompt) <= context_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model's context holds 1 to {context_len}")
    if prompt.min() < 0 or prompt.max() >= model.config.vocab_size:
        raise ValueError(f"token id {prompt.max()} is outside the vocabulary of {model.config.vocab_size}")
    if max_new_tokens < 1 or num_samples < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and num_samples {num_samples} must be at least 1")
    check_sampling(sampling)
    if jax.default_backend() == "cpu":  # where a matrix-vector product in bfloat16 is ten times slower than in float32
        model = GPT(dataclasses.replace(model.config, dtype="float32"))
    key = jax.random.key(seed)
    tokens = np.tile(prompt, (num_samples, 1))
    ended = np.zeros(num_samples, bool)
    while tokens.shape[1] < len(prompt) + max_new_tokens and not ended.all():
        missing = len(prompt) + max_new_tokens - tokens.shape[1]
        context = tokens[:, -context_len:]
        if context.shape[1] == context_len:
            context = context[:, -max(1, context_len // 2) :]
        used = context.shape[1]
        num_new = min(missing, context_len - used) or 1
        padded = np.zeros((num_samples, min(context_len, _bucket(used))), np.int32)
        padded[:, :used] = context
        key, chunk_key = jax.random.split(key)
        new = _generate(
            model, params, padded, used, num_new, eos_id, sampling, chunk_key, min(context_len, _bucket(used + num_new))
        )
        new = np.where(ended[:, None], eos_id, np.asarray(new)[:, :num_new])
        tokens = np.concatenate([tokens, new], axis=1)
        ended |= (new == eos_id).any(axis=1)
    return [_until(row[len(prompt) :], eos_id) for row in tokens]


def _bucket(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def _until(row: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(row == eos_id)
    return row[: ends[0]] if len(ends) else row
