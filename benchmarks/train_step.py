"""Training-step throughput beside PyTorch: python -m benchmarks.train_step [--cells a,b] [--dtypes float32,bfloat16]

Forward, backward, clip and AdamW of the same architecture, in one run: ours, Hugging Face's GPT2LMHeadModel and a plain
GPT on scaled_dot_product_attention, both eager, bfloat16 by autocast. Each system is a process of its own that waits while
another is timed; rounds are interleaved; medians. PyTorch runs with the malloc settings that help it most. Needs `make
referee`. Two threads for everybody.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent
REFEREE = ROOT / ".venv-referee/bin/python"
CELLS: dict[str, dict[str, int]] = {
    "a": dict(vocab_size=65, num_layers=6, num_heads=6, embed_dim=384, seq_len=256, batch_size=16),
    "b": dict(vocab_size=50257, num_layers=12, num_heads=12, embed_dim=768, seq_len=256, batch_size=4),
}
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=34359738368:glibc.malloc.hugetlb=1"
SYSTEMS = ("gptjax", "hf", "plain")


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--cells", default="a,b", help="a: 6 x 384, T 256, B 16, vocabulary 65; b: GPT-2 124M, T 256, B 4"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the computation; parameters are float32")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each system")
    parser.add_argument("--worker", help="for internal use")
    arguments = parser.parse(argv)
    if arguments.worker:
        work(json.loads(arguments.worker))
        return 0
    if not REFEREE.exists():
        raise cli.UserError("the referee is missing: run `make referee` first")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.2f}); figures will be low and noisy", file=sys.stderr)
    metrics: dict[str, float] = {}
    for cell in arguments.cells.split(","):
        for dtype in arguments.dtypes.split(","):
            metrics |= measure(cell, dtype, arguments.rounds)
    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


def environment() -> dict[str, Any]:
    """Versions of both sides."""
    from gptjax.workdir import environment as ours

    code = "import torch, transformers; print(torch.__version__, transformers.__version__)"
    torch, transformers = subprocess.run(
        [REFEREE, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    described = ours()
    described["versions"] |= {"torch": torch, "transformers": transformers}
    return described


def measure(cell: str, dtype: str, rounds: int) -> dict[str, float]:
    """One row of the table."""
    sizes = CELLS[cell]
    workers = {system: start(system, sizes | {"dtype": dtype}) for system in SYSTEMS}
    seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    memory: dict[str, int] = {}
    try:
        for turn in range(rounds + 1):
            for system, worker in workers.items():
                time.sleep(0.5)  # the other's threads stop spinning
                elapsed, memory[system] = ask(worker)
                if turn:  # the first, which compiles, does not count
                    seconds[system].append(elapsed)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    tokens = sizes["batch_size"] * sizes["seq_len"]
    median = {system: statistics.median(times) for system, times in seconds.items()}
    faster = min(("hf", "plain"), key=median.__getitem__)
    best = median[faster]
    ratios = sorted(
        min(a, b) / ours for ours, a, b in zip(seconds["gptjax"], seconds["hf"], seconds["plain"], strict=True)
    )
    memory_ratio = memory["gptjax"] / max(memory["hf"], memory["plain"])
    for system in SYSTEMS:
        print(
            f"({cell}) {dtype:<9} {system:<7} {median[system]:7.3f} s a step  {tokens / median[system]:8.0f} tokens/s  "
            f"peak memory {memory[system] / 2**30:5.2f} GiB"
        )
    print(
        f"({cell}) {dtype:<9} tokens/s over the best PyTorch: {best / median['gptjax']:.2f} (rounds {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}); peak memory over the faster's: "
        f"{memory['gptjax'] / memory[faster]:.2f}, over the larger: {memory_ratio:.2f}",
        flush=True,
    )
    prefix = f"{cell}/{dtype}"
    result = {f"{prefix}/{system}/tokens_per_second": tokens / median[system] for system in SYSTEMS}
    result |= {f"{prefix}/{system}/peak_memory_bytes": float(memory[system]) for system in SYSTEMS}
    return result | {f"{prefix}/ratio": best / median["gptjax"], f"{prefix}/memory_ratio": memory_ratio}


def start(system: str, sizes: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts the process of a system."""
    if system == "gptjax":
        command = [sys.executable, "-m", "benchmarks.train_step", "--worker", json.dumps(sizes)]
        variables: dict[str, str] = {}
    else:
        command = [str(REFEREE), str(ROOT / "benchmarks/referee_train_step.py"), system, json.dumps(sizes)]
        variables = {"GLIBC_TUNABLES": MALLOC, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables, cwd=ROOT
    )


def ask(worker: subprocess.Popen[str]) -> tuple[float, int]:
    """Has a worker time a few steps: (seconds a step, peak memory in bytes)."""
    assert worker.stdin and worker.stdout
    worker.stdin.write("step\n")
    worker.stdin.flush()
    answer = worker.stdout.readline().split()
    if len(answer) != 2:
        raise RuntimeError(f"{worker.args!r} ended with code {worker.wait()}")
    return float(answer[0]), int(answer[1])


def work(sizes: dict[str, Any]) -> None:
    """Our side: the training step of `experiments.train`, on random rows."""
    import jax

    from gptjax.training.throughput import peak_memory_bytes

    fields = {"num_layers": sizes["num_layers"], "num_heads": sizes["num_heads"], "embed_dim": sizes["embed_dim"]}
    fields |= {"max_seq_len": max(1024, sizes["seq_len"]) if sizes["vocab_size"] > 1000 else sizes["seq_len"]}
    overrides = [(f"model.{name}", str(value)) for name, value in fields.items()]
    config = cli.load_config("configs/default.py", [*overrides, ("model.dtype", sizes["dtype"])])
    step, state, batch = on_random_rows(config, sizes["vocab_size"], sizes["batch_size"], sizes["seq_len"])
    for _ in range(2):
        state, metrics = step(state, batch)
    for _ in sys.stdin:
        # Training is one step after another: the first after a pause, while the others had the machine, does not count.
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        started = time.perf_counter()
        repeats = 2
        for _ in range(repeats):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        print((time.perf_counter() - started) / repeats, peak_memory_bytes(), flush=True)


def on_random_rows(config: Any, vocab_size: int, batch_size: int, seq_len: int) -> tuple[Any, Any, dict[str, Any]]:
    """The jitted training step of a config, with AdamW, its first state, and a batch of random tokens; seed 0."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments import build
    from gptjax import platform
    from gptjax.models import make_model
    from gptjax.training.state import init_state
    from gptjax.training.step import make_train_step

    model = make_model(**build.model_sizes(config, vocab_size))
    settings, hyper = build.step_settings(config), build.hyperparameters(config)
    state = jax.jit(lambda seed: init_state(model, "adamw", hyper, seed, jnp.float32(1), ema=False))(np.uint32(0))
    shape = (batch_size, seq_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, seq_len + 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
    }
    options = platform.compiler_options(config.model.dtype)
    return jax.jit(make_train_step(model, settings), donate_argnums=0, compiler_options=options), state, batch


if __name__ == "__main__":
    cli.run(main)
