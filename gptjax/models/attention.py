"""Scaled dot-product attention, its masks in one place, and the module around it."""

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


def dot_product_attention(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """softmax(query key^T / sqrt(K)) value (Vaswani et al., 2017, arXiv:1706.03762, section 3.2.1).

    Args:
      query: [B, T, H, K].
      key: [B, S, G, K]; each of the G groups serves H / G query heads (Ainslie et al., 2023, arXiv:2305.13245).
      value: [B, S, G, K].
      mask: bool, broadcastable to [B, 1, T, S].

    Returns:
      [B, T, H, K] in the dtype of `query`; the softmax is computed in float32.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    query = (query * head_dim**-0.5).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btghk,bsgk->bghts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -1e30), axis=-1).astype(value.dtype)
    return jnp.einsum("bghts,bsgk->btghk", weights, value).reshape(batch, length, num_heads, head_dim)


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
        mixed = dot_product_attention(query, key.astype(x.dtype), value.astype(x.dtype), mask)
        out = Einsum(
            (self.num_heads, self.head_dim, embed_dim),
            (embed_dim,) if self.use_bias else None,
            self.out_std,
            name="out",
        )("bthk,hkd->btd", mixed)
        return dropout(out, dropout_rate, lambda: self.make_rng("dropout")), cache
