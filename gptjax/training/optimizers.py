"""Learning-rate schedules, AdamW and Muon, with every number a sweep may vary as a traced array."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.array_types import Array, Params
from gptjax.distributed.sharding import path_of

# Kernels and embeddings decay; biases and norms do not. Not by rank: a stacked bias [L, H, K] has rank 3.
DECAYED = r"(kernel|embedding)$"
# Muon orthogonalises the matrices inside the blocks; embeddings, positions, head, norms and biases go to AdamW.
# (axes contracted with the input, axes of the output), after the leading [L], which is a batch of matrices.
MUON_MATRICES: tuple[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]], ...] = (
    (r"blocks/(cross_)?attention/(query|key|value)/kernel$", ((1,), (2, 3))),  # [L, D, H, K]
    (r"blocks/(cross_)?attention/out/kernel$", ((1, 2), (3,))),  # [L, H, K, D]
    (r"blocks/mlp/(up|gate|down)/kernel$", ((1,), (2,))),  # [L, D, F], [L, F, D]
    (r"blocks/mlp/experts_(up|gate|down)/kernel$", ((2,), (3,))),  # [L, E, D, F], [L, E, F, D]
)
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "rsqrt", "constant")

Factors = tuple[tuple[str, float], ...]  # (regex on the parameter path, what its learning rate is multiplied by)


class Hyperparameters(NamedTuple):
    """Numbers that a sweep may vary: float32 scalars in the state, never constants of the compiled step."""

    learning_rate: Array
    warmup_steps: Array
    final_fraction: Array  # of the learning rate, at the last step
    weight_decay: Array
    beta1: Array
    beta2: Array
    momentum: Array  # Muon's
    dropout: Array


def learning_rate(step: Array, schedule: str, num_train_steps: int, hyper: Hyperparameters) -> Array:
    """The learning rate of update number `step` (from 0).

    Linear warm-up over `warmup_steps`, then to `final_fraction` of the peak at the last step: by a half cosine, a line,
    or, for 'wsd' (warmup-stable-decay, Hu et al., 2024, arXiv:2404.06395), a line over the last fifth. Or, for 'rsqrt', as
    1 / sqrt(step) wherever that leads (Vaswani et al., 2017, arXiv:1706.03762, section 5.3).

    Args:
      step: int32 scalar.
      schedule: one of `SCHEDULES`.
      num_train_steps: the number of updates.
      hyper: the numbers.

    Returns:
      float32 scalar.
    """
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / jnp.maximum(hyper.warmup_steps, 1))
    progress = (step - hyper.warmup_steps) / jnp.maximum(num_train_steps - 1 - hyper.warmup_steps, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    decay = {
        "constant": lambda: jnp.ones(()),
        "linear": lambda: 1 - progress,
        "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "rsqrt": lambda: jax.lax.rsqrt(jnp.maximum((step + 1) / jnp.maximum(hyper.warmup_steps, 1), 1.0)),
        "wsd": lambda: jnp.minimum(1.0, (num_train_steps - 1 - step) / max(1, num_train_steps // 5)),
    }[schedule]()
    if schedule in ("constant", "rsqrt"):
        return hyper.learning_rate * warmup * decay
    return hyper.learning_rate * warmup * (hyper.final_fraction + (1 - hyper.final_fraction) * decay)


def _matrix(key_path: tuple[Any, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    path = path_of(key_path)
    axes = next((axes for pattern, axes in MUON_MATRICES if re.search(pattern, path)), None)
    return axes and optax.contrib.MuonDimensionNumbers(*axes)


def parameter_labels(params: Params) -> Any:
    """'muon' for each hidden matrix, 'adamw' for every other parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _matrix(path) else "adamw", params)


def decay_mask(params: Params, decayed: str = DECAYED) -> Any:
    """True for each parameter that weight decay applies to: those whose path the regex `decayed` finds."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(re.search(decayed, path_of(path))), params)


def factor_of(path: str, factors: Factors) -> float:
    """What the learning rate of a parameter is multiplied by: the factor of the first regex that finds its path, else 1."""
    return next((factor for pattern, factor in factors if re.search(pattern, path)), 1.0)


def scale_by_factors(updates: Params, factors: Factors) -> Params:
    """Multiplies each update, decay included, by its `factor_of`."""
    return jax.tree_util.tree_map_with_path(lambda path, u: u * factor_of(path_of(path), factors), updates)


def _scale_to_rms(update: Array, axes: optax.contrib.MuonDimensionNumbers) -> Array:
    # An orthogonal [m, n] matrix has a root mean square of 1 / sqrt(max(m, n)).
    m, n = (math.prod(update.shape[a] for a in group) for group in axes)
    return 0.2 * max(m, n) ** 0.5 * update


def make_optimizer(
    name: str, rate: Array | float, hyper: Hyperparameters, decayed: str = DECAYED, width: float = 1.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), or Muon (Jordan et al., 2024) with AdamW for the rest.

    Built inside the step, where `rate` and `hyper` are traced. Muon's updates are scaled to AdamW's root mean square, 0.2
    (Liu et al., 2025, arXiv:2502.16982, section 2.2), so that both share one learning rate and decay.

    Args:
      name: one of `OPTIMIZERS`.
      rate: this step's learning rate.
      hyper: betas, momentum and weight decay.
      decayed: regex on the paths of what decays.
      width: of muP; AdamW moves hidden matrices by 1 / width, and lets them decay as ever, as in the authors' MuAdamW.
    """
    mask = functools.partial(decay_mask, decayed=decayed)
    adam = optax.scale_by_adam(hyper.beta1, hyper.beta2)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = adam.update(grads, state, params)
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: u / width if _matrix(path) else u, updates)
        return scaled if width != 1 else updates, state

    adamw = optax.chain(
        optax.GradientTransformation(adam.init, update),
        optax.add_decayed_weights(hyper.weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )
    if name == "adamw":
        return adamw

    def matrices(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(path), params)

    # Not optax.contrib.muon: it labels by rank, decays biases, and gives the rest Nesterov's momentum.
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=hyper.momentum, weight_dimension_numbers=matrices),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_to_rms, updates, matrices(updates))),
        optax.add_decayed_weights(hyper.weight_decay, mask),
        optax.scale(-rate),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, parameter_labels)
