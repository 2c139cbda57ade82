"""Cross entropy over next tokens, as a sum and a count, so that parts of a batch add up to the whole."""

import jax
import jax.numpy as jnp

from gptjax.array_types import Array
from gptjax.distributed.mesh import apart


@jax.custom_vjp
def score_targets(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """What losses need to know of logits, in nats, computed in float32.

    Its derivative is written out, since automatic differentiation would keep several arrays of the logits' size.

    Args:
      logits: [B, T, V], float32 or bfloat16.
      targets: [B, T] int32.

    Returns:
      [B, T] each: log softmax(logits)[target], logsumexp(logits), and the mean of the logits.
    """
    return _fwd(logits, targets)[0]


def _fwd(logits: Array, targets: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    # Or XLA:CPU would keep what two passes over the logits share, and the one-hot targets, as arrays in float32.
    logits = apart(logits)
    largest = jnp.max(logits, axis=-1).astype(jnp.float32)
    sums = jnp.sum(jnp.exp(logits.astype(jnp.float32) - largest[..., None]), axis=-1)
    log_normalizer = jnp.log(sums) + largest
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    mean = jnp.mean(apart(logits), axis=-1, dtype=jnp.float32)
    return (target_logits - log_normalizer, log_normalizer, mean), (logits, targets, log_normalizer)


def _bwd(residuals: tuple[Array, Array, Array], gradients: tuple[Array, Array, Array]) -> tuple[Array, None]:
    logits, targets, log_normalizer = apart(residuals)
    of_target, of_normalizer, of_mean = (g[..., None] for g in gradients)
    probabilities = jnp.exp(logits.astype(jnp.float32) - log_normalizer[..., None])
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    grads = probabilities * (of_normalizer - of_target) + hit * of_target + of_mean / logits.shape[-1]
    return apart(grads.astype(logits.dtype)), None


score_targets.defvjp(_fwd, _bwd)


def cross_entropy(
    logits: Array, targets: Array, loss_weights: Array, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(logits)[target].

    Args:
      logits: [B, T, V], float32 or bfloat16.
      targets: [B, T] int32.
      loss_weights: [B, T] float32, 0 where there is nothing to predict.
      z_loss: coefficient of logsumexp(logits)^2, which keeps logits from drifting (Chowdhery et al., 2022,
        arXiv:2204.02311, section 5).
      smoothing: the share of the target's probability that is spread evenly over all V (Szegedy et al., 2016,
        arXiv:1512.00567, section 7).

    Returns:
      (the sum to differentiate, the sum without z-loss and smoothing), in nats.
    """
    log_probs, log_normalizer, mean = score_targets(logits, targets)
    nll = loss = -jnp.sum(log_probs * loss_weights)
    if z_loss:
        loss += z_loss * jnp.sum(jnp.square(log_normalizer) * loss_weights)
    if smoothing:
        loss += smoothing * jnp.sum((log_probs + log_normalizer - mean) * loss_weights)
    return loss, nll
