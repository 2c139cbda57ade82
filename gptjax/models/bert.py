"""The encoder-only BERT (Devlin et al., 2018, arXiv:1810.04805): blocks that see both ways, a pooler, a head."""

from typing import Any

import flax.linen as nn

from gptjax.array_types import Array
from gptjax.models.attention import BlockInputs
from gptjax.models.attention_ops import row_mask
from gptjax.models.config import TransformerConfig
from gptjax.models.embedder import Embedder, ScoreBias, row_positions
from gptjax.models.heads import Head, Pooler
from gptjax.models.transformer import Blocks, make_norm


class BERT(nn.Module):
    """A bidirectional encoder.

    Parameters: `token_embedding`, `position_embedding`, `type_embedding`, `embed_norm`, `blocks` (stacked [L, ...]),
    `final_norm` if pre-norm, `pooler` and `head` if the config has them.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.embedder = Embedder(c)
        nn.share_scope(self, self.embedder)
        self.relative_bias = ScoreBias(c, bidirectional=True)
        self.blocks = Blocks(c)
        if c.norm_position == "pre":
            self.final_norm = make_norm(c, "final_norm")
        if c.pooler:
            self.pooler = Pooler(c)
        self.head = Head(c)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        token_types: Array | None = None,
        num_texts: int | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Applies the head to the hidden states.

        Args:
          tokens: [B, T] int32.
          positions: [B, T], each token's place in its document; None for 0 .. T-1.
          segment_ids: [B, T], each token's document in the row, 0 for padding; None for one document.
          token_types: [B, T], which of a pair of texts a token belongs to; None for the first.
          num_texts: N, to classify each of the texts that `segment_ids` number from 1 to N; None for one a row.
          dropout_rate: scalar; None for no dropout. Needs an rng named 'dropout'.

        Returns:
          What `heads.Head` gives: logits [B, T, V] of a masked language model, labels, spans or vectors.
        """
        x = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, token_types=token_types, dropout_rate=dropout_rate
        )
        texts: dict[str, Any] = {"segment_ids": segment_ids, "num_texts": num_texts}
        pooled = self.pooler(x, **texts) if self.config.pooler else None
        return self.head(x, self.embedder.token_embedding, **texts, pooled=pooled, dropout_rate=dropout_rate)

    def hidden_states(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        token_types: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """The last block's output, [B, T, D]; arguments as in `__call__`."""
        positions = row_positions(self.config, tokens, positions)
        x = self.embedder(tokens, positions, token_types=token_types, dropout_rate=dropout_rate)
        mask = row_mask(tokens, segment_ids, causal=False)
        inputs = BlockInputs(positions, mask, tokens, x, bias=self.relative_bias(), dropout_rate=dropout_rate)
        x, _ = self.blocks(x, inputs)
        return self.final_norm(x) if self.config.norm_position == "pre" else x

    def pooled(self, tokens: Array, **inputs: Array | None) -> Array:
        """The pooler's output [B, D]; arguments as in `__call__`."""
        return self.pooler(self.hidden_states(tokens, **inputs))
