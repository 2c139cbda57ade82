"""Speculative decoding: several tokens are guessed, and judged by the model in one pass; the distribution is its own."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Array, Params
from gptjax.generation import decoding
from gptjax.generation.engine import Engine, at_least, check_ids, pad
from gptjax.generation.sampling import Sampling, check_sampling, probabilities
from gptjax.models import GPT
from gptjax.models.attention import KVCache

_MATCH = 3  # tokens of the text's end that are looked up in it, at most


class Speculated(NamedTuple):
    """A text and what it took.

    Attributes:
      tokens: new ids, without the one that ended the text.
      passes: how many times the model ran.
    """

    tokens: np.ndarray
    passes: int


class _State(NamedTuple):
    text: Array  # [S], of which `length` are written, the last of them not yet read
    length: Array
    cache: list[KVCache]
    draft_cache: list[KVCache] | None
    over: Array
    passes: Array


@functools.partial(jax.jit, static_argnames=("model", "draft_model", "num_draft", "cache_len"))
def _speculate(
    model: Any,
    params: Params,
    draft_model: Any,
    draft_params: Params | None,
    prompt: Array,
    length: Array,
    limit: Array,
    eos_ids: Array,
    sampling: Sampling,
    key: Array,
    *,
    num_draft: int,
    cache_len: int,
) -> tuple[Array, Array, Array]:
    def read(model: Any, params: Any) -> list[KVCache]:
        cache = decoding.init_cache(model, 1, cache_len)
        return decoding.prefill(model, params, cache, prompt[None], jnp.int32(0), length[None] - 1)[1]

    def apply(model: Any, params: Any, tokens: Array, start: Array, cache: list[KVCache]) -> tuple[Array, Any]:
        positions = start + jnp.arange(len(tokens))[None]
        prompt_inputs = decoding.prompt_inputs(model, length[None])
        logits, cache = model.apply(
            {"params": params}, tokens[None], positions, cache, **prompt_inputs, method=model.decode
        )
        return probabilities(logits[0].astype(jnp.float32), sampling), cache

    def guess(state: _State, key: Array) -> tuple[Array, Array, Any]:
        """`num_draft` tokens [k], the distributions [k, V] they come from, and the draft's cache."""
        if draft_model is None:
            tokens = _look_up(state.text, state.length, num_draft)
            return tokens, jax.nn.one_hot(tokens, model.config.vocab_size), None

        def one(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
            token, cache = carry
            p, cache = apply(draft_model, draft_params, token[None], state.length - 1 + i, cache)
            token = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(p[0])).astype(jnp.int32)
            return (token, cache), (token, p[0])

        # One more than is asked for, so that the last guess is read too, should all be taken.
        start = (state.text[state.length - 1], state.draft_cache)
        (_, cache), (tokens, p) = jax.lax.scan(one, start, jnp.arange(num_draft + 1))
        return tokens[:-1], p[:-1], cache

    def judge(state: _State) -> _State:
        """Leviathan et al., 2023, arXiv:2211.17192, algorithm 1."""
        keys = jax.random.split(jax.random.fold_in(key, state.length), 3)
        guessed, q, draft_cache = guess(state, keys[0])
        tokens = jnp.concatenate([state.text[state.length - 1][None], guessed])
        p, cache = apply(model, params, tokens, state.length - 1, state.cache)
        index = jnp.arange(num_draft)
        taken = jax.random.uniform(keys[1], (num_draft,)) * q[index, guessed] < p[index, guessed]
        num_taken = jnp.sum(jnp.cumprod(taken))
        # Where a guess is refused, what the model would rather have said; after the last one, simply what it says.
        q = jnp.concatenate([q, jnp.zeros_like(q[:1])])
        rest = jnp.maximum(p[num_taken] - q[num_taken], 0.0)
        rest = jnp.where(jnp.sum(rest) > 0, rest, p[num_taken])  # p = q up to rounding: then any draw of p will do
        said = jax.random.categorical(keys[2], jnp.log(rest)).astype(jnp.int32)
        new = jnp.where(jnp.arange(num_draft + 1) < num_taken, jnp.append(guessed, 0), said)
        length = state.length + num_taken + 1
        ended = jnp.any((new[:, None] == eos_ids) & (jnp.arange(num_draft + 1) <= num_taken)[:, None])
        text = jax.lax.dynamic_update_slice(state.text, new, (state.length,))
        return _State(text, length, cache, draft_cache, ended | (length >= limit), state.passes + 1)

    room = num_draft + 1
    state = _State(
        jnp.pad(prompt, (0, cache_len + room - len(prompt)), constant_values=-1),
        length,
        read(model, params),
        None if draft_model is None else read(draft_model, draft_params),
        jnp.zeros((), bool),
        jnp.int32(0),
    )
    state = jax.lax.while_loop(lambda state: ~state.over, judge, state)
    return state.text, state.length, state.passes


def _look_up(text: Array, length: Array, num: int) -> Array:
    """What followed the last time that the text was as it is now at its end, [num]."""
    places = jnp.arange(text.shape[0])
    matched, same = jnp.zeros(text.shape, jnp.int32), places < length - 1
    for back in range(_MATCH):
        same = same & (places >= back) & (jnp.roll(text, back) == text[jnp.maximum(length - 1 - back, 0)])
        matched = matched + same
    best = jnp.argmax(matched * text.shape[0] + places * (matched > 0))
    return jnp.maximum(jax.lax.dynamic_slice(jnp.pad(text, (0, num)), (best + 1,), (num,)), 0)


def speculate(
    engine: Engine,
    prompt: np.ndarray,
    *,
    draft: Engine | None = None,
    num_draft: int = 4,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    seed: int = 0,
) -> Speculated:
    """Continues a prompt, distributed as without speculation: greedy texts are the same, samples equally likely.

    Args:
      engine: with the model that decides, decoder-only; its batch is left alone.
      prompt: token ids, at least one.
      draft: with a smaller model of the same vocabulary that guesses; None to guess what followed in the text itself
        (prompt lookup), which pays where it repeats itself.
      num_draft: guesses at a time.
      max_new_tokens: the most tokens to write.
      eos_ids: ids that end the text.
      sampling: how to choose tokens, without penalties.
      seed: of the random choices.

    Raises:
      ValueError: models that do not fit each other, penalties, or numbers out of range.
    """
    c = engine.model.config
    for model in (engine, draft):
        if model and not isinstance(model.model, GPT):
            raise ValueError("speculation needs decoder-only models")
    if draft and draft.model.config.vocab_size != c.vocab_size:
        raise ValueError(f"the draft's vocab_size {draft.model.config.vocab_size} must be the model's, {c.vocab_size}")
    if num_draft < 1 or max_new_tokens < 1:
        raise ValueError(f"num_draft {num_draft} and max_new_tokens {max_new_tokens} must be at least 1")
    check_sampling(sampling)
    for name, neutral in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
        if getattr(sampling, name) != neutral:
            raise ValueError(f"{name} {getattr(sampling, name)} does not go with speculation")
    context = min(model.cache_len for model in (engine, draft) if model)
    longest = context - num_draft - 1  # guesses are read before they are judged
    ids = check_ids("prompt", prompt, longest, c.vocab_size)
    limit = min(len(ids) + max_new_tokens, longest)
    if limit == len(ids):
        raise ValueError(
            f"the prompt has {len(ids)} tokens, which leaves no room in {context} with {num_draft} guesses"
        )
    cache_len = at_least(limit + num_draft + 1, context)
    text, length, passes = _speculate(
        engine.model,
        engine.params,
        draft and draft.model,
        draft and draft.params,
        pad([ids], 1, at_least(len(ids), context))[0],
        np.int32(len(ids)),
        np.int32(limit),
        np.array([*eos_ids] or [-2], np.int32),
        sampling,
        jax.random.key(seed),
        num_draft=num_draft,
        cache_len=cache_len,
    )
    new = np.asarray(text)[len(ids) : min(int(length), limit)]
    ends = np.flatnonzero(np.isin(new, eos_ids))
    return Speculated(new[: ends[0]] if len(ends) else new, int(passes))
