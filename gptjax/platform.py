"""Settings of the platform, chosen once, before JAX makes a backend, and never over the user's own.

`import gptjax` applies them. Each exists because it was measured (`benchmarks/train_step.py`); an environment variable or
flag that the user has set always wins.
"""

import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping

# Other platforms ignore the flags of XLA:CPU.
XLA_FLAGS = ("--xla_cpu_prefer_vector_width=512",)
MALLOC_SETTINGS = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.hugetlb=1"
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
            "gptjax: JAX was already running when gptjax was imported, so XLA flags and the compilation "
            "cache stay as they were; import gptjax first",
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


def _backend_exists() -> bool:
    from jax._src import xla_bridge  # no public way to ask without making one

    return xla_bridge.backends_are_initialized()


def compiler_options(dtype: str, target: str | None = None) -> dict[str, bool | str]:
    """Options for compiling a step that computes in `dtype` for `target`: cpu, gpu, tpu, or None for the default backend.

    On TPU, sharded weights are gathered before a product instead of within it (windowed einsum): on v5e:4x4, GPT-2 124M's
    step then takes half the estimated cycles and 0.8 GB less. On CPU, bfloat16 products go to oneDNN: XLA's own kernels
    take up to twice as long. Sums and maxima go to YNNPACK, which otherwise takes the products too: XLA's own go over a row
    of logits number by number, a tenth of GPT-2's step. Float32 products stay, since a program with oneDNN calls cannot be
    kept in the compilation cache (JAX warns so) and starts seconds later every time.
    """
    import jax

    target = target or jax.default_backend()
    if target == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if target != "cpu" or dtype != "bfloat16":
        return {}
    return {
        "xla_cpu_experimental_onednn_custom_call": True,
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    }


def launched_with_others(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several: SLURM, Open MPI, or a TPU slice of many hosts."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    counts = [environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")]
    counts.append(str(hosts.count(",") + 1))
    # Within an allocation but outside a step, the variables of the step are missing: a process by itself.
    if all(f"SLURM_{name}" in environ for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")):
        counts.append(environ.get("SLURM_NTASKS", "1"))
    return any(int(count) > 1 for count in counts)


def restart_with_malloc_settings() -> None:
    """Starts this command again, in the same process, with glibc keeping freed memory, in huge pages.

    Otherwise every step maps, clears and unmaps its tensors again: some 400,000 page faults, up to half of the step. glibc
    reads huge pages (hugetlb) only when a process starts, so what `mallopt` can set later gains much less. Does nothing
    where an accelerator does the work, where there is no glibc, or where the user has settings of their own.
    """
    # libtpu alone is no TPU: it compiles for one elsewhere (extra `plan`).
    tpu = importlib.util.find_spec("libtpu") and any(glob.glob(name) for name in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    accelerators = tpu or importlib.util.find_spec("jax_plugins")
    glibc = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    if not accelerators and glibc and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC_SETTINGS
        os.execv(sys.executable, sys.orig_argv)
