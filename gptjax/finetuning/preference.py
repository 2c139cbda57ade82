"""DPO: learning from pairs of a chosen and a rejected answer (Rafailov et al., 2023, arXiv:2305.18290).

In a row segments 2k - 1 and 2k are the chosen and the rejected answer to one prompt, of which `loss_weights` marks the
answers' tokens; `reference` [B, T] holds the log-probabilities of the targets under the model that training began with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Batch, Metrics, Params
from gptjax.models import Model
from gptjax.training.losses import score_targets
from gptjax.training.step import Loss, apply_model


def target_log_probabilities(
    model: Model, params: Params, batch: Batch, dropout: tuple[Array, Array] | None = None
) -> Array:
    """log p(target) at each place, in nats: [B, T] float32."""
    return score_targets(apply_model(model, params, batch, dropout)[0], batch["targets"])[0]


def preference_loss(beta: float) -> Loss:
    """The loss of equation 7: -log sigmoid(beta * margin) of each pair.

    The margin is log(p / p_reference) of the chosen answer less that of the rejected. Reports `loss`, `accuracy` (how often
    the margin is above 0) and `margin`, times beta as in the paper's rewards.
    """

    def sums(
        model: Model, params: Params, batch: Batch, *, dropout: tuple[Array, Array] | None = None
    ) -> tuple[Array, Metrics]:
        gain = (target_log_probabilities(model, params, batch, dropout) - batch["reference"]) * batch["loss_weights"]
        length = gain.shape[1]
        by_segment = jax.vmap(lambda x, segment: jax.ops.segment_sum(x, segment, length + 2))(
            gain, batch["segment_ids"]
        )
        chosen, rejected = by_segment[:, 1 : length + 1 : 2], by_segment[:, 2 : length + 2 : 2]
        is_pair = 2 * jnp.arange(1, chosen.shape[1] + 1) <= jnp.max(batch["segment_ids"], axis=1, keepdims=True)
        margin = jnp.where(is_pair, beta * (chosen - rejected), 0.0)
        loss = -jnp.sum(jax.nn.log_sigmoid(margin) * is_pair)
        return loss, {"loss": loss, "accuracy": jnp.sum((margin > 0) * 1.0), "margin": jnp.sum(margin)}

    return Loss(sums, lambda batch: jnp.sum(jnp.max(batch["segment_ids"], axis=1) // 2))


def make_eval_step(model: Model, loss: Loss) -> Callable[[Params, Batch], Metrics]:
    """Builds what `training.step.make_eval_step` does, of pairs in place of tokens; adds `margin`."""

    def eval_step(params: Params, batch: Batch) -> Metrics:
        _, sums = loss.sums(model, params, batch)
        names = {"loss": "loss_sum", "accuracy": "correct", "margin": "margin"}
        return {names[name]: value for name, value in sums.items()} | {"tokens": loss.num_targets(batch)}

    return eval_step
