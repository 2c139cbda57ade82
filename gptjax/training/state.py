"""The state of a run: everything that the next step depends on, as one pytree of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.array_types import Array, Params
from gptjax.distributed.sharding import path_of
from gptjax.models import Model, init_params
from gptjax.training.optimizers import Hyperparameters, make_optimizer


class TrainState(NamedTuple):
    """What a step takes and returns; what a checkpoint holds.

    Attributes:
      step: int32 scalar, updates made so far.
      params: float32 masters, those that are trained.
      opt_state: the optimizer's moments.
      ema: moving average of `params`, or None.
      frozen: the model's other parameters, or None.
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
    frozen: Params | None = None

    @property
    def model_params(self) -> Params:
        """All parameters of the model."""
        return gather((self.params, self.frozen))

    @property
    def eval_params(self) -> Params:
        """The same with the moving average in place of what is trained, if there is one."""
        return gather((self.params if self.ema is None else self.ema, self.frozen))


def gather(trees: tuple[Params | None, ...], keep: Callable[[str], bool] = lambda path: True) -> Params:
    """One tree of the leaves of several whose path `keep` takes."""
    gathered: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if keep(path_of(path[1:])):
            node = gathered
            for key in path[1:-1]:
                node = node.setdefault(key.key, {})
            node[path[-1].key] = leaf
    return gathered


def init_state(
    model: Model,
    optimizer: str,
    hyper: Hyperparameters,
    seed: Array,
    init_scale: Array,
    *,
    ema: bool,
    change: Callable[[Params, Array], Params] = lambda params, key: params,
    is_frozen: Callable[[str], bool] = lambda path: False,
) -> TrainState:
    """Draws the state of step 0; a pure function to be jitted with the shardings of its result.

    Args:
      model: the model to train.
      optimizer: a name in `optimizers.OPTIMIZERS`.
      hyper: float32 scalars.
      seed: uint32 scalar.
      init_scale: float32 scalar, multiplies the initial deviation of kernels and embeddings.
      ema: whether to keep a moving average of the parameters.
      change: (parameters, key) -> what to start from in place of the drawn parameters.
      is_frozen: of a parameter's path, whether it is left as it is.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    whole = change(init_params(model, init_key, init_scale), jax.random.fold_in(init_key, 1))
    params = gather((whole,), lambda path: not is_frozen(path))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(optimizer, 0.0, hyper).init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        hyper=hyper,
        key=jax.random.key_data(step_key),
        loss_mean=jnp.zeros(()),
        loss_variance=jnp.zeros(()),
        frozen=gather((whole,), is_frozen) or None,
    )
