"""Settings of every test: four fake devices, full float32 products, programs compiled quickly rather than well.

Runs in processes of their own (`tests.runs`) compile as a user's do.
"""

import os
import sys
import tempfile

QUICK_TO_COMPILE = "--xla_backend_optimization_level=1"  # at 0 some programs compute infinities
FLAGS = ("--xla_force_host_platform_device_count=4", QUICK_TO_COMPILE, os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads of NumPy would wait for each other, spinning
os.environ.setdefault("GPTJAX_CACHE", os.path.join(tempfile.gettempdir(), f"gptjax-tests-{os.getuid()}"))
assert "jax" not in sys.modules

import gptjax  # noqa: E402, F401 isort: skip - before jax

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def sizes() -> dict:
    """A tiny model with grouped heads and an odd vocabulary."""
    return dict(
        vocab_size=61, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, embed_dim=32, mlp_dim=48, max_seq_len=16
    )
