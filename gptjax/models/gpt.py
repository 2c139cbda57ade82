"""The decoder-only GPT (Radford et al., 2019): embeddings, blocks, a final norm and the language-model head."""

import flax.linen as nn
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.attention import KVCache, cache_mask, causal_mask
from gptjax.models.layers import Einsum, Embedding, dropout
from gptjax.models.transformer import DTYPES, Blocks, TransformerConfig, make_norm


class GPT(nn.Module):
    """A causal language model over packed rows; with its defaults, GPT-2.

    Parameters are a plain dict: `token_embedding`, `position_embedding`, `blocks` (stacked [L, ...]), `final_norm`, and
    `head` unless the embeddings are tied.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.token_embedding = Embedding((c.vocab_size, c.embed_dim))
        self.position_embedding = Embedding((c.max_seq_len, c.embed_dim))
        self.blocks = Blocks(c)
        self.final_norm = make_norm(c, "final_norm")
        if not c.tie_embeddings:
            self.head = Einsum((c.embed_dim, c.vocab_size))

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Scores the next token at each place.

        Args:
          tokens: [B, T] int32.
          positions: [B, T], each token's place in its document; None for 0 .. T-1.
          segment_ids: [B, T], each token's document in the row, 0 for padding; None for one document.
          dropout_rate: scalar; None for no dropout. Needs an rng named 'dropout'.

        Returns:
          logits [B, T, V] in the dtype of the computation.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self._embed(tokens, positions, dropout_rate)
        x, _ = self.blocks(x, causal_mask(tokens.shape[1], segment_ids), dropout_rate=dropout_rate)
        return self._logits(x)

    def decode(self, tokens: Array, positions: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Scores the next token after `tokens` [B, T] at `positions` [B, T], given a cache of what came before.

        Returns:
          (logits [B, T, V], the cache with `tokens` written).
        """
        x = self._embed(tokens, positions, None)
        mask = cache_mask(positions, cache.key.shape[2])
        x, new_cache = self.blocks(x, mask, cache=cache, positions=positions)
        assert new_cache is not None
        return self._logits(x), new_cache

    def _embed(self, tokens: Array, positions: Array, dropout_rate: Array | None) -> Array:
        dtype = DTYPES[self.config.dtype]
        x = self.token_embedding(tokens, dtype) + self.position_embedding(positions, dtype)
        return dropout(x, dropout_rate, lambda: self.make_rng("dropout"))

    def _logits(self, x: Array) -> Array:
        x = self.final_norm(x)
        if self.config.tie_embeddings:
            return self.token_embedding.attend(x)
        return self.head("btd,dv->btv", x)
