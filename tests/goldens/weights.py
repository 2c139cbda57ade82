"""The weights of the golden models, drawn alike on both sides, so that only outputs are stored."""

import zlib

import numpy as np


def draw_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 values for each tensor, that depend on its name and shape alone; those of norms are about 1."""
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = (1 + 0.2 * values if is_norm else 0.25 * values).astype(np.float32)
    return weights


def some_entries(name: str, size: int) -> np.ndarray:
    """Which entries of a tensor's gradient are stored: at most 100, always the same."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.choice(size, 100, replace=False) if size > 100 else np.arange(size)
