"""Generation beside Hugging Face's: python -m benchmarks.generate [--systems float32,bfloat16,int8,hf-float32,hf-bfloat16]

GPT-2 124M with random weights, greedy, two threads for everybody: the seconds from the call to the first token of a prompt
of 512 (prefill), and tokens a second after that, at several batch sizes and contexts: a call for 33 tokens less a call for
one, over 32; an untimed call comes before. Each system is
a process of its own that waits while another is timed; rounds are interleaved; medians.
PyTorch runs with the malloc settings that help it most. Needs `make referee`.

The bandwidth is what a matrix-vector product of 1 GB reads a second; `of it` is the share that decoding at batch 1 reaches,
each token reading the weights and the filled cache once.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.train_step import MALLOC, REFEREE, ROOT
from experiments import cli

SIZES = dict(vocab_size=50257, num_layers=12, num_heads=12, embed_dim=768, max_seq_len=1024)
NEW = 32
# (batch, context); the first is timed for its prompt as well.
CELLS = ((1, 512), (1, 16), (1, 900), (8, 16), (32, 16))
SYSTEMS = ("float32", "bfloat16", "int8", "hf-float32", "hf-bfloat16")


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--systems", default=",".join(SYSTEMS), help="ours by the format of weights, and Hugging Face's"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each")
    parser.add_argument("--worker", help="for internal use")
    arguments = parser.parse(argv)
    if arguments.worker:
        work(arguments.worker)
        return 0
    if not REFEREE.exists():
        raise cli.UserError("the referee is missing: run `make referee` first")
    systems = arguments.systems.split(",")
    for system in systems:
        if system not in SYSTEMS:
            parser.error(f"--systems {system} is not one of {', '.join(SYSTEMS)}")
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.2f})", file=sys.stderr)
    metrics = measure(systems, arguments.rounds)
    from benchmarks.train_step import environment

    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


def measure(systems: Sequence[str], rounds: int) -> dict[str, float]:
    """Tokens a second by cell and system."""
    workers = {system: start(system) for system in systems}
    metrics: dict[str, float] = {}
    try:
        rates = {system: ask(worker, "ready") for system, worker in workers.items()}
        if bandwidths := [rate for rate in rates.values() if rate]:
            metrics["bandwidth/bytes_per_second"] = max(bandwidths)
            print(f"read bandwidth {max(bandwidths) / 1e9:.1f} GB/s")
        print(f"{'tokens/s':<26}" + "".join(f"{system:>14}" for system in systems))
        for batch, context in CELLS:
            seconds: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
            for _ in range(1 + rounds):
                for system, worker in workers.items():
                    # The first call after a pause is slower, and left out.
                    _, one, all_of_them = (ask(worker, batch, context, new) for new in (1, 1, 1 + NEW))
                    seconds[system].append((one, all_of_them - one))
            rows: dict[str, dict[str, float]] = {
                f"decode, batch {batch}, after {context}": {},
                f"prefill {context}": {},
            }
            for system, timings in seconds.items():
                first, rest = (statistics.median(column) for column in zip(*timings[1:], strict=True))
                decode, prefill = rows.values()
                decode[system], prefill[system] = batch * NEW / rest, context / first
            for name, by_system in rows.items():
                if name.startswith("decode") or (batch, context) == CELLS[0]:
                    print(f"{name:<26}" + "".join(f"{by_system[system]:>14.1f}" for system in systems), flush=True)
                    metrics |= {f"{name}/{system}": rate for system, rate in by_system.items()}
            if batch == 1 and bandwidths:
                shown = f"{'  of the bandwidth':<26}"
                for system, rate in next(iter(rows.values())).items():
                    if not system.startswith("hf"):
                        shown += f"{rate * bytes_per_token(system, context) / max(bandwidths):>14.0%}"
                print(shown)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return metrics


def bytes_per_token(system: str, context: int) -> float:
    """What a token reads: every kernel, the head, and the cache (float32) as it is halfway through the new ones."""
    width, layers = SIZES["embed_dim"], SIZES["num_layers"]
    weights = 12 * layers * width**2 + SIZES["vocab_size"] * width
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[system]
    return size * weights + 4 * 2 * layers * width * (context + NEW / 2)


def start(system: str) -> Any:
    """A process that times one system when asked."""
    if system.startswith("hf-"):
        command = [str(REFEREE), str(ROOT / "benchmarks/referee_generate.py"), system.removeprefix("hf-")]
        variables = {"GLIBC_TUNABLES": MALLOC}
    else:
        command, variables = [sys.executable, "-m", "benchmarks.generate", "--worker", system], {}
    return subprocess.Popen(
        [*command, json.dumps(SIZES)] if system.startswith("hf-") else command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
    )


def ask(worker: Any, *question: Any) -> float:
    """Sends a line and reads a number."""
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise cli.UserError(f"a worker ended with code {worker.wait()}")
    return float(line)


def work(weights: str) -> None:
    """Answers questions about our side."""
    import jax
    import numpy as np

    from gptjax.generation.engine import Engine
    from gptjax.generation.sampling import Sampling
    from gptjax.models import init_params, make_model

    model = make_model("gpt", num_kv_heads=SIZES["num_heads"], head_dim=64, mlp_dim=4 * SIZES["embed_dim"], **SIZES)
    params = init_params(model, jax.random.key(0))
    engines = {
        batch: Engine(model, params, num_slots=batch, weights=weights) for batch in sorted({b for b, _ in CELLS})
    }
    del params
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        question = json.loads(line)
        if question == ["ready"]:
            print(bandwidth(), flush=True)
            continue
        batch, context, new = question
        prompts = [rng.integers(0, SIZES["vocab_size"], context) for _ in range(batch)]
        started = time.perf_counter()
        engines[batch].generate(prompts, max_new_tokens=new, sampling=Sampling(temperature=0.0))
        print(time.perf_counter() - started, flush=True)


def bandwidth() -> float:
    """Bytes a second that a matrix-vector product of 1 GB reads, the best of 10."""
    import jax
    import jax.numpy as jnp

    matrix = jax.random.normal(jax.random.key(0), (1024, 1 << 18))  # equal pages would not be read at all
    vector = jnp.ones((1, 1024), jnp.float32)
    product = jax.jit(jnp.matmul)
    best = float("inf")
    for _ in range(11):
        started = time.perf_counter()
        product(vector, matrix).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return matrix.nbytes / best


if __name__ == "__main__":
    cli.run(main)
