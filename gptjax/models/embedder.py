"""Tokens, their places and their types as vectors: the first layer of every family."""

import flax.linen as nn
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.sharding import HIDDEN, constrain
from gptjax.models.config import DTYPES, TransformerConfig
from gptjax.models.dropout import dropout
from gptjax.models.layers import INIT_STD, Embedding
from gptjax.models.positions import Bias, alibi_bias, relative_bias, sinusoidal
from gptjax.models.transformer import make_norm


class Embedder(nn.Module):
    """The sum of token, position and type embeddings, scaled and normed as `config` says."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.token_embedding = Embedding((c.vocab_size, c.embed_dim))
        if c.position == "learned":
            self.position_embedding = Embedding((c.max_seq_len, c.embed_dim))
        if c.token_types:
            self.type_embedding = Embedding((c.token_types, c.embed_dim))
        if c.embed_norm:
            self.embed_norm = make_norm(c, "embed_norm")

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        *,
        token_types: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """[B, T, D] in the dtype of the computation, from tokens, positions and types [B, T]."""
        c = self.config
        dtype = DTYPES[c.dtype]
        x = self.token_embedding(tokens, dtype)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale or c.embed_dim**0.5, dtype)
        if c.position == "learned":
            x = x + self.position_embedding(positions, dtype)
        elif c.position == "sinusoidal":
            x = x + sinusoidal(positions, c.embed_dim).astype(dtype)
        if c.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.type_embedding(types, dtype)
        if c.embed_norm:
            x = self.embed_norm(x)
        return dropout(constrain(x, HIDDEN), dropout_rate, lambda: self.make_rng("dropout"))


class ScoreBias(nn.Module):
    """What positions add to the scores of every layer of a stack: nothing, ALiBi, or T5's learned table."""

    config: TransformerConfig
    bidirectional: bool

    @nn.compact
    def __call__(self) -> Bias | None:
        c = self.config
        if c.position == "alibi":
            return alibi_bias(c.num_heads)
        if c.position == "relative":
            table = self.param("embedding", nn.initializers.normal(INIT_STD), (c.relative_buckets, c.num_heads))
            return relative_bias(table, bidirectional=self.bidirectional, max_distance=c.relative_max_distance)
        return None


def row_positions(config: TransformerConfig, tokens: Array, positions: Array | None) -> Array:
    """`positions`, or 0 .. T-1 in each row if there are none.

    Raises:
      ValueError: rows longer than the table of learned positions.
    """
    if positions is not None:
        return positions
    if config.position == "learned" and tokens.shape[1] > config.max_seq_len:
        raise ValueError(
            f"{tokens.shape[1]} tokens are more than model.max_seq_len {config.max_seq_len} learned positions"
        )
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
