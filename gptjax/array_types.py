"""One legend of axis letters for the whole code base, and the aliases built on it.

    B batch      T query length    S key length       D embed_dim    H num_heads    G num_kv_heads
    K head_dim   F mlp_dim         V vocab_size       L num_layers

Shapes in docstrings and einsum equations use these letters, e.g. `query [B, T, H, K]`.
"""

from collections.abc import Mapping
from typing import Any

import jax

Array = jax.Array
Params = dict[str, Any]  # nested dict of arrays; block parameters carry a leading [L]
Batch = Mapping[str, Array]  # inputs targets positions segment_ids [B, T] int32, loss_weights [B, T] f32
Metrics = dict[str, Array]  # scalars
