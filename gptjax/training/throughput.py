"""Floating-point operations a token, the most a device can do, and memory: what throughput is measured against."""

import math
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.array_types import Params
from gptjax.distributed.chips import CHIPS
from gptjax.distributed.sharding import path_of
from gptjax.models import Model

# Dense bfloat16 FLOP/s of one device, by the start of `device_kind`; from the makers' data sheets.
PEAK_FLOPS = {chip.kind: chip.flops for chip in sorted(CHIPS.values(), key=lambda chip: -len(chip.kind))} | {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


def num_params(params: Params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops_per_token(model: Model, params: Params, seq_len: int, frozen: Params | None = None) -> int:
    """FLOPs of one training step for each token, forward and backward: 6 N + 12 L H K T.

    The convention of Chowdhery et al., 2022, arXiv:2204.02311, appendix B: N counts the parameters that multiply
    activations (a token table only if it is also the head, no other table, and of experts those a token goes to); attention
    counts every pair of positions, also those a mask removes, and an encoder-decoder's three kinds of it; what
    rematerialisation computes again is not counted. T is `seq_len`, and of `frozen` parameters there are 4 N, as they get
    no gradient.
    """
    c = model.config
    count = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, frozen)):
        name, size = path_of(path[1:]), math.prod(leaf.shape) * (1 if path[0].idx == 0 else 2 / 3)
        if name.endswith("embedding") and not (name == "token_embedding/embedding" and scores_by_embedding(model)):
            continue
        count += size * (c.experts_per_token / c.num_experts if "/experts_" in name else 1)
    attentions = c.num_encoder_layers + c.num_layers * (2 if c.num_encoder_layers else 1)
    return round(6 * count) + 12 * attentions * c.num_heads * c.head_dim * seq_len


def scores_by_embedding(model: Model) -> bool:
    """Whether the token embedding is also the head."""
    return model.config.tie_embeddings and model.config.head in ("language_model", "masked_lm")


def peak_flops(dtype: Any) -> float:
    """FLOP/s of all devices together, the denominator of `perf/mfu`.

    Known accelerators: the data sheet's dense bfloat16 figure. Anything else, a CPU above all: what one matrix product of
    1536 x 1536 in `dtype` reaches here, measured once, about 0.1 s.
    """
    devices = jax.devices()
    for kind, flops in PEAK_FLOPS.items():
        if devices[0].device_kind.startswith(kind):
            return flops * len(devices)
    size, repeats = 1536, 3
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    # CPU devices share one machine's cores, so their number does not multiply.
    return 2 * size**3 / min(times) * (1 if devices[0].platform == "cpu" else len(devices))


def peak_memory_bytes() -> int:
    """The most memory used so far: of the first accelerator, or of this process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
