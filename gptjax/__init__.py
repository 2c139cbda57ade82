"""gptjax: GPT-style Transformers in JAX and Flax, from a Colab TPU to a pod, from one config file."""

from typing import TYPE_CHECKING, Any

from gptjax import platform

if TYPE_CHECKING:
    from gptjax.workdir import load

__all__ = ["load"]

platform.configure()


def __getattr__(name: str) -> Any:
    # Lazily, so that `--help` does not wait for jax.
    if name == "load":
        from gptjax.workdir import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
