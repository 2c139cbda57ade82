"""Cross entropy over next tokens, as a sum and a count, so that parts of a batch add up to the whole."""

import functools

import jax
import jax.numpy as jnp

from gptjax.array_types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    logits: Array, targets: Array, loss_weights: Array, z_loss: float = 0.0, smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(logits)[target], computed in float32.

    Its derivative is written out, since automatic differentiation would keep several arrays of the logits' size.

    Args:
      logits: [B, T, V], float32 or bfloat16.
      targets: [B, T] int32.
      loss_weights: [B, T] float32, 0 where there is nothing to predict; no gradient flows to it.
      z_loss: coefficient of logsumexp(logits)^2, which keeps logits from drifting (Chowdhery et al., 2022,
        arXiv:2204.02311, section 5).
      smoothing: the share of the target's probability that is spread evenly over all V (Szegedy et al., 2016,
        arXiv:1512.00567, section 7).

    Returns:
      (the sum to differentiate, the sum without z-loss and smoothing, without a gradient), in nats.
    """
    return _fwd(logits, targets, loss_weights, z_loss, smoothing)[0]


def _fwd(
    logits: Array, targets: Array, loss_weights: Array, z_loss: float, smoothing: float
) -> tuple[tuple[Array, Array], tuple]:
    log_normalizer = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)
    nll = jnp.sum((log_normalizer - target_logits) * loss_weights)
    loss = nll + z_loss * jnp.sum(jnp.square(log_normalizer) * loss_weights) if z_loss else nll
    if smoothing:
        even = target_logits - jnp.mean(logits, axis=-1, dtype=jnp.float32)
        loss += smoothing * jnp.sum(even * loss_weights)
    return (loss, nll), (logits, targets, loss_weights, log_normalizer)


def _bwd(z_loss: float, smoothing: float, residuals: tuple, gradients: tuple[Array, Array]) -> tuple[Array, None, None]:
    logits, targets, loss_weights, log_normalizer = residuals
    scale = loss_weights * gradients[0]
    probabilities = jnp.exp(logits.astype(jnp.float32) - log_normalizer[..., None])
    if z_loss:
        probabilities *= 1 + 2 * z_loss * log_normalizer[..., None]
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    wanted = (1 - smoothing) * hit + smoothing / logits.shape[-1] if smoothing else hit
    grads = (probabilities - wanted) * scale[..., None]
    return grads.astype(logits.dtype), None, None


cross_entropy.defvjp(_fwd, _bwd)
