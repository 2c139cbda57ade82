"""Pure functions of generation: weights made ready, prompts read into a cache, and many tokens written in one loop."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.distributed.mesh import target_platform
from gptjax.distributed.sharding import path_of
from gptjax.generation.sampling import Sampling, penalize, sample
from gptjax.models import Model
from gptjax.models.attention import KVCache, slot_positions
from gptjax.models.config import DTYPES
from gptjax.models.narrow import quantize
from gptjax.models.transformer import unstack

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
NUM_TOP = 20  # likeliest tokens given with each token, where asked for
NUM_EOS = 8  # ids that may end a text
# XLA:CPU's own loops read narrow weights several times as fast as the library it would hand them to; products it keeps.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def init_cache(
    model: Model, batch_size: int, cache_len: int, memory_len: int = 0, *, bounded: bool = False
) -> list[KVCache]:
    """An empty cache for each layer, for `memory_len` places of an encoder's output besides.

    Args:
      model: with a decoder.
      batch_size: B.
      cache_len: S.
      memory_len: 0 without an encoder.
      bounded: layers with a window keep little more than it, and overwrite what no token sees any more.
    """
    c = model.config
    dtype = jnp.float32 if target_platform() == "cpu" else DTYPES[c.dtype]

    def empty(length: int) -> tuple[Array, Array]:
        shape = (batch_size, c.num_kv_heads, length, c.head_dim)
        return jnp.zeros(shape, dtype).swapaxes(2, 3), jnp.zeros(shape, dtype)

    def layer(window: int) -> KVCache:
        # Some more than the window: speculation writes places that it may take back.
        length = min(cache_len, window + 16) if bounded and window and not c.prefix_lm else cache_len
        return KVCache(*empty(length), *(empty(memory_len) if memory_len else ()))

    return [layer(window) for window in c.windows]


def prepare(model: Model, params: Params, weights: str) -> tuple[Model, Params]:
    """The model and its parameters as generation reads them: a layer each, its kernels in the format `weights`.

    Tied embeddings get a head of their own, [D, V], the order in which a product reads it fastest; with int4 it is int8, as
    llama.cpp has it, for it costs more perplexity than all other kernels. On CPU the computation
    is float32 in every format; elsewhere it is the model's dtype.

    Raises:
      ValueError: an unknown format.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    c = model.config
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if weights == "float32" else jnp.bfloat16

    def convert(path: Any, leaf: Array) -> Any:
        *_, module, name = path_of(path).split("/")
        if name == "embedding" and module in ("token_embedding", "position_embedding", "type_embedding"):
            return leaf.astype(dtype)
        if name != "kernel" or module.startswith("experts_") or module == "router":
            return leaf
        if weights not in ("int8", "int4"):
            return leaf.astype(dtype)
        return quantize(leaf, 2 if module == "out" else 1, "int8" if module == "scores" else weights)

    @jax.jit
    def build(params: Params) -> Params:
        params = dict(params)
        if c.tie_embeddings and c.head == "language_model":
            params["head"] = {"scores": {"kernel": params["token_embedding"]["embedding"].T}}
        for stack, num_layers in (("blocks", c.num_layers), ("encoder_blocks", c.num_encoder_layers)):
            if stack in params:
                params[stack] = unstack(params[stack], num_layers)
        return jax.tree_util.tree_map_with_path(convert, params)

    tied = c.tie_embeddings and c.head != "language_model"
    config = dataclasses.replace(c, tie_embeddings=tied, dtype="float32" if on_cpu else c.dtype)
    return type(model)(config), build(params)


class Slots(NamedTuple):
    """A running batch: the state of B texts, some of them over; every array's first axis is the slot.

    Attributes:
      cache: of what the texts hold.
      logits: [B, V] float32, of each text's next token.
      positions: [B], how many tokens the cache holds.
      limits: [B], how many tokens the text may have.
      active: bool [B].
      written: [B], how many tokens were written.
      keys: random keys [B], of each text's seed.
      eos_ids: [B, E], -1 for none.
      sampling: numbers [B].
      seen: bool [B, V], tokens in the text.
      counts: int32 [B, V], how often each token was written.
      bias: [B, V] float32, added to the logits; -inf forbids a token.
      memory_segments: [B, M], 0 for padding; None without an encoder.
    """

    cache: list[KVCache]
    logits: Array
    positions: Array
    limits: Array
    active: Array
    written: Array
    keys: Array
    eos_ids: Array
    sampling: Sampling
    seen: Array
    counts: Array
    bias: Array
    memory_segments: Array | None


class Entry(NamedTuple):
    """What a text that joins brings besides its prompt; each with a first axis [R] of texts.

    Attributes:
      slot: where it goes; beyond the last slot for nowhere.
      length, limit: tokens in the prompt, and at most in all.
      seed: of its random choices.
      eos_ids: [R, E], -1 for none.
      sampling: numbers [R].
    """

    slot: Any
    length: Any
    limit: Any
    seed: Any
    eos_ids: Any
    sampling: Sampling


class Written(NamedTuple):
    """What one dispatch wrote, [N, B] of which the first `num` are meant; token -1 where a text was over.

    Attributes:
      num: scalar.
      tokens: [N, B].
      logprobs: [N, B], of the tokens, before temperature and limits.
      top_ids, top_logprobs: [N, B, NUM_TOP], the likeliest.
    """

    num: Array
    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


def init_slots(model: Model, num_slots: int, cache_len: int, memory_len: int = 0) -> Slots:
    """No texts yet."""
    vocab_size = model.config.vocab_size
    per_slot = (num_slots,)
    return Slots(
        init_cache(model, num_slots, cache_len, memory_len, bounded=True),
        jnp.zeros((num_slots, vocab_size), jnp.float32),
        jnp.zeros(per_slot, jnp.int32),
        jnp.zeros(per_slot, jnp.int32),
        jnp.zeros(per_slot, bool),
        jnp.zeros(per_slot, jnp.int32),
        jax.random.split(jax.random.key(0), num_slots),
        jnp.full((num_slots, NUM_EOS), -1, jnp.int32),
        Sampling(*(jnp.full(per_slot, value, jnp.result_type(value)) for value in Sampling())),
        jnp.zeros((num_slots, vocab_size), bool),
        jnp.zeros((num_slots, vocab_size), jnp.int32),
        jnp.zeros((num_slots, vocab_size), jnp.float32),
        jnp.zeros((num_slots, memory_len), jnp.int32) if memory_len else None,
    )


def grow(old: Any, new: Any) -> Any:
    """Arrays `new` with `old`, of the same structure and at most as large, in their first places."""
    return jax.tree.map(lambda x, into: into.at[tuple(slice(n) for n in x.shape)].set(x), old, new)


def encode(model: Any, params: Params, tokens: Array, segments: Array) -> Array:
    """An encoder's output [R, M, D] for sources [R, M], `segments` 0 for padding."""
    return model.apply({"params": params}, tokens, segment_ids=segments, method=model.encode)


def prompt_inputs(model: Any, prompt_len: Array) -> dict[str, Array]:
    """What `model.decode` is told of prompts of `prompt_len` [B] tokens: of a prefix LM, that all tokens see them."""
    return {"prefix_len": prompt_len} if model.config.prefix_lm else {}


def prefill(
    model: Any,
    params: Params,
    cache: list[KVCache] | None,
    tokens: Array,
    start: Array,
    last: Array,
    source: tuple[Array, Array] | None = None,
) -> tuple[Array, list[KVCache]]:
    """Reads a part [R, C] of prompts, from position `start`, into `cache`; of an encoder-decoder also the sources.

    Args:
      model, params: as `prepare` gives them.
      cache: of R texts, filled up to `start`; None for a new one, as long as `tokens`.
      tokens: [R, C].
      start: scalar; 0 for a prefix LM, whose prompts cannot be read in parts.
      last: [R], the place in `tokens` whose next token is scored.
      source: (tokens, segments) [R, M].

    Returns:
      (logits [R, V] float32, the cache).
    """
    if cache is None:
        rows, length = tokens.shape
        cache = init_cache(model, rows, length, 0 if source is None else source[0].shape[1])
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    inputs = prompt_inputs(model, last + 1)
    if source is not None:
        inputs |= {"memory": encode(model, params, *source), "encoder_segment_ids": source[1]}
    logits, cache = model.apply({"params": params}, tokens, positions, cache, last=last, **inputs, method=model.decode)
    return logits[:, 0].astype(jnp.float32), cache


def insert(slots: Slots, entry: Entry, prompts: Array, logits: Array, cache: list[KVCache], memory: Any) -> Slots:
    """Puts R texts that were read, with `prompts` [R, P], `logits` [R, V] and `cache`, into the running batch."""
    to = entry.slot

    def place(into: KVCache, new: KVCache) -> KVCache:
        """What R texts hold by position, into the slots that it has among B."""
        key, value = new.key, new.value
        if into.num_slots < new.num_slots:  # a ring, which keeps the latest
            held = slot_positions(entry.length[:, None] - 1, into.num_slots)  # [R, S]
            index = jnp.minimum(held, new.num_slots - 1)
            key = jnp.take_along_axis(key, index[:, None, None, :], axis=3)
            value = jnp.take_along_axis(value, index[:, None, :, None], axis=2)
        by_slot = [(into.key, into.value, key, value)]
        if into.cross_key is not None and into.cross_value is not None:
            assert new.cross_key is not None and new.cross_value is not None
            by_slot.append((into.cross_key, into.cross_value, new.cross_key, new.cross_value))
        placed = []
        for into_key, into_value, key, value in by_slot:
            placed.append(into_key.at[to, :, :, : key.shape[3]].set(key, mode="drop"))
            placed.append(into_value.at[to, :, : value.shape[2]].set(value, mode="drop"))
        return KVCache(*placed)

    caches = [place(old, new) for old, new in zip(slots.cache, cache, strict=True)]
    real = jnp.arange(prompts.shape[1]) < entry.length[:, None]
    vocab_size = logits.shape[1]
    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(len(to))[:, None], jnp.where(real, prompts, vocab_size)]
    segments = slots.memory_segments
    if segments is not None:
        segments = segments.at[to].set(jnp.pad(memory, ((0, 0), (0, segments.shape[1] - memory.shape[1]))), mode="drop")

    def put(into: Array, new: Array | float) -> Array:
        return into.at[to].set(new, mode="drop")

    return Slots(
        cache=caches,
        logits=put(slots.logits, logits),
        positions=put(slots.positions, entry.length),
        limits=put(slots.limits, entry.limit),
        active=put(slots.active, True),
        written=put(slots.written, 0),
        keys=put(slots.keys, jax.vmap(jax.random.key)(entry.seed)),
        eos_ids=put(slots.eos_ids, entry.eos_ids),
        sampling=jax.tree.map(put, slots.sampling, entry.sampling),
        seen=put(slots.seen, seen.set(True, mode="drop")),
        counts=put(slots.counts, 0),
        bias=put(slots.bias, 0.0),
        memory_segments=segments,
    )


def decode(
    model: Any, params: Params, slots: Slots, max_tokens: Array, until_free: Array, logprobs: Array, *, capacity: int
) -> tuple[Slots, Written]:
    """Writes up to `max_tokens` tokens of every active text, in one loop on the device.

    Args:
      model, params: as `prepare` gives them.
      slots: updated in place where they are donated.
      max_tokens: scalar, at most `capacity`.
      until_free: stop when a text ends, since another waits for its slot.
      logprobs: whether to compute them.
      capacity: N.
    """
    num_slots, vocab_size = slots.logits.shape
    inputs = prompt_inputs(model, slots.positions - slots.written)
    if slots.memory_segments is not None:
        inputs |= {"encoder_segment_ids": slots.memory_segments}
    rows = jnp.arange(num_slots)
    start_active = slots.active
    written = Written(
        jnp.zeros((), jnp.int32),
        jnp.full((capacity, num_slots), -1, jnp.int32),
        jnp.zeros((capacity, num_slots), jnp.float32),
        jnp.zeros((capacity, num_slots, min(NUM_TOP, vocab_size)), jnp.int32),
        jnp.zeros((capacity, num_slots, min(NUM_TOP, vocab_size)), jnp.float32),
    )

    def going_on(carry: tuple[Slots, Written]) -> Array:
        slots, written = carry
        freed = until_free & jnp.any(start_active & ~slots.active)
        return (written.num < max_tokens) & jnp.any(slots.active) & ~freed

    def write_token(carry: tuple[Slots, Written]) -> tuple[Slots, Written]:
        slots, written = carry
        token = choose(slots)
        n = written.num
        if_asked = jax.lax.cond(
            logprobs,
            lambda: _logprobs(slots.logits, token),
            lambda: (written.logprobs[0], written.top_ids[0], written.top_logprobs[0]),
        )
        written = Written(
            n + 1,
            written.tokens.at[n].set(jnp.where(slots.active, token, -1)),
            *(
                into.at[n].set(new)
                for into, new in zip((written.logprobs, written.top_ids, written.top_logprobs), if_asked, strict=True)
            ),
        )
        ended = jnp.any(token[:, None] == slots.eos_ids, axis=1) | (slots.positions + 1 >= slots.limits)
        step = slots.active.astype(jnp.int32)
        position = jnp.minimum(slots.positions, model.config.max_seq_len - 1)  # beyond it a text is over
        logits, cache = model.apply(
            {"params": params}, token[:, None], position[:, None], slots.cache, **inputs, method=model.decode
        )
        slots = slots._replace(
            cache=cache,
            logits=logits[:, 0].astype(jnp.float32),
            positions=slots.positions + step,
            written=slots.written + step,
            active=slots.active & ~ended,
            seen=slots.seen.at[rows, token].set(True),
            counts=slots.counts.at[rows, token].add(step),
        )
        return slots, written

    return jax.lax.while_loop(going_on, write_token, (slots, written))


def choose(slots: Slots) -> Array:
    """The next token of each text, [B]: the n-th of a text depends on its seed and n, not on who else is there."""
    s = slots.sampling
    penalized = jnp.any((s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0))
    logits = jax.lax.cond(
        penalized,
        lambda: penalize(slots.logits, s, slots.seen, slots.counts),
        lambda: slots.logits,
    )
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.written)
    return sample(keys, logits + slots.bias, s)


def _logprobs(logits: Array, token: Array) -> tuple[Array, Array, Array]:
    logprobs = jax.nn.log_softmax(logits)
    top, ids = jax.lax.top_k(logprobs, min(NUM_TOP, logits.shape[1]))
    return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], ids, top
