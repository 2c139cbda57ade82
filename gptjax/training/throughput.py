"""Floating-point operations a token, the most a device can do, and memory: what throughput is measured against."""

import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.array_types import Params
from gptjax.models import GPT

# Dense bfloat16 FLOP/s of one device, by the start of `device_kind`; from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "Tesla T4": 65e12,
}


def num_params(params: Params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def flops_per_token(model: GPT, params: Params) -> int:
    """FLOPs of one training step for each token, forward and backward: 6 N + 12 L H K T.

    The convention of Chowdhery et al., 2022, arXiv:2204.02311, appendix B: N counts the parameters that multiply
    activations (not the position table, and a token table only if it is also the head); attention counts every pair of
    positions, also those a causal mask removes; what rematerialisation computes again is not counted.
    """
    c = model.config
    matmul = num_params(params) - c.max_seq_len * c.embed_dim - (0 if c.tie_embeddings else c.vocab_size * c.embed_dim)
    return 6 * matmul + 12 * c.num_layers * c.num_heads * c.head_dim * c.max_seq_len


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
