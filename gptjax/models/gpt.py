"""The decoder-only GPT (Radford et al., 2019; Llama, Touvron et al., 2023): embeddings, blocks, a final norm, a head."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.attention import BlockInputs, KVCache
from gptjax.models.attention_ops import Mask, row_mask
from gptjax.models.config import TransformerConfig
from gptjax.models.embedder import Embedder, ScoreBias, row_positions
from gptjax.models.heads import Head
from gptjax.models.transformer import Blocks, make_norm


class GPT(nn.Module):
    """A causal language model over packed rows; with its defaults, GPT-2.

    Parameters are a plain dict: `token_embedding`, `position_embedding`, `blocks` (stacked [L, ...]), `final_norm`, and
    `head` unless the embeddings are tied.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.embedder = Embedder(c)
        nn.share_scope(self, self.embedder)
        self.relative_bias = ScoreBias(c, bidirectional=False)
        self.blocks = Blocks(c)
        if c.norm_position == "pre":
            self.final_norm = make_norm(c, "final_norm")
        self.head = Head(c)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        prefix: Array | None = None,
        num_texts: int | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Applies the head to the hidden states; for a language model, scores the next token at each place.

        Args:
          tokens: [B, T] int32.
          positions: [B, T], each token's place in its document; None for 0 .. T-1.
          segment_ids: [B, T], each token's document in the row, 0 for padding; None for one document.
          prefix: bool [B, T], tokens that their whole document sees (prefix LM); None for none.
          num_texts: N, to classify each of the texts that `segment_ids` number from 1 to N; None for one a row.
          dropout_rate: scalar; None for no dropout. Needs an rng named 'dropout'.

        Returns:
          What `heads.Head` gives, in the dtype of the computation: logits [B, T, V] of a language model.
        """
        x = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, prefix=prefix, dropout_rate=dropout_rate
        )
        texts: dict[str, Any] = {"segment_ids": segment_ids, "num_texts": num_texts}
        return self.head(x, self.embedder.token_embedding, **texts, dropout_rate=dropout_rate)

    def hidden_states(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        prefix: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """The last block's output after the final norm, [B, T, D]; arguments as in `__call__`."""
        positions = row_positions(self.config, tokens, positions)
        mask = row_mask(tokens, segment_ids, causal=True, prefix=prefix)
        return self._apply_blocks(tokens, positions, mask, dropout_rate, None)[0]

    def decode(
        self,
        tokens: Array,
        positions: Array,
        cache: list[KVCache],
        *,
        last: Array | None = None,
        prefix_len: Array | None = None,
    ) -> tuple[Array, list[KVCache]]:
        """Scores the next token after `tokens` [B, T] at `positions` [B, T], given a cache of what came before.

        Args:
          tokens, positions: what is new; the positions of a row follow one another.
          cache: of what came before, a layer each.
          last: [B], the only places in `tokens` to score; None for all.
          prefix_len: [B], how many tokens every token sees (prefix LM), read by the first call and given to all; None for
            none.

        Returns:
          (logits [B, T, V], of `last` [B, 1, V], and the cache with `tokens` written).
        """
        prefix = None if prefix_len is None else jnp.arange(cache[0].num_slots) < prefix_len[:, None]
        mask = Mask(positions, positions, prefix=prefix)  # each layer's cache knows the positions of its keys
        x, new_cache = self._apply_blocks(tokens, positions, mask, None, cache)
        assert new_cache is not None
        return self.head(places(x, last), self.embedder.token_embedding), new_cache

    def _apply_blocks(
        self,
        tokens: Array,
        positions: Array,
        mask: Mask,
        dropout_rate: Array | None,
        cache: list[KVCache] | None,
    ) -> tuple[Array, list[KVCache] | None]:
        x = self.embedder(tokens, positions, dropout_rate=dropout_rate)
        inputs = BlockInputs(positions, mask, tokens, x, bias=self.relative_bias(), dropout_rate=dropout_rate)
        x, cache = self.blocks(x, inputs, cache)
        return (self.final_norm(x) if self.config.norm_position == "pre" else x), cache


def places(x: Array, index: Array | None) -> Array:
    """Of `x` [B, T, D] the places `index` [B], as [B, 1, D]; all of it for None."""
    return x if index is None else jnp.take_along_axis(x, index[:, None, None], axis=1)
