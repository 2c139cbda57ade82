"""Settings of the platform, chosen once, before JAX makes a backend, and never over the user's own.

`import gptjax` applies them. Each exists because it was measured (`benchmarks/train_step.py`); an environment variable or
flag that the user has set always wins.
"""

import ctypes
import os
import pathlib
import sys

# XLA:CPU ignores the flags of other platforms, and they ignore these.
XLA_FLAGS = (
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_prefer_vector_width=512",
)
# Every compiled program is kept, not only those that took a second: a run is many small programs.
JAX_SETTINGS: dict[str, float | int | str] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def cache_dir() -> pathlib.Path:
    """Where prepared corpora and compiled programs are kept: `$GPTJAX_CACHE`, else `~/.cache/gptjax`."""
    return pathlib.Path(os.environ.get("GPTJAX_CACHE", "~/.cache/gptjax")).expanduser()


def configure() -> None:
    """Applies the settings; if a JAX backend already exists, says so in one line and changes nothing."""
    if "jax" in sys.modules and _backend_exists():
        print(
            "gptjax: JAX was already running when gptjax was imported, so XLA flags, malloc settings and the "
            "compilation cache stay as they were; import gptjax first",
            file=sys.stderr,
        )
        return
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = [flag for flag in XLA_FLAGS if flag.split("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*chosen, flags]).strip()
    for name, value in (JAX_SETTINGS | {"jax_compilation_cache_dir": str(cache_dir() / "compiled")}).items():
        if name.upper() not in os.environ:
            os.environ[name.upper()] = str(value)
            if "jax" in sys.modules:  # it has read its environment already
                sys.modules["jax"].config.update(name, value)
    _keep_large_blocks()


def _backend_exists() -> bool:
    from jax._src import xla_bridge  # no public way to ask without making one

    return xla_bridge.backends_are_initialized()


def _keep_large_blocks() -> None:
    """Tells glibc to keep freed memory instead of returning each large tensor to the kernel.

    Otherwise every step maps and unmaps its tensors again, some 400,000 page faults a step.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
