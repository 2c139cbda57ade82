"""The encoder-decoder: the original Transformer (Vaswani et al., 2017, arXiv:1706.03762) and T5 (arXiv:1910.10683)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.models.attention import BlockInputs, KVCache
from gptjax.models.attention_ops import Mask, row_mask
from gptjax.models.config import TransformerConfig
from gptjax.models.embedder import Embedder, ScoreBias, row_positions
from gptjax.models.gpt import places
from gptjax.models.heads import Head
from gptjax.models.transformer import Blocks, make_norm


class EncoderDecoder(nn.Module):
    """Scores a target text given a source text; both share one embedding.

    Parameters: `token_embedding` and `position_embedding`; `encoder_blocks`, `encoder_norm` and `encoder_relative_bias`;
    `blocks` (with `cross_attention`), `final_norm` and `relative_bias` of the decoder; `head` unless tied. Norms only if
    pre-norm, biases only with relative positions.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        encoder = dataclasses.replace(c, num_layers=c.num_encoder_layers, prefix_lm=False)
        self.embedder = Embedder(c)
        nn.share_scope(self, self.embedder)
        self.encoder_relative_bias = ScoreBias(encoder, bidirectional=True)
        self.encoder_blocks = Blocks(encoder)
        self.relative_bias = ScoreBias(c, bidirectional=False)
        self.blocks = Blocks(c, cross=True)
        if c.norm_position == "pre":
            self.encoder_norm = make_norm(c, "encoder_norm")
            self.final_norm = make_norm(c, "final_norm")
        self.head = Head(c)

    def __call__(
        self,
        tokens: Array,
        *,
        encoder_tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        encoder_segment_ids: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Scores the next target token at each place.

        Args:
          tokens: [B, T] int32, the target, shifted right.
          encoder_tokens: [B, S] int32, the source.
          positions, encoder_positions: [B, T] and [B, S], places in their texts; None for 0, 1, ...
          segment_ids, encoder_segment_ids: [B, T] and [B, S]; a target sees the source of the same number. 0 is padding;
            None for one pair a row.
          dropout_rate: scalar; None for no dropout. Needs an rng named 'dropout'.

        Returns:
          logits [B, T, V] in the dtype of the computation.
        """
        if (segment_ids is None) != (encoder_segment_ids is None):
            encoder_segment_ids = jnp.ones_like(encoder_tokens) if encoder_segment_ids is None else encoder_segment_ids
            segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        memory = self.encode(
            encoder_tokens, positions=encoder_positions, segment_ids=encoder_segment_ids, dropout_rate=dropout_rate
        )
        positions = row_positions(self.config, tokens, positions)
        x = self.embedder(tokens, positions, dropout_rate=dropout_rate)
        inputs = BlockInputs(
            positions,
            row_mask(tokens, segment_ids, causal=True),
            tokens,
            x,
            bias=self.relative_bias(),
            memory=memory,
            memory_mask=_memory_mask(tokens, memory.shape[1], segment_ids, encoder_segment_ids),
            dropout_rate=dropout_rate,
        )
        x, _ = self.blocks(x, inputs)
        x = self.final_norm(x) if self.config.norm_position == "pre" else x
        return self.head(x, self.embedder.token_embedding)

    def encode(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """The encoder's output [B, S, D] for source tokens [B, S]; the other arguments as in `__call__`."""
        positions = row_positions(self.config, tokens, positions)
        x = self.embedder(tokens, positions, dropout_rate=dropout_rate)
        mask = row_mask(tokens, segment_ids, causal=False)
        bias = self.encoder_relative_bias()
        x, _ = self.encoder_blocks(x, BlockInputs(positions, mask, tokens, x, bias=bias, dropout_rate=dropout_rate))
        return self.encoder_norm(x) if self.config.norm_position == "pre" else x

    def decode(
        self,
        tokens: Array,
        positions: Array,
        cache: list[KVCache],
        *,
        last: Array | None = None,
        memory: Array | None = None,
        encoder_segment_ids: Array | None = None,
    ) -> tuple[Array, list[KVCache]]:
        """Scores the next token after `tokens` [B, T] at `positions` [B, T], given a cache of what came before.

        Args:
          tokens, positions: what is new; the positions of a row follow one another.
          last: [B], the only places in `tokens` to score; None for all.
          cache: a layer each, with `cross_key` and `cross_value`, which the first call writes.
          memory: [B, S, D], the encoder's output, at the first call; later None, as the cache holds all that is needed.
          encoder_segment_ids: [B, S], 0 for padding; None for no padding.

        Returns:
          (logits [B, T, V], of `last` [B, 1, V], and the cache with `tokens` written).
        """
        assert cache[0].cross_value is not None
        segment_ids = None if encoder_segment_ids is None else jnp.ones_like(tokens)
        x = self.embedder(tokens, positions)
        inputs = BlockInputs(
            positions,
            Mask(positions, positions),  # each layer's cache knows the positions of its keys
            tokens,
            x,
            bias=self.relative_bias(),
            memory=memory,
            memory_mask=_memory_mask(tokens, cache[0].cross_value.shape[2], segment_ids, encoder_segment_ids),
        )
        x, new_cache = self.blocks(x, inputs, cache)
        assert new_cache is not None
        x = self.final_norm(x) if self.config.norm_position == "pre" else x
        return self.head(places(x, last), self.embedder.token_embedding), new_cache


def _memory_mask(tokens: Array, memory_len: int, segments: Array | None, encoder_segments: Array | None) -> Mask:
    query_index = jnp.zeros((1, tokens.shape[1]), jnp.int32)
    return Mask(query_index, jnp.zeros((1, memory_len), jnp.int32), segments, encoder_segments, causal=False)
