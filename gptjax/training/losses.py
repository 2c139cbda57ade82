"""Cross entropy over next tokens, as a sum and a count, so that parts of a batch add up to the whole."""

import jax
import jax.numpy as jnp

from gptjax.array_types import Array


def cross_entropy(logits: Array, targets: Array, loss_weights: Array, z_loss: float = 0.0) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(logits)[target].

    Args:
      logits: [B, T, V] float32.
      targets: [B, T] int32.
      loss_weights: [B, T] float32, 0 where there is nothing to predict.
      z_loss: coefficient of logsumexp(logits)^2, which keeps logits from drifting (Chowdhery et al., 2022,
        arXiv:2204.02311, section 5).

    Returns:
      (the sum to differentiate, the sum without z-loss), in nats.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jnp.sum((log_normalizer - target_logits) * loss_weights)
    if not z_loss:
        return nll, nll
    return nll + z_loss * jnp.sum(jnp.square(log_normalizer) * loss_weights), nll
