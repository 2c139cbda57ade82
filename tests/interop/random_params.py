"""Parameters that are quicker to make than by initialisation, and that are nowhere zero or one."""

import jax
import numpy as np

from gptjax.models import init_params


def random_params(model, seed=0):
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.1, shapes)
