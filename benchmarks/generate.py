"""Generation beside Hugging Face's, and beside llama.cpp's: python -m benchmarks.generate

GPT-2 124M with random weights, greedy, two threads for everybody: the seconds from the call to the first token of a prompt
of 512 (prefill), and tokens a second after that, at several batch sizes and contexts: a call for 33 tokens less a call for
one, over 32; an untimed call comes before. Each system is
a process of its own that waits while another is timed; rounds are interleaved; medians.
PyTorch runs with the malloc settings that help it most. Needs `make referee`.

With --smollm2 GGUF --llama_cpp PYTHON, a Python with llama-cpp-python 0.3.36, instead SmolLM2-135M-Instruct at batch 1
beside llama.cpp with as many bits a weight: F32, BF16, Q8_0, and for int4 Q4_0 and Q4_1, made by llama.cpp's quantizer
from the file. Ratios are ours over theirs, of two the better. --plain_buffers: llama.cpp does not repack weights for the
processor, for builds whose AMX kernels crash.

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
SYSTEMS = ("float32", "bfloat16", "int8", "int4", "hf-float32", "hf-bfloat16")
SMOLLM2_CELLS = ((1, 512), (1, 16))
# Ours, and llama.cpp's of as many bits.
EQUAL_BITS = {
    "float32": ("llama-F32",),
    "bfloat16": ("llama-BF16",),
    "int8": ("llama-Q8_0",),
    "int4": ("llama-Q4_0", "llama-Q4_1"),
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 5 / 8}  # a weight


def main(argv: Sequence[str]) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--systems", help="ours by the format of weights, and theirs; all if not given")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each")
    parser.add_argument("--smollm2", metavar="GGUF", help="this model instead, beside llama.cpp")
    parser.add_argument("--llama_cpp", metavar="PYTHON", help="the Python that has llama-cpp-python")
    parser.add_argument("--plain_buffers", action="store_true", help="llama.cpp does not repack weights")
    parser.add_argument("--worker", help="for internal use")
    arguments = parser.parse(argv)
    if arguments.worker:
        work(arguments.worker, arguments.smollm2)
        return 0
    known: Sequence[str] = SYSTEMS
    if arguments.smollm2:
        known = (*EQUAL_BITS, *(theirs for systems in EQUAL_BITS.values() for theirs in systems))
        for name in ("smollm2", "llama_cpp"):
            if not os.path.isfile(getattr(arguments, name) or ""):
                parser.error(f"--{name} {getattr(arguments, name)}: no such file; --smollm2 needs both")
    elif not REFEREE.exists():
        raise cli.UserError("the referee is missing: run `make referee` first")
    systems = arguments.systems.split(",") if arguments.systems else list(known)
    for system in systems:
        if system not in known:
            parser.error(f"--systems {system} is not one of {', '.join(known)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.2f})", file=sys.stderr)
    metrics = measure({system: start(system, arguments) for system in systems}, arguments)
    from benchmarks.train_step import environment

    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


def measure(workers: dict[str, Any], arguments: Any) -> dict[str, float]:
    """Tokens a second by cell and system, of processes that are started."""
    systems = list(workers)
    metrics: dict[str, float] = {}
    try:
        rates = {system: ask(worker, "ready") for system, worker in workers.items()}
        if bandwidths := [rate for rate in rates.values() if rate]:
            metrics["bandwidth/bytes_per_second"] = max(bandwidths)
            print(f"read bandwidth {max(bandwidths) / 1e9:.1f} GB/s")
        print(f"{'tokens/s':<26}" + "".join(f"{system:>14}" for system in systems))
        for batch, context in SMOLLM2_CELLS if arguments.smollm2 else CELLS:
            seconds: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
            for _ in range(1 + arguments.rounds):
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
                    if arguments.smollm2:
                        metrics |= ratios(name, by_system)
            if batch == 1 and bandwidths and not arguments.smollm2:
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


def ratios(name: str, rates: dict[str, float]) -> dict[str, float]:
    """Prints and returns our rates over llama.cpp's of as many bits."""
    found = {}
    for ours, theirs in EQUAL_BITS.items():
        best = max((rates[system] for system in theirs if system in rates), default=None)
        if ours in rates and best:
            found[f"{name}/{ours}_over_llama"] = rates[ours] / best
            print(f"  {ours} over llama.cpp {rates[ours] / best:.2f}", flush=True)
    return found


def bytes_per_token(system: str, context: int) -> float:
    """What a token reads: every kernel, the head, and the cache (float32) as it is halfway through the new ones."""
    width, layers = SIZES["embed_dim"], SIZES["num_layers"]
    head = BYTES["int8" if system == "int4" else system] * SIZES["vocab_size"] * width
    return BYTES[system] * 12 * layers * width**2 + head + 4 * 2 * layers * width * (context + NEW / 2)


def start(system: str, arguments: Any) -> Any:
    """A process that times one system when asked."""
    here = ROOT / "benchmarks"
    variables = {}
    if system.startswith("hf-"):
        command = [REFEREE, here / "referee_generate.py", system.removeprefix("hf-"), json.dumps(SIZES)]
        variables = {"GLIBC_TUNABLES": MALLOC}
    elif system.startswith("llama-"):
        command = [arguments.llama_cpp, here / "referee_generate_llama.py", system.removeprefix("llama-")]
        command += [os.path.abspath(arguments.smollm2), "plain" if arguments.plain_buffers else "repacked"]
    else:
        command = [sys.executable, "-m", "benchmarks.generate", "--worker", system]
        if arguments.smollm2:
            command += ["--smollm2", os.path.abspath(arguments.smollm2)]
    return subprocess.Popen(
        [str(part) for part in command],
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


def work(weights: str, smollm2: str | None) -> None:
    """Answers questions about our side."""
    import jax
    import numpy as np

    import gptjax
    from gptjax.generation.engine import Engine
    from gptjax.generation.sampling import Sampling
    from gptjax.models import init_params, make_model

    if smollm2:
        model, params, _ = gptjax.load(smollm2)
    else:
        model = make_model("gpt", num_kv_heads=SIZES["num_heads"], head_dim=64, mlp_dim=4 * SIZES["embed_dim"], **SIZES)
        params = init_params(model, jax.random.key(0))
    batches = {batch for batch, _ in (SMOLLM2_CELLS if smollm2 else CELLS)}
    engines = {batch: Engine(model, params, num_slots=batch, weights=weights) for batch in sorted(batches)}
    del params
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        question = json.loads(line)
        if question == ["ready"]:
            print(bandwidth(), flush=True)
            continue
        batch, context, new = question
        prompts = [rng.integers(0, model.config.vocab_size, context) for _ in range(batch)]
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
