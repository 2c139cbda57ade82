"""From hidden states to what a model gives: scores over the vocabulary, labels, spans, or one vector a text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.sharding import LOGITS, constrain
from gptjax.models.config import TransformerConfig
from gptjax.models.layers import ACTIVATIONS, GATED_ACTIVATIONS, Einsum, Embedding, add_bias, dropout
from gptjax.models.transformer import make_norm


class Head(nn.Module):
    """The output layer that `config.head` names; reads hidden states [B, T, D].

    language_model           [B, T, V]; scores against the token embedding if tied
    masked_lm                [B, T, V]; a dense layer, activation and norm before the scores, which have a bias (BERT)
    sequence_classification  [B, num_labels], from the pooled text; 1 label is regression
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
        pooled: Array | None = None,
        dropout_rate: Array | None = None,
    ) -> Array:
        """Args: x [B, T, D]; segment_ids [B, T], 0 for padding; pooled [B, D], a pooler's output, or else `pooling`'s."""
        c = self.config
        if c.head == "none":
            return x
        if c.head in ("language_model", "masked_lm"):
            return self._scores(x, token_embedding)
        if c.head in ("token_classification", "span"):
            x = dropout(x, dropout_rate, lambda: self.make_rng("dropout"))
            return self._labels(x, 2 if c.head == "span" else c.num_labels)
        if pooled is None or c.head == "embedding":
            pooled = pool(x, segment_ids, c.pooling)
        if c.head == "embedding":
            length = jnp.sum(jnp.square(pooled.astype(jnp.float32)), axis=-1, keepdims=True)
            # Not x / |x|, whose derivative is not a number where a row is all padding.
            return (pooled * jax.lax.rsqrt(jnp.maximum(length, 1e-24))).astype(pooled.dtype)
        pooled = dropout(pooled, dropout_rate, lambda: self.make_rng("dropout"))
        return self._labels(pooled[:, None], c.num_labels)[:, 0]

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
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, D]."""
        dim = self.config.embed_dim
        return jnp.tanh(Einsum((dim, dim), (dim,), name="dense")("btd,de->bte", x[:, :1])[:, 0])


def pool(x: Array, segment_ids: Array | None, pooling: str) -> Array:
    """One vector a row from hidden states [B, T, D]: the first token's, the last's, or the mean, padding left out."""
    if pooling == "first":
        return x[:, 0]
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    if pooling == "last":
        last = jnp.max(jnp.where(real, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    weights = real.astype(jnp.float32)[..., None]
    total = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)).astype(x.dtype)
