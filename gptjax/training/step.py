"""One training step and one evaluation step: pure functions to be jitted over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.array_types import Array, Batch, Metrics, Params
from gptjax.models import Model
from gptjax.training.losses import cross_entropy
from gptjax.training.optimizers import DECAYED, Factors, learning_rate, make_optimizer, scale_by_factors
from gptjax.training.state import TrainState, gather

# What a batch may hold for the model besides `inputs`.
MODEL_INPUTS = (
    "positions",
    "segment_ids",
    "prefix",
    "token_types",
    "encoder_tokens",
    "encoder_positions",
    "encoder_segment_ids",
)


class StepSettings(NamedTuple):
    """What is compiled into a step.

    Attributes:
      optimizer, schedule: names in `optimizers`.
      num_train_steps: the schedule's length.
      accumulation_steps: micro-batches a step, summed to the whole batch's gradient.
      clip_norm: greatest global norm of the gradient, 0 for no clipping.
      z_loss: coefficient, 0 for none.
      ema_decay: of the moving average of the parameters, 0 for none.
      skip_spikes: updates whose loss lies this many deviations above its moving mean are skipped, 0 for never.
      use_dropout: False compiles no dropout; True applies `state.hyper.dropout`.
      label_smoothing: see `losses.cross_entropy`.
      factors: of learning rates by path, see `optimizers.factor_of`; what has 0 is frozen.
      decayed: regex on the paths of what decays.
    """

    optimizer: str
    schedule: str
    num_train_steps: int
    accumulation_steps: int
    clip_norm: float
    z_loss: float
    ema_decay: float
    skip_spikes: float
    use_dropout: bool
    label_smoothing: float = 0.0
    factors: Factors = ()
    decayed: str = DECAYED


class Loss(NamedTuple):
    """What a step lowers.

    Attributes:
      sums: (model, params, batch, dropout=(rate, key) or None) -> (what to lower, {'loss': what to report, ...}), sums over
        the batch's targets, so that parts of a batch add up to the whole.
      num_targets: batch -> how many there are.
    """

    sums: Callable[..., tuple[Array, Metrics]]
    num_targets: Callable[[Batch], Array]


def apply_model(
    model: Model, params: Params, batch: Batch, dropout: tuple[Array, Array] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Logits of a batch, and the losses of a mixture's routers; `dropout` is (rate, key).

    They are [B, T, V], a place for each target: of 'sequence_classification' [B, N, num_labels] of N packed texts, and of
    'span' [B, 2 N, S], the tokens of each text that its answer begins and ends with.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if not model.config.token_types:
        inputs.pop("token_types", None)
    if model.config.head == "sequence_classification":
        inputs["num_texts"] = batch["targets"].shape[1]
    rngs = dropout and {"dropout": dropout[1]}
    outputs: Any = model.apply(
        {"params": params},
        batch["inputs"],
        **inputs,
        dropout_rate=dropout and dropout[0],
        rngs=rngs,
        mutable=["losses"],
    )
    logits, losses = outputs
    if model.config.head == "span":
        rows, num_targets = batch["targets"].shape
        here = batch["segment_ids"][:, None] == jnp.arange(1, 1 + num_targets // 2)[:, None]  # [B, N, S]
        logits = jnp.where(here[:, :, None], logits.swapaxes(1, 2)[:, None], -1e9).reshape(rows, num_targets, -1)
    return logits, losses


def loss_sum(
    model: Model,
    params: Params,
    batch: Batch,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    dropout: tuple[Array, Array] | None = None,
) -> tuple[Array, Metrics]:
    """Sum of the loss over a batch's targets: (all there is to lower, {'loss': cross entropy alone}), in nats.

    Args:
      dropout: (rate, key).
    """
    logits, losses = apply_model(model, params, batch, dropout)
    loss, nll = cross_entropy(logits, batch["targets"], batch["loss_weights"], z_loss, label_smoothing)
    # A mixture of experts adds a mean over tokens; times the targets it is a sum like the rest.
    for router_loss in jax.tree.leaves(losses):
        loss += router_loss * jnp.sum(batch["loss_weights"])
    return loss, {"loss": nll}


def target_count(batch: Batch) -> Array:
    """How many targets a batch has."""
    return jnp.sum(batch["loss_weights"])


def make_train_step(
    model: Model, s: StepSettings, loss: Loss | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `train_step(state, batch) -> (state, metrics)`, to be jitted with its state donated.

    Args:
      model, s: what to train, and how.
      loss: what to lower; None for cross entropy over the targets.
    """
    sums, num_targets = loss or Loss(
        functools.partial(loss_sum, z_loss=s.z_loss, label_smoothing=s.label_smoothing), target_count
    )

    def gradient(state: TrainState, batch: Batch, total: Array) -> tuple[Metrics, Params]:
        """Means and the gradient, over micro-batches: each sum is divided by the whole batch's count of targets."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def micro_gradient(micro: Batch, index: Array | int) -> tuple[Metrics, Params]:
            dropout = (state.hyper.dropout, jax.random.fold_in(key, index)) if s.use_dropout else None

            def loss_fn(params: Params) -> tuple[Array, Metrics]:
                to_lower, reported = sums(model, gather((params, state.frozen)), micro, dropout=dropout)
                return jax.tree.map(lambda x: x / total, (to_lower, reported))

            grads, reported = jax.grad(loss_fn, has_aux=True)(state.params)
            return reported, grads

        if s.accumulation_steps == 1:
            return micro_gradient(batch, 0)
        # Micro-batch i takes every n-th row, so that each device keeps its own rows.
        micros = jax.tree.map(lambda x: x.reshape(-1, s.accumulation_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(totals: tuple[Metrics, Params], micro: tuple[Batch, Array]) -> tuple[tuple[Metrics, Params], None]:
            return jax.tree.map(jnp.add, totals, micro_gradient(*micro)), None

        first = jax.tree.map(lambda x: x[0], micros)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_gradient, first, 0))
        return jax.lax.scan(add, zeros, (micros, jnp.arange(s.accumulation_steps)))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        reported, grads = gradient(state, batch, jnp.maximum(num_targets(batch), 1.0))
        grad_norm = optax.tree.norm(grads)
        if s.clip_norm:
            scale = jnp.minimum(1.0, s.clip_norm / (grad_norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
        rate = learning_rate(state.step, s.schedule, s.num_train_steps, state.hyper)
        optimizer = make_optimizer(s.optimizer, rate, state.hyper, s.decayed, model.config.width)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if s.factors:
            updates = scale_by_factors(updates, s.factors)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if s.ema_decay:
            ema = jax.tree.map(lambda old, new: s.ema_decay * old + (1 - s.ema_decay) * new, ema, params)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        tokens = jnp.sum(batch["segment_ids"] > 0)  # all that is read, of which an objective may score a part
        metrics = {**reported, "tokens": tokens, "grad_norm": grad_norm, "learning_rate": rate}
        if s.skip_spikes:
            new, metrics["skipped"] = skip_spike(state, new, reported["loss"], s.skip_spikes)
        return new, metrics

    return train_step


def skip_spike(old: TrainState, new: TrainState, loss: Array, deviations: float) -> tuple[TrainState, Array]:
    """Keeps `old`'s parameters and moments where `loss` is a spike.

    A spike lies more than `deviations` standard deviations above the moving mean of the losses of the last 100 or so
    steps; the first 100 steps, while the statistics settle, are never skipped. The step still counts, so the batch is
    passed over.

    Returns:
      (the state to go on with, 1.0 where the update was skipped).
    """
    deviation = jnp.sqrt(old.loss_variance)
    spike = (old.step >= 100) & (loss > old.loss_mean + deviations * deviation)
    kept = jax.tree.map(lambda a, b: jnp.where(spike, a, b), old, new)
    rate = jnp.where(spike, 0.0, jnp.maximum(0.01, 1.0 / (old.step + 1)))
    difference = loss - old.loss_mean
    return kept._replace(
        step=new.step,
        loss_mean=old.loss_mean + rate * difference,
        loss_variance=(1 - rate) * (old.loss_variance + rate * jnp.square(difference)),
    ), spike.astype(jnp.float32)


def make_eval_step(model: Model) -> Callable[[Params, Batch], Metrics]:
    """Builds `eval_step(params, batch) -> {"loss_sum", "correct", "tokens"}`, sums over the batch's targets.

    They are nats, how many targets the likeliest token hits, and how many there are.
    """

    def eval_step(params: Params, batch: Batch) -> Metrics:
        logits, _ = apply_model(model, params, batch)
        targets, weights = batch["targets"], batch["loss_weights"]
        return {
            "loss_sum": cross_entropy(logits, targets, weights)[1],
            "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights),
            "tokens": jnp.sum(weights),
        }

    return eval_step
