"""Settings of every test: four fake devices, full float32 products."""

import os
import sys
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
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
