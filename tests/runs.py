"""Real training runs in processes of their own, for tests that start, kill and resume them."""

import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from experiments import cli

ROOT = pathlib.Path(__file__).parent.parent
# A run of some seconds: many small steps, a save every few of them.
TINY = {
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.embed_dim": 32,
    "model.max_seq_len": 32,
    "model.dropout": 0.1,
    "data.corpus": "text",
    "data.tokenizer": "byte",
    "data.validation_fraction": 0.1,
    "train.num_train_steps": 120,
    "train.batch_size": 8,
    "train.accumulation_steps": 2,
    "train.ema_decay": 0.9,
    "train.log_every_steps": 1,
    "eval.every_steps": 24,
    "eval.max_batches": 4,
    "eval.num_samples": 1,
    "eval.sample_tokens": 8,
    "checkpoint.every_steps": 12,
}


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """A generated text with some structure, the same everywhere."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(50)]
    path = folder / "corpus.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(600)))
    return path


def command(module: str, *arguments: str) -> list[str]:
    """The command line of one of our commands."""
    return [sys.executable, "-m", f"experiments.{module}", *arguments]


def train_command(workdir: pathlib.Path, corpus: pathlib.Path, **changes: object) -> list[str]:
    """A tiny run; `changes` are config fields with `__` for the dot."""
    fields = TINY | {"data.files": corpus} | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return command("train", "--config", "configs/default.py", "--workdir", str(workdir), *overrides)


def environment(**changes: str) -> dict[str, str]:
    """One CPU device, whatever the tests themselves run with."""
    return os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | changes


def run(arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(**changes), cwd=ROOT, timeout=300)


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs one of our commands to its end in this process, for what takes less time than a process takes to start."""
    module = importlib.import_module(arguments[2])
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), contextlib.chdir(ROOT):
        code = cli.exit_code(lambda: module.main(arguments[3:]))
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def start(
    arguments: list[str], count: int = 1, extra: Sequence[Sequence[str]] = (), **changes: str
) -> list[subprocess.Popen[str]]:
    """Starts `count` processes that are one run; `extra` flags of each."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    many = ["--coordinator", coordinator, "--num_processes", str(count), "--process_id"]
    return [
        subprocess.Popen(
            [*arguments, *([*many, str(process)] if count > 1 else []), *(extra[process] if extra else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(**changes),
        )
        for process in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str]]:
    """The exit code and stderr of each; whatever has not ended by then is killed, and fails."""
    deadline = time.monotonic() + seconds
    try:
        errors = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1] for process in processes]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"a process did not end within {seconds:.0f} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def wait_for_step(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    """Returns when the run has logged a step."""
    while last_step(workdir) < step:
        for process in processes:
            if process.poll() is not None:
                raise AssertionError(f"ended with code {process.returncode}: {process.communicate()[1][-500:]}")
        time.sleep(0.005)


def kill_when(
    processes: list[subprocess.Popen[str]],
    whom: list[subprocess.Popen[str]],
    workdir: pathlib.Path,
    seconds: float,
    *,
    in_save: bool,
) -> str:
    """Sends SIGKILL to some of a run's processes `seconds` after its first new metric, or inside the first save after that.

    Returns:
      where it was: 'finished', 'running' or 'saving'.
    """
    before = last_step(workdir)

    def runs_on() -> bool:
        return all(process.poll() is None for process in processes)

    while runs_on() and last_step(workdir) == before:
        time.sleep(0.002)
    deadline = time.monotonic() + seconds
    while runs_on() and time.monotonic() < deadline:
        time.sleep(0.001)
    while runs_on() and in_save and not _saving(workdir):
        pass
    where = ("saving" if _saving(workdir) else "running") if runs_on() else "finished"
    for process in whom:
        process.kill()
    return where


def _saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written: a temporary folder, or one without its manifest."""
    try:
        folders = [p for p in (workdir / "checkpoints").iterdir() if p.is_dir()]
    except FileNotFoundError:
        return False
    return any(not (p / "manifest.json").exists() for p in folders)


def lines(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(workdir: pathlib.Path) -> int:
    """The last one logged, or 0."""
    found = lines(workdir)
    return found[-1]["step"] if found else 0


def whole_checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Their folders, the latest last."""
    found = [path.parent for path in (workdir / "checkpoints").glob("*/manifest.json")]
    return sorted(found, key=lambda path: int(path.name))


def losses(workdir: pathlib.Path) -> list[tuple]:
    """(step, losses ...) of every line; steps must be unique."""
    found = lines(workdir)
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps)), "a step appears twice"
    names = ("train/loss", "train/grad_norm", "train/tokens", "eval/loss", "eval/bits_per_byte")
    return [(line["step"], *(line.get(name) for name in names)) for line in found]


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from gptjax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.steps()[-1]
    checkpoints.verify(step)
    folder = checkpoints.path / str(step)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever the devices of the run
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {name: ocp.checkpointables_metadata(folder).metadata[name] for name in ("params", "ema", "training")},
    )
    items = ocp.load_checkpointables(folder, shapes)
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(one: pathlib.Path, two: pathlib.Path, least: int = 31) -> None:
    """Bit for bit: every logged loss, and every array of the last checkpoint."""
    assert losses(one) == losses(two)
    a, b = final_arrays(one), final_arrays(two)
    assert a.keys() == b.keys() and len(a) >= least
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def crash_suite(
    folder: pathlib.Path, corpus: pathlib.Path, alone: pathlib.Path, kills: int, seed: int = 0
) -> dict[str, int]:
    """Kills a run at random moments until `kills` have hit it, finishes it, and compares it with `alone`, which had none.

    Every other kill waits for a save. When the run finishes before its kills are used up, it is started again from
    nothing in a new workdir; every finished one is compared.

    Returns:
      how many kills came while 'running' and while 'saving', and how many runs were 'compared'.
    """
    rng = random.Random(seed)
    counts = {"running": 0, "saving": 0, "compared": 0}
    while counts["running"] + counts["saving"] < kills:
        workdir = folder / f"killed-{counts['compared']}"
        arguments = train_command(workdir, corpus)
        where = ""
        while where != "finished" and counts["running"] + counts["saving"] < kills:
            processes = start(arguments)
            where = kill_when(processes, processes, workdir, rng.uniform(0, 1.0), in_save=rng.random() < 0.5)
            finish(processes)
            if where != "finished":
                counts[where] += 1
        finished = run(arguments)
        assert finished.returncode == 0, finished.stderr
        assert_same_run(alone, workdir)
        counts["compared"] += 1
    return counts
