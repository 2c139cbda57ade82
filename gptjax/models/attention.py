"""Scaled dot-product attention, its masks in one place, and the module around it."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.layers import INIT_STD, Einsum, dropout


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; slot s holds position s.

    Attributes:
      key: [B, S, G, K] for one layer, [L, B, S, G, K] for a model.
      value: the same.
    """

    key: Array
    value: Array


def causal_mask(length: int, segment_ids: Array | None) -> Array:
    """Who may look at whom in rows of packed documents.

    Args:
      length: T.
      segment_ids: [B, T], the document of each token, 0 for padding; None for one document a row.

    Returns:
      bool [B or 1, 1, T, T], True where query t may attend to key s: s <= t and the same document.
    """
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segment_ids is not None:
        mask &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return mask


def cache_mask(positions: Array, cache_len: int) -> Array:
    """bool [B, 1, T, S]: a query at `positions` [B, T] sees the cache slots up to its own."""
    return (jnp.arange(cache_len) <= positions[:, :, None])[:, None]


def dot_product_attention(query: Array, key: Array, value: Array, mask: Array, *, causal: bool = False) -> Array:
    """softmax(query key^T / sqrt(K)) value (Vaswani et al., 2017, arXiv:1706.03762, section 3.2.1).

    Args:
      query: [B, T, H, K].
      key: [B, S, G, K]; each of the G groups serves H / G query heads (Ainslie et al., 2023, arXiv:2305.13245).
      value: [B, S, G, K].
      mask: bool [B or 1, 1, T, S].
      causal: promises that `mask` is False above the diagonal, of which a quarter is then never computed.

    Returns:
      [B, T, H, K] in the dtype of `query`; the softmax is computed in float32.
    """
    batch, length, num_heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, num_heads // groups, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    num_blocks = 2 if causal and length % 2 == 0 else 1
    mixed = _attend(query, key, value, jnp.broadcast_to(mask, (batch, *mask.shape[1:])), num_blocks)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, mask: Array, num_blocks: int) -> Array:
    """Attention of query [B, G, R, T, K] over key and value [B, G, S, K], in blocks of queries.

    With more than one block, S is T and each block sees the keys up to its own end. The derivative is written out: it
    keeps the weights in the dtype of the computation, where automatic differentiation keeps several float32 copies.
    """
    return _attend_fwd(query, key, value, mask, num_blocks)[0]


def _blocks(query: Array, key: Array, num_blocks: int) -> list[tuple[slice, slice]]:
    """The queries of each block, and the keys it sees."""
    if num_blocks == 1:
        return [(slice(0, query.shape[3]), slice(0, key.shape[2]))]
    width = query.shape[3] // num_blocks
    return [(slice(i * width, (i + 1) * width), slice(0, (i + 1) * width)) for i in range(num_blocks)]


def _attend_fwd(query: Array, key: Array, value: Array, mask: Array, num_blocks: int) -> tuple[Array, tuple]:
    outputs, weights = [], []
    for queries, keys in _blocks(query, key, num_blocks):
        scores = jnp.einsum("bgrtk,bgsk->bgrts", query[:, :, :, queries], key[:, :, keys]).astype(jnp.float32)
        scores = jnp.where(mask[:, :, None, queries, keys], scores * query.shape[-1] ** -0.5, -1e30)
        block = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        weights.append(block)
        outputs.append(jnp.einsum("bgrts,bgsk->bgrtk", block, value[:, :, keys]))
    return jnp.concatenate(outputs, axis=3), (query, key, value, tuple(weights))


def _attend_bwd(num_blocks: int, residuals: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, weights = residuals
    dquery, dkey, dvalue = [], jnp.zeros_like(key), jnp.zeros_like(value)
    for (queries, keys), block in zip(_blocks(query, key, num_blocks), weights, strict=True):
        g_block = g[:, :, :, queries]
        dvalue = dvalue.at[:, :, keys].add(jnp.einsum("bgrts,bgrtk->bgsk", block, g_block))
        dweights = jnp.einsum("bgrtk,bgsk->bgrts", g_block, value[:, :, keys]).astype(jnp.float32)
        block = block.astype(jnp.float32)
        dscores = block * (dweights - jnp.sum(dweights * block, axis=-1, keepdims=True)) * query.shape[-1] ** -0.5
        dscores = dscores.astype(query.dtype)
        dquery.append(jnp.einsum("bgrts,bgsk->bgrtk", dscores, key[:, :, keys]))
        dkey = dkey.at[:, :, keys].add(jnp.einsum("bgrts,bgrtk->bgsk", dscores, query[:, :, :, queries]))
    return jnp.concatenate(dquery, axis=3), dkey, dvalue, None


_attend.defvjp(_attend_fwd, _attend_bwd)


class Attention(nn.Module):
    """Multi-head self-attention: query, key, value and out projections around `dot_product_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_bias: bool
    out_std: float = INIT_STD

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        *,
        dropout_rate: Array | None = None,
        cache: KVCache | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Attends within `x`, or over `cache` after writing `x`'s keys and values into it.

        Args:
          x: [B, T, D].
          mask: bool, broadcastable to [B, 1, T, S].
          dropout_rate: of the output, None for none.
          cache: one layer's; needs `positions` [B, T], the slots to write.

        Returns:
          ([B, T, D], the updated cache or None).
        """
        embed_dim = x.shape[-1]

        def project(name: str, num_heads: int) -> Array:
            shape = (num_heads, self.head_dim)
            layer = Einsum((embed_dim, *shape), shape if self.use_bias else None, name=name)
            return layer("btd,dhk->bthk", x)

        query = project("query", self.num_heads)
        key, value = project("key", self.num_kv_heads), project("value", self.num_kv_heads)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            key = cache.key.at[rows, positions].set(key.astype(cache.key.dtype))
            value = cache.value.at[rows, positions].set(value.astype(cache.value.dtype))
            cache = KVCache(key, value)
        mixed = dot_product_attention(query, key.astype(x.dtype), value.astype(x.dtype), mask, causal=cache is None)
        out = Einsum(
            (self.num_heads, self.head_dim, embed_dim),
            (embed_dim,) if self.use_bias else None,
            self.out_std,
            name="out",
        )("bthk,hkd->btd", mixed)
        return dropout(out, dropout_rate, lambda: self.make_rng("dropout")), cache
