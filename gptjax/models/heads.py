"""From hidden states to what a model gives: scores over the vocabulary, labels, spans, or one vector a text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.sharding import LOGITS, constrain
from gptjax.models.config import TransformerConfig
from gptjax.models.dropout import dropout
from gptjax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS, Einsum, Embedding, add_bias
from gptjax.models.transformer import make_norm


class Head(nn.Module):
    """The output layer that `config.head` names; reads hidden states [B, T, D].

    language_model           [B, T, V]; scores against the token embedding if tied
    masked_lm                [B, T, V]; a dense layer, activation and norm before the scores, which have a bias (BERT)
    sequence_classification  [B, num_labels], from the pooled text, or of N packed texts [B, N, num_labels]; 1 label is
                             regression
    token_classification     [B, T, num_labels]
    span                     [B, T, 2], scores of an answer's first and last token
    embedding                [B, D], the pooled text at length 1
    none                     [B, T, D]
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        token_embedding: Embedding,
        *,
        segment_ids: Array | None = None,
        num_texts: int | None = None,
        pooled: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Args: x [B, T, D]; segment_ids, num_texts as `pool` takes them; pooled, a pooler's output, or else `pool`'s."""
        c = self.config
        if c.head == "none":
            return x
        if c.head in ("language_model", "masked_lm"):
            return self._scores(x, token_embedding)
        if c.head in ("token_classification", "span"):
            x = dropout(x, dropout_rate, lambda: self.make_rng("dropout"))
            return self._labels(x, 2 if c.head == "span" else c.num_labels)
        if pooled is None or c.head == "embedding":
            pooled = pool(x, segment_ids, c.pooling, num_texts)
        if c.head == "embedding":
            length = jnp.sum(jnp.square(pooled.astype(jnp.float32)), axis=-1, keepdims=True)
            # Not x / |x|, whose derivative is not a number where a row is all padding.
            return (pooled * jax.lax.rsqrt(jnp.maximum(length, 1e-24))).astype(pooled.dtype)
        pooled = dropout(pooled, dropout_rate, lambda: self.make_rng("dropout"))
        if num_texts is None:
            return self._labels(pooled[:, None], c.num_labels)[:, 0]
        return self._labels(pooled, c.num_labels)

    def _labels(self, x: Array, num_outputs: int) -> Array:
        layer = Einsum((self.config.embed_dim, num_outputs), (num_outputs,), name="labels")
        return layer("btd,dn->btn", x)

    def _scores(self, x: Array, token_embedding: Embedding) -> Array:
        c = self.config
        if c.head == "masked_lm":
            x = Einsum((c.embed_dim, c.embed_dim), (c.embed_dim,), name="transform")("btd,de->bte", x)
            x = make_norm(c, "transform_norm")((ACTIVATIONS | GATED_ACTIVATIONS)[c.activation](x))
        if c.scale_logits:
            x = x * c.embed_dim**-0.5
        if c.mup:
            x = x / c.width
        if c.tie_embeddings:
            logits = token_embedding.attend(x)
        else:
            logits = Einsum((c.embed_dim, c.vocab_size), name="scores")("btd,dv->btv", x)
        logits = constrain(logits, LOGITS)
        if c.head == "masked_lm":
            logits = add_bias(logits, self.param("bias", nn.initializers.zeros, (c.vocab_size,)))
        if c.logit_softcap:
            logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
        return logits


class Pooler(nn.Module):
    """tanh of a dense layer over the first token (Devlin et al., 2018, arXiv:1810.04805)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array | None = None, num_texts: int | None = None) -> Array:
        """[B, T, D] to [B, D], or of N packed texts to [B, N, D]."""
        dim = self.config.embed_dim
        first = pool(x, segment_ids, "first", num_texts or 1)
        pooled = jnp.tanh(Einsum((dim, dim), (dim,), name="dense")("btd,de->bte", first))
        return pooled if num_texts else pooled[:, 0]


def pool(x: Array, segment_ids: Array | None, pooling: str, num_texts: int | None = None) -> Array:
    """A vector a text from hidden states: the first token's, the last's, or the mean.

    Args:
      x: [B, T, D].
      segment_ids: [B, T], each token's text in the row, 0 for padding; None for one text.
      pooling: 'first', 'last' or 'mean'.
      num_texts: N, the texts that a row has room for; None for one, that all but padding belongs to.

    Returns:
      [B, D], or [B, N, D] with zeros for texts that are not there.
    """
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    number = real.astype(jnp.int32) if segment_ids is None or num_texts is None else segment_ids
    here = number[:, None] == jnp.arange(1, 1 + (num_texts or 1))[:, None]  # [B, N, T]
    if pooling == "mean":
        weights = here / jnp.maximum(jnp.sum(here, axis=-1, keepdims=True), 1)
    else:
        order = jnp.arange(x.shape[1]) * (1 if pooling == "last" else -1)
        weights = here & (order == jnp.max(jnp.where(here, order, -x.shape[1]), axis=-1, keepdims=True))
    pooled = jnp.einsum("bnt,btd->bnd", weights.astype(jnp.float32), x.astype(jnp.float32), precision="highest")
    return (pooled if num_texts else pooled[:, 0]).astype(x.dtype)
