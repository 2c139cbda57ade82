"""The state of a run: everything that the next step depends on, as one pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.models import Model, init_params
from gptjax.training.optimizers import Hyperparameters, make_optimizer


class TrainState(NamedTuple):
    """What a step takes and returns; what a checkpoint holds.

    Attributes:
      step: int32 scalar, updates made so far.
      params: float32 masters.
      opt_state: the optimizer's moments.
      ema: moving average of `params`, or None.
      hyper: the numbers a sweep may vary.
      key: uint32 data of the random key; each step folds its number into it, so a resumed run draws the same.
      loss_mean, loss_variance: float32 scalars, moving statistics of the loss, to recognise spikes.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None
    hyper: Hyperparameters
    key: Array
    loss_mean: Array
    loss_variance: Array


def init_state(
    model: Model, optimizer: str, hyper: Hyperparameters, seed: Array, init_scale: Array, *, ema: bool
) -> TrainState:
    """Draws the state of step 0; a pure function to be jitted with the shardings of its result.

    Args:
      model: the model to train.
      optimizer: a name in `optimizers.OPTIMIZERS`.
      hyper: float32 scalars.
      seed: uint32 scalar.
      init_scale: float32 scalar, multiplies the initial deviation of kernels and embeddings.
      ema: whether to keep a moving average of the parameters.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = init_params(model, init_key, init_scale)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(optimizer, 0.0, hyper).init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        hyper=hyper,
        key=jax.random.key_data(step_key),
        loss_mean=jnp.zeros(()),
        loss_variance=jnp.zeros(()),
    )
