"""gptjax: GPT-style Transformers in JAX and Flax, from a Colab TPU to a pod, from one config file."""

from typing import TYPE_CHECKING, Any

from gptjax import platform

if TYPE_CHECKING:
    from gptjax.analysis.runs import read_runs
    from gptjax.loading import load
    from gptjax.pipelines import pipeline

__all__ = ["load", "pipeline", "read_runs"]

platform.configure()


def __getattr__(name: str) -> Any:
    # Lazily, so that `--help` does not wait for jax.
    if name == "load":
        from gptjax.loading import load

        return load
    if name == "pipeline":
        from gptjax.pipelines import pipeline

        return pipeline
    if name == "read_runs":
        from gptjax.analysis.runs import read_runs

        return read_runs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
