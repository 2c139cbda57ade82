"""softmax(query key^T / sqrt(K)) value: its mask in one place, and its implementations in one table."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.array_types import Array
from gptjax.distributed.mesh import apart, target_platform
from gptjax.distributed.sharding import BATCH, HEADS, divides
from gptjax.models.dropout import dropout, keep_mask
from gptjax.models.positions import Bias

_INVISIBLE = -1e30  # finite, so that a row that sees nothing stays finite too
_BLOCK = 512  # queries and keys worked on at once by 'blockwise'
_LANES = 128  # the width of a TPU's vector registers


class Mask(NamedTuple):
    """Who may look at whom; every implementation reads the part it works on.

    Attributes:
      query_index: [B or 1, T], places in the row or the cache.
      key_index: [B or 1, S].
      query_segments, key_segments: [B, T] and [B, S], equal where query and key belong together; None for one segment.
      prefix: bool [B, S], keys that every query of the segment sees; None for none.
      causal: a query sees the keys up to its own place.
      window: a query sees this many places back, itself included (and ahead, if not causal); 0 for all.
    """

    query_index: Array
    key_index: Array
    query_segments: Array | None = None
    key_segments: Array | None = None
    prefix: Array | None = None
    causal: bool = True
    window: Array | int = 0

    def visible(self) -> Array:
        """bool [B or 1, 1, T, S]."""
        ahead = self.key_index[:, None, :] - self.query_index[:, :, None]
        visible = ahead <= 0 if self.causal else jnp.ones_like(ahead, bool)
        if not isinstance(self.window, int) or self.window:
            window = jnp.where(jnp.asarray(self.window) > 0, self.window, jnp.iinfo(jnp.int32).max)
            visible = visible & (jnp.abs(ahead) < window)
        if self.prefix is not None:
            visible = visible | self.prefix[:, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            visible = visible & (self.query_segments[:, :, None] == self.key_segments[:, None, :])
        return visible[:, None]


def row_mask(tokens: Array, segment_ids: Array | None, *, causal: bool, prefix: Array | None = None) -> Mask:
    """The mask of rows [B, T] of packed documents; segment 0 is padding."""
    index = jnp.arange(tokens.shape[1])[None]
    return Mask(index, index, segment_ids, segment_ids, prefix, causal)


class Ability(NamedTuple):
    """What an implementation can do besides causal, bidirectional and segment masks and one window for all layers.

    Attributes:
      position: a bias on the scores (ALiBi, relative).
      attention_softcap, attention_sinks, attention_dropout, prefix_lm: as the config fields.
      window_pattern: windows that differ by layer.
    """

    position: bool
    attention_softcap: bool
    attention_sinks: bool
    attention_dropout: bool
    prefix_lm: bool
    window_pattern: bool

    def missing(self, needs: dict[str, bool]) -> str | None:
        """The first field that asks for what it cannot do."""
        return next((name for name, needed in needs.items() if needed and not getattr(self, name)), None)


# What each can express. 'plain': automatic differentiation. 'xla': a derivative written out, fastest on CPU. 'jax':
# jax.nn.dot_product_attention, which is cuDNN on a GPU. 'blockwise': memory linear in T. 'splash': TPU.
IMPLEMENTATIONS: dict[str, Ability] = {
    #                     position softcap sinks dropout prefix pattern
    "plain": Ability(True, True, True, True, True, True),
    "xla": Ability(False, False, False, True, True, True),
    "jax": Ability(True, False, False, False, True, True),
    "blockwise": Ability(True, True, True, True, True, True),
    "splash": Ability(False, True, False, False, False, False),
}


def choose(needs: dict[str, bool], platform: str, lengths: tuple[int, int], head_dim: int, dtype: Any) -> str:
    """The implementation that 'auto' stands for: the fastest that can express `needs` there.

    Args:
      needs: as `TransformerConfig.attention_needs` has them.
      platform: 'cpu', 'gpu' or 'tpu'.
      lengths: (T, S); from 4096 on a [T, S] array is worth avoiding.
      head_dim: K.
      dtype: of the computation.
    """
    order = ["blockwise"] if max(lengths) >= 4096 else ["xla", "plain"]
    if platform == "gpu" and dtype != jnp.float32 and head_dim % 8 == 0 and head_dim <= 128:  # what cuDNN takes
        order = ["jax", *order]
    if _splash_refuses(platform, lengths) is None:
        order = ["splash", *order]
    return next(name for name in order if not IMPLEMENTATIONS[name].missing(needs))


def _splash_refuses(platform: str, lengths: tuple[int, int]) -> str | None:
    """What 'splash' needs and does not find."""
    if platform != "tpu":
        return f"a TPU, and this is a {platform}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:  # the compiler cannot partition a kernel, shard_map can
        return f"jax.set_mesh with {jax.device_count()} devices"
    if mesh.shape.get("context", 1) > 1:
        return f"whole rows, and mesh.context is {mesh.shape['context']}"
    if any(length % _LANES for length in lengths):
        return f"lengths that are multiples of {_LANES}, not {lengths[0]} and {lengths[1]}"
    return None


class _Options(NamedTuple):
    """Everything about one call but its arrays."""

    scale: float
    bias: Bias | None
    softcap: float
    sinks: Array | None  # [H]
    dropout: tuple[Array, Array] | None  # (rate, key)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Mask,
    *,
    implementation: str = "plain",
    scale: float,
    bias: Bias | None = None,
    softcap: float = 0.0,
    sinks: Array | None = None,
    dropout: tuple[Array, Array] | None = None,
) -> Array:
    """softmax(softcap(scale query key^T) + bias) value (Vaswani et al., 2017, arXiv:1706.03762, section 3.2.1).

    Args:
      query: [B, T, H, K].
      key, value: [B, S, G, K]; each of the G groups serves H / G query heads (Ainslie et al., 2023, arXiv:2305.13245).
      mask: who may look at whom.
      implementation: a name in `IMPLEMENTATIONS` that can express the rest, or 'auto'.
      scale: of the scores.
      bias: added to the scores.
      softcap: softcap * tanh(scores / softcap) (Gemma 2); 0 for none.
      sinks: [H], a score a head that takes its share of the softmax and gives nothing (gpt-oss); None for none.
      dropout: (rate, key) for the weights; None for none.

    Returns:
      [B, T, H, K] in the dtype of `query`; the softmax is computed in float32.

    Raises:
      ValueError: an implementation that cannot express the rest, or 'splash' where it does not run.
    """
    needs = {
        "position": bias is not None,
        "attention_softcap": softcap > 0,
        "attention_sinks": sinks is not None,
        "attention_dropout": dropout is not None,
        "prefix_lm": mask.prefix is not None,
        "window_pattern": not isinstance(mask.window, int),
    }
    lengths = (query.shape[1], key.shape[1])
    if implementation == "auto":
        implementation = choose(needs, target_platform(), lengths, query.shape[-1], query.dtype)
    elif missing := IMPLEMENTATIONS[implementation].missing(needs):
        raise ValueError(f"model.attention {implementation!r} cannot express model.{missing}")
    if implementation == "splash" and (refusal := _splash_refuses(target_platform(), lengths)):
        raise ValueError(f"model.attention 'splash' needs {refusal}")
    options = _Options(scale, bias, softcap, sinks, dropout)
    if _is_split(implementation, query, key, options):
        return _split(implementation, query, key, value, mask, options)
    return _FUNCTIONS[implementation](query, key, value, mask, options)


def _is_split(implementation: str, query: Array, key: Array, options: _Options) -> bool:
    """Whether each device of the mesh that is set computes its own part, instead of what the compiler makes of the whole.

    So where positions are split; and for 'blockwise', whose loops the compiler would not leave to one device. Dropout of
    the weights stays with the compiler, to which its mask is one array, however many devices there are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or options.dropout is not None or implementation == "splash":
        return False
    if mesh.shape["context"] == 1 and implementation != "blockwise":
        return False
    return divides(mesh, query.shape, HEADS) and divides(mesh, key.shape, HEADS)


def _split(implementation: str, query: Array, key: Array, value: Array, mask: Mask, options: _Options) -> Array:
    """Attention where each device has its own rows, positions and heads.

    It gathers the keys and values of the other positions and keeps its queries (Grattafiori et al., 2024,
    arXiv:2407.21783, section 3.3.2). With a causal mask it first exchanges them for some from both ends of the row, so that
    all devices have as much to do.
    """
    ways = jax.sharding.get_abstract_mesh().shape["context"]
    length = query.shape[1]
    exchanged = ways > 1 and mask.causal and length == key.shape[1] and length % (2 * ways) == 0

    def own_part(
        query: Array, key: Array, value: Array, queries: Any, keys: Any, window: Any, sinks: Any, bias: Any
    ) -> Array:
        if ways > 1:
            key, value = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (key, value))
        if exchanged:
            query, queries = jax.tree.map(lambda x: _exchange(x, ways), (query, queries))
        (index, segments), (key_index, key_segments, prefix) = queries, keys
        window = mask.window if window is None else window
        own_mask = Mask(index, key_index, segments, key_segments, prefix, mask.causal, window)
        bias = bias and _own_heads(bias, query.shape[2])
        mixed = _FUNCTIONS[implementation](query, key, value, own_mask, options._replace(sinks=sinks, bias=bias))
        return _exchange(mixed, ways, back=True) if exchanged else mixed

    if (
        implementation == "blockwise"
    ):  # its memory is linear in T / ways: rather gather again than keep what was gathered
        own_part = jax.checkpoint(own_part)

    def specs(tree: Any, positions: str | None) -> Any:
        return jax.tree.map(lambda x: P(None if x.shape[0] == 1 else BATCH[0], positions), tree)

    queries = (mask.query_index, mask.query_segments)
    keys = (mask.key_index, mask.key_segments, mask.prefix)
    window = None if isinstance(mask.window, int) else mask.window
    return jax.shard_map(
        own_part,
        in_specs=(HEADS, HEADS, HEADS, specs(queries, "context"), specs(keys, None), P(), P("tensor"), P()),
        out_specs=HEADS,
        check_vma=False,
    )(query, key, value, queries, keys, window, options.sinks, options.bias)


def _exchange(x: Array, ways: int, *, back: bool = False) -> Array:
    """Gives device i, for parts 2i and 2i + 1 of the 2 `ways` parts of a row [B, T, ...], parts i and 2 `ways` - 1 - i."""
    halves = []
    for parity, half in enumerate(jnp.split(x, 2, axis=1)):
        pairs = [(i, min(2 * i + parity, 2 * (ways - i) - 1 - parity)) for i in range(ways)]
        halves.append(jax.lax.ppermute(half, "context", [pair[::-1] for pair in pairs] if back else pairs))
    return jnp.concatenate(halves, axis=1)


def _own_heads(bias: Bias, num_heads: int) -> Bias:
    """A bias for the heads that this device has."""

    def own(query_index: Array, key_index: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(
            bias(query_index, key_index), jax.lax.axis_index("tensor") * num_heads, num_heads, axis=1
        )

    return own


def _plain(query: Array, key: Array, value: Array, mask: Mask, options: _Options) -> Array:
    query = _grouped(query, key.shape[2])
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = _scores(query, key, mask, options)
    if options.sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = options.sinks.reshape(1, *query.shape[1:3], 1, 1)
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - top)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))
    if options.dropout is not None:
        rate, seed = options.dropout
        weights = dropout(weights, rate, lambda: seed)
    return _ungrouped(jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(value.dtype), value))


def _grouped(query: Array, groups: int) -> Array:
    """[B, T, H, K] to [B, G, H / G, T, K]."""
    batch, length, num_heads, head_dim = query.shape
    return query.reshape(batch, length, groups, num_heads // groups, head_dim).transpose(0, 2, 3, 1, 4)


def _ungrouped(mixed: Array) -> Array:
    batch, groups, repeats, length, head_dim = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * repeats, head_dim)


def _scores(query: Array, key: Array, mask: Mask, options: _Options) -> Array:
    """float32 [B, G, R, T, S]; query [B, G, R, T, K], key [B, G, S, K]."""
    scores = jnp.einsum("bgrtk,bgsk->bgrts", query, key).astype(jnp.float32) * options.scale
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    if options.bias is not None:
        bias = options.bias(mask.query_index, mask.key_index)
        scores += bias.reshape(bias.shape[0], *query.shape[1:3], *bias.shape[2:])
    return jnp.where(mask.visible()[:, :, None], scores, _INVISIBLE)


def _jax(query: Array, key: Array, value: Array, mask: Mask, options: _Options) -> Array:
    cudnn = target_platform() == "gpu" and query.dtype != jnp.float32  # its kernels know no float32
    bias = None if options.bias is None else options.bias(mask.query_index, mask.key_index)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias.astype(query.dtype) if cudnn and bias is not None else bias,
        mask=jnp.broadcast_to(mask.visible(), (query.shape[0], 1, query.shape[1], key.shape[1])),
        scale=options.scale,
        implementation="cudnn" if cudnn else "xla",
    )


def _blockwise(query: Array, key: Array, value: Array, mask: Mask, options: _Options) -> Array:
    """Exact attention, a block of queries against a block of keys at a time (Rabe & Staats, 2021, arXiv:2112.05682).

    The softmax is kept as a running maximum and sum; blocks that the mask hides whole are skipped. The backward pass
    computes each block again.
    """
    batch, length, _, head_dim = query.shape
    width = min(_BLOCK, max(length, key.shape[1]))
    query = _blocks(_grouped(query, key.shape[2]), width, axis=3)
    key, value = (_blocks(x.transpose(0, 2, 1, 3), width, axis=2) for x in (key, value))
    queries = jax.tree.map(lambda x: _blocks(x, width, axis=1), (mask.query_index, mask.query_segments))
    present = jnp.ones((1, mask.key_index.shape[1]), bool)  # False in what _blocks adds
    keys = jax.tree.map(lambda x: _blocks(x, width, axis=1), (mask.key_index, mask.key_segments, mask.prefix, present))
    _, _, groups, repeats, _, _ = query.shape

    @jax.checkpoint
    def query_block(args: tuple[Any, ...]) -> Array:
        query, (query_index, query_segments), number = args

        @jax.checkpoint
        def key_block(carry: tuple[Array, Array, Array], args: tuple[Any, ...]) -> tuple[tuple, None]:
            key, value, (key_index, key_segments, prefix, present), key_number = args
            block = Mask(query_index, key_index, query_segments, key_segments, prefix, mask.causal, mask.window)

            def work(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                mixed, total, top = carry
                scores = jnp.where(present[:, None, None, None], _scores(query, key, block, options), _INVISIBLE)
                new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
                weights = jnp.exp(scores - new_top[..., None])
                shrink = jnp.exp(top - new_top)
                total = total * shrink + jnp.sum(weights, axis=-1)
                if options.dropout is not None:
                    rate, seed = options.dropout
                    here = jax.random.fold_in(jax.random.fold_in(seed, number), key_number)
                    weights = dropout(weights, rate, lambda: here)
                added = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(value.dtype), value)
                return mixed * shrink[..., None] + added.astype(jnp.float32), total, new_top

            needed = jnp.any(block.visible()) & jnp.any(present)
            return jax.lax.cond(needed, work, lambda carry: carry, carry), None

        shape = (batch, groups, repeats, width)
        if options.sinks is None:
            start = (jnp.zeros((*shape, head_dim)), jnp.zeros(shape), jnp.full(shape, _INVISIBLE))
        else:
            top = jnp.broadcast_to(options.sinks.reshape(1, groups, repeats, 1), shape)
            start = (jnp.zeros((*shape, head_dim)), jnp.ones(shape), top)
        numbers = jnp.arange(key.shape[0])
        (mixed, total, _), _ = jax.lax.scan(key_block, start, (key, value, keys, numbers))
        # The greatest weight is 1, so the sum is smaller only where no block was worked on.
        return (mixed / jnp.maximum(total, 0.5)[..., None]).astype(query.dtype)

    mixed = jax.lax.map(query_block, (query, queries, jnp.arange(query.shape[0])))
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(batch, groups, repeats, -1, head_dim)
    return _ungrouped(mixed[:, :, :, :length])


def _blocks(x: Array, width: int, axis: int) -> Array:
    """Splits `axis` into blocks of `width`, filled up with zeros, and puts their number in front."""
    missing = -x.shape[axis] % width
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _splash(query: Array, key: Array, value: Array, mask: Mask, options: _Options, *, interpret: bool = False) -> Array:
    """JAX's flash attention for TPU; memory linear in T. `interpret` runs it anywhere, slowly, for tests."""
    segments = None
    if mask.query_segments is not None and mask.key_segments is not None:
        segments = (mask.query_segments, mask.key_segments)
    run = functools.partial(_splash_kernel, mask=mask, options=options, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:  # each device runs the kernel on its rows and heads
        run = jax.shard_map(run, in_specs=(HEADS, HEADS, HEADS, BATCH), out_specs=HEADS, check_vma=False)
    return run(query, key, value, segments)


def _splash_kernel(
    query: Array,
    key: Array,
    value: Array,
    segments: tuple[Array, Array] | None,
    *,
    mask: Mask,
    options: _Options,
    interpret: bool,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads = query.shape[1:3]
    shape = (length, key.shape[1])
    assert isinstance(mask.window, int)
    if mask.window:
        back = mask.window - 1
        pattern: Any = masks.LocalMask(shape, (back, 0 if mask.causal else back), offset=0)
    else:
        pattern = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    # The kernel's own default, 128, leaves a TPU's matrix unit waiting.
    width = next(width for width in (512, 256, _LANES) if not any(n % width for n in shape))
    blocks: Any = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), width
    )
    run = kernel.make_splash_mha(
        mask=masks.MultiHeadMask([pattern] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(**blocks),
        attn_logits_soft_cap=options.softcap or None,
        interpret=interpret,
    )
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query * jnp.asarray(options.scale, query.dtype), key, value))
    ids = None if segments is None else kernel.SegmentIds(*segments)
    return jax.vmap(run)(query, key, value, ids).transpose(0, 2, 1, 3)


def _xla(query: Array, key: Array, value: Array, mask: Mask, options: _Options) -> Array:
    length = query.shape[1]
    causal = mask.causal and mask.prefix is None and mask.query_index is mask.key_index
    query = _grouped(query, key.shape[2])
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    visible = mask.visible()
    visible = jnp.broadcast_to(visible, (query.shape[0], *visible.shape[1:]))
    # Where nothing above the diagonal is seen, two blocks of queries leave a quarter of the scores out.
    num_blocks = 2 if causal and length % 2 == 0 else 1
    return _ungrouped(_attend(query, key, value, visible, options.dropout, options.scale, num_blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    dropout: tuple[Array, Array] | None,
    scale: float,
    num_blocks: int,
) -> Array:
    """Attention of query [B, G, R, T, K] over key and value [B, G, S, K], in blocks of queries.

    With more than one block, S is T and each block sees the keys up to its own end. The derivative is written out: it
    keeps the weights before dropout, in the dtype of the computation, where automatic differentiation keeps several
    float32 copies, and draws dropout's mask again.
    """
    return _attend_fwd(query, key, value, visible, dropout, scale, num_blocks)[0]


def _halves(query: Array, key: Array, num_blocks: int) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys it sees."""
    if num_blocks == 1:
        return [(slice(0, query.shape[3]), slice(0, key.shape[2]))]
    width = query.shape[3] // num_blocks
    return [(slice(i * width, (i + 1) * width), slice(0, (i + 1) * width)) for i in range(num_blocks)]


def _attend_fwd(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    dropout: tuple[Array, Array] | None,
    scale: float,
    num_blocks: int,
) -> tuple[Array, tuple]:
    outputs, weights = [], []
    for queries, keys in _halves(query, key, num_blocks):
        scores = jnp.einsum("bgrtk,bgsk->bgrts", query[:, :, :, queries], key[:, :, keys]).astype(jnp.float32)
        scores = jnp.where(visible[:, :, None, queries, keys], scores * scale, _INVISIBLE)
        block = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        weights.append(block)
        used = _dropped(block, dropout, query, key, queries, keys)
        outputs.append(jnp.einsum("bgrts,bgsk->bgrtk", used, value[:, :, keys]))
    mixed = jnp.concatenate(outputs, axis=3)
    return mixed, (query, key, value, dropout, tuple(weights), mixed)


def _dropped(
    block: Array, dropout: tuple[Array, Array] | None, query: Array, key: Array, queries: slice, keys: slice
) -> Array:
    """A block of the weights after dropout, whose mask is the one of all weights."""
    if dropout is None:
        return block
    rate, seed = dropout
    kept = keep_mask(seed, rate, (*query.shape[:4], key.shape[2]))[:, :, :, queries, keys]
    return jnp.where(kept, block / (1.0 - rate).astype(block.dtype), jnp.zeros_like(block))


def _attend_bwd(scale: float, num_blocks: int, residuals: tuple, g: Array) -> tuple[Array | None, ...]:
    query, key, value, dropout, weights, mixed = residuals
    dquery, dkey, dvalue = [], jnp.zeros_like(key), jnp.zeros_like(value)
    # What a row of the weights' derivatives is on average, as its weights count (Dao et al., 2022, arXiv:2205.14135, B.2).
    means = jnp.sum(g.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    for (queries, keys), block in zip(_halves(query, key, num_blocks), weights, strict=True):
        g_block = g[:, :, :, queries]
        used = _dropped(block, dropout, query, key, queries, keys)
        dvalue = dvalue.at[:, :, keys].add(_over_queries(used, g_block))
        dweights = jnp.einsum("bgrtk,bgsk->bgrts", g_block, value[:, :, keys]).astype(jnp.float32)
        if dropout is None:
            dscores = block * (dweights - means[:, :, :, queries])
        else:  # block * (_dropped(dweights) - means), for which the mask would be drawn once more
            dscores = used * dweights - block * means[:, :, :, queries]
        dscores = apart((dscores * scale).astype(query.dtype))
        dquery.append(jnp.einsum("bgrts,bgsk->bgrtk", dscores, key[:, :, keys]))
        dkey = dkey.at[:, :, keys].add(_over_queries(dscores, query[:, :, :, queries]))
    return jnp.concatenate(dquery, axis=3), dkey, dvalue, None, None


def _over_queries(weights: Array, x: Array) -> Array:
    """[B, G, S, K]: weights [B, G, R, T, S] times x [B, G, R, T, K], summed over queries.

    So written, and not fused over, it is the thin array that XLA:CPU transposes, not the weights.
    """
    return apart(jnp.einsum("bgrtk,bgrts->bgks", x, weights)).swapaxes(2, 3)


_attend.defvjp(_attend_fwd, _attend_bwd)

_FUNCTIONS: dict[str, Callable[[Array, Array, Array, Mask, _Options], Array]] = {
    "plain": _plain,
    "xla": _xla,
    "jax": _jax,
    "blockwise": _blockwise,
    "splash": _splash,
}
