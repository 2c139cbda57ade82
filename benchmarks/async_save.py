"""What an asynchronous save costs training: python -m benchmarks.async_save [--rounds 3] [--dtype bfloat16]

GPT-2 124M with AdamW's moments (1.5 GB), rows of 256, 4 a batch, random tokens, seed 0. A round: 20 steps left alone, a
save that is waited for, and 20 steps begun right after a save that is not. Medians; the time lost over the blocking save's,
and the peak of resident memory before the first save and after the last.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.train_step import on_random_rows
from experiments import cli

STEPS, ROWS, LENGTH = 20, 4, 256


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    arguments = parser.parse(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} must be at least 1")
    import jax

    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.throughput import peak_memory_bytes
    from gptjax.workdir import environment

    overrides = [("model.dtype", arguments.dtype), ("train.accumulation_steps", "1")]
    config = cli.load_config("configs/gpt2_small.py", overrides)
    with cli.user_errors():
        step, state, batch = on_random_rows(config, config.data.vocab_size, ROWS, LENGTH)

    def steps(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    steps(3)
    before = peak_memory_bytes()
    alone, blocking, around = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), keep=1)
        for turn in range(arguments.rounds):
            alone.append(steps(STEPS))
            started = time.perf_counter()
            checkpoints.save(2 * turn, state, {})
            checkpoints.wait()
            blocking.append(time.perf_counter() - started)
            started = time.perf_counter()
            checkpoints.save(2 * turn + 1, state, {})
            steps(STEPS)
            around.append(time.perf_counter() - started)
            checkpoints.wait()
            print(
                f"alone {alone[-1]:.2f} s, blocking save {blocking[-1]:.2f} s, around {around[-1]:.2f} s",
                file=sys.stderr,
            )
    lost = [a - b for a, b in zip(around, alone, strict=True)]
    ratio = statistics.median(lost) / statistics.median(blocking)
    print(
        f"{STEPS} steps {statistics.median(alone):.2f} s, around an asynchronous save {statistics.median(around):.2f} s"
    )
    print(
        f"lost {statistics.median(lost):.2f} s ({min(lost):.2f} to {max(lost):.2f}); a blocking save takes "
        f"{statistics.median(blocking):.2f} s: {ratio:.0%}"
    )
    print(
        f"peak memory {before / 2**30:.2f} GiB before the first save, {peak_memory_bytes() / 2**30:.2f} GiB after the last"
    )
    metrics = {
        "alone_seconds": statistics.median(alone),
        "around_seconds": statistics.median(around),
        "lost_ratio": ratio,
    }
    metrics |= {"blocking_seconds": statistics.median(blocking), "peak_memory_bytes": float(peak_memory_bytes())}
    cli.write_report(arguments.json, environment(), [0], metrics)
    return 0


if __name__ == "__main__":
    cli.run(main)
