"""Attention as a module: projections, positions, the cache, and the choice of an implementation."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.attention_ops import Mask, attend
from gptjax.models.config import INIT_STD, TransformerConfig
from gptjax.models.dropout import dropout
from gptjax.models.layers import Einsum, RMSNorm
from gptjax.models.positions import Bias


class KVCache(NamedTuple):
    """One layer's keys and values of the tokens seen so far; position p is in slot p mod S.

    Attributes:
      key, value: [B, G, K, S] and [B, G, S, K], the orders in which one query's products read them along the last axis.
      cross_key, cross_value: of the encoder's output, the same shapes with its length; None without an encoder.
    """

    key: Array
    value: Array
    cross_key: Array | None = None
    cross_value: Array | None = None

    @property
    def num_slots(self) -> int:
        """S."""
        return self.value.shape[2]


class BlockInputs(NamedTuple):
    """What every block of a stack is given besides the residual stream.

    Attributes:
      positions: [B, T], each token's place in its document, for rotary positions.
      mask: who may look at whom.
      bias: added to the scores of self-attention, None for nothing.
      tokens: [B, T], for value embeddings.
      embedded: [B, T, D], the embedded tokens, for residual scales.
      memory: [B, S, D], the encoder's output; None without an encoder, or when the cache holds its keys and values.
      memory_mask: which of it each token may look at; None without an encoder.
      dropout_rate: scalar, None for no dropout.
    """

    positions: Array
    mask: Mask
    tokens: Array
    embedded: Array
    bias: Bias | None = None
    memory: Array | None = None
    memory_mask: Mask | None = None
    dropout_rate: Array | None = None


class Attention(nn.Module):
    """Multi-head attention: query, key, value and out projections around `attention_ops.attend`.

    Attributes:
      cross: keys and values come from the encoder's output.
    """

    config: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: BlockInputs, *, window: Array | int = 0, cache: KVCache | None = None
    ) -> tuple[Array, KVCache | None]:
        """Attends within `x`, over the cache after writing `x`'s keys and values into it, or over the encoder's output.

        Args:
          x: [B, T, D].
          inputs: of this stack of blocks.
          window: how many of the latest positions are seen, 0 for all.
          cache: one layer's.

        Returns:
          ([B, T, D], the updated cache or None).
        """
        c = self.config
        with_bias = c.use_bias or c.qkv_bias

        def project(name: str, y: Array, num_heads: int) -> Array:
            shape = (num_heads, c.head_dim)
            bias_shape = shape if with_bias else None
            return Einsum((c.embed_dim, *shape), bias_shape, c.hidden_std, name=name)("btd,dhk->bthk", y)

        query = project("query", x, c.num_heads)
        if c.qk_norm:
            query = RMSNorm(c.norm_epsilon, name="query_norm")(query)
        if self.cross and inputs.memory is None:
            assert cache is not None and cache.cross_key is not None and cache.cross_value is not None
            key, value = _by_position(cache.cross_key, cache.cross_value)
        else:
            source = inputs.memory if self.cross else x
            assert source is not None
            key, value = (project(name, source, c.num_kv_heads) for name in ("key", "value"))
            if c.qk_norm:
                key = RMSNorm(c.norm_epsilon, name="key_norm")(key)
        if self.cross:
            if cache is not None:
                cross_key, cross_value = (y.astype(cache.key.dtype) for y in (key, value))
                cache = cache._replace(
                    cross_key=cross_key.transpose(0, 2, 3, 1), cross_value=cross_value.swapaxes(1, 2)
                )
            mask = inputs.memory_mask
            assert mask is not None
        else:
            if c.value_embeddings:
                value = value + self._value_embedding(inputs.tokens, value)
            if c.position == "rotary":
                query, key = (c.rope.rotate(y, inputs.positions) for y in (query, key))
            mask = inputs.mask._replace(window=window)
            if cache is not None:
                cache = _write(cache, key, value, inputs.positions)
                key, value = _by_position(cache.key, cache.value)
                mask = mask._replace(key_index=slot_positions(inputs.positions[:, -1:], cache.num_slots))
        sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,)) if c.attention_sinks else None
        weights_dropout = None
        if c.attention_dropout and inputs.dropout_rate is not None:
            weights_dropout = (inputs.dropout_rate, self.make_rng("dropout"))
        mixed = attend(
            query,
            key.astype(x.dtype),
            value.astype(x.dtype),
            mask,
            implementation=c.attention if cache is None else "plain",
            scale=c.query_scale,
            bias=None if self.cross else inputs.bias,
            softcap=c.attention_softcap,
            sinks=sinks,
            dropout=weights_dropout,
        )
        out = Einsum(
            (c.num_heads, c.head_dim, c.embed_dim), (c.embed_dim,) if c.use_bias else None, c.residual_std, name="out"
        )("bthk,hkd->btd", mixed)
        return dropout(out, inputs.dropout_rate, lambda: self.make_rng("dropout")), cache

    def _value_embedding(self, tokens: Array, value: Array) -> Array:
        """A second embedding of the tokens, added to the values (Zhou et al., 2024, arXiv:2410.17897, in the form of the
        modded-nanogpt speed runs: a table a layer instead of the first layer's values)."""
        c = self.config
        table = self.param(
            "value_embedding", nn.initializers.normal(INIT_STD), (c.vocab_size, c.num_kv_heads, c.head_dim)
        )
        return jnp.take(table, tokens, axis=0).astype(value.dtype)


def slot_positions(last: Array, num_slots: int) -> Array:
    """The position that each slot of a cache holds once `last` [B, 1] is written; [B, S], for empty slots beyond it."""
    held = last - (last - jnp.arange(num_slots)) % num_slots
    return jnp.where(held < 0, jnp.iinfo(jnp.int32).max // 2, held)


def _write(cache: KVCache, key: Array, value: Array, positions: Array) -> KVCache:
    rows = jnp.arange(key.shape[0])[:, None]
    slots = positions % cache.num_slots
    key = cache.key.at[rows, :, :, slots].set(key.astype(cache.key.dtype))
    value = cache.value.at[rows, :, slots].set(value.astype(cache.value.dtype))
    # XLA:CPU would write once for each reader, all but one into a copy of the cache.
    key, value = jax.lax.optimization_barrier((key, value))
    return cache._replace(key=key, value=value)


def _by_position(key: Array, value: Array) -> tuple[Array, Array]:
    """Those of a cache as [B, S, G, K]; no copies, for the products that follow take any order."""
    return key.transpose(0, 3, 1, 2), value.swapaxes(1, 2)
