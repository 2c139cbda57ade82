"""The long forms of the suites, by part: python -m tests.verify --part PART|all

crash    20 SIGKILLs at random moments, half of them inside a save; every finished run equals the uninterrupted one
start    seconds from process start to the first step done, cold and with a warm compilation cache
quality  configs/shakespeare_char.py, 3 seeds, on the file named by $SHAKESPEARE
learn    a GPT, a BERT and an encoder-decoder, each within 3 minutes on 2 cores
invariance  a step is the same on every mesh of 4 and 8 devices, cut and compiled in every way; a run, over any processes
batches  greedy texts do not depend on the batch; on the model file named by $SMOLLM2
faults   runs hit by SIGKILL, SIGTERM, SIGSTOP, full disks, damaged files, for ten minutes
serve    the server's suite with many drawn requests, the page in Chromium, lm-eval; with $SMOLLM2 also 10 minutes of load
ray      a sweep of 4 as Ray jobs, on a head of its own and submitted to two nodes; needs the extra `ray`
mup      the best learning rate of narrow and wide models, with muP and without
notebooks  every notebook of colab/, headless, with its small settings
plan     what `experiments.plan` compiles for slices that are not here, beside MaxText's; needs the extra `plan`
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests import runs

Rows = list[tuple[str, str, bool]]  # what, figure, met


def crash(folder: pathlib.Path) -> Rows:
    """The crash suite."""
    started = time.monotonic()
    corpus, alone = runs.write_corpus(folder), folder / "alone"
    assert runs.run(runs.train_command(alone, corpus)).returncode == 0
    counts = runs.crash_suite(folder, corpus, alone, kills=20, seed=1)
    figure = f"{counts['running']} while running, {counts['saving']} inside a save; {counts['compared']} runs compared"
    return [("kills survived bit for bit", f"{figure}; {time.monotonic() - started:.0f} s", counts["saving"] > 0)]


def start(folder: pathlib.Path) -> Rows:
    """Process start to the first step done, on the 6 x 384 model, corpus prepared; median of 3."""
    corpus = runs.write_corpus(folder)
    model = {"model__num_layers": 6, "model__num_heads": 6, "model__embed_dim": 384, "model__max_seq_len": 256}
    rest = {
        "train__batch_size": 16,
        "train__accumulation_steps": 1,
        "train__num_train_steps": 1000,
        "train__ema_decay": 0,
    }
    rows: Rows = []
    for dtype in ("float32", "bfloat16"):
        for kind, limit in (("cold", 8.0), ("warm", 4.5)):
            seconds = []
            for turn in range(4):
                cache = folder / "cache" / (dtype if kind == "warm" else f"{dtype}-{turn}")
                workdir = folder / f"{kind}-{dtype}-{turn}"
                # No dropout, and nothing but training within the time measured.
                arguments = runs.train_command(
                    workdir, corpus, **model, **rest, model__dropout=0, model__dtype=dtype, checkpoint__every_steps=0
                )
                variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "GPTJAX_CACHE": str(folder / "prepared")}
                seconds.append(first_step_seconds(arguments, workdir, variables))
            median = statistics.median(seconds[1:])  # the first prepares the corpus, and warms the cache
            rows.append((f"start to first step, {dtype}, {kind}", f"{median:.1f} s (limit {limit})", median <= limit))
    return rows


def first_step_seconds(arguments: list[str], workdir: pathlib.Path, variables: dict[str, str]) -> float:
    """Seconds until `metrics.jsonl` has its first line; steps are seen one step late, so the second step is taken off."""
    started = time.monotonic()
    process = subprocess.Popen(
        arguments,
        env=runs.environment(**variables),
        cwd=runs.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(arguments)} ended with code {process.returncode}")
            time.sleep(0.01)
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()


def quality(folder: pathlib.Path) -> Rows:
    """The nanoGPT CPU recipe on tinyshakespeare, whole validation split, 3 seeds."""
    path = os.environ.get("SHAKESPEARE")
    if path is None:
        return [("shakespeare_char", "skipped: name the text file in $SHAKESPEARE", True)]
    losses, seconds = [], []
    for seed in range(3):
        workdir = folder / f"shakespeare-{seed}"
        arguments = runs.command("train", "--config", "configs/shakespeare_char.py", "--workdir", str(workdir))
        started = time.monotonic()
        result = runs.run([*arguments, f"--config.data.files={path}", f"--config.seed={seed}"])
        seconds.append(time.monotonic() - started)
        assert result.returncode == 0, result.stderr
        losses.append(json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"])
    mean = statistics.mean(losses)
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return [
        ("shakespeare_char, validation nats", f"{mean:.4f} (seeds {shown}; limit 1.90)", mean <= 1.90),
        ("shakespeare_char, whole command", f"{statistics.median(seconds):.0f} s (nanoGPT: 85 s)", max(seconds) <= 85),
    ]


def learn(folder: pathlib.Path) -> Rows:
    """Each family, by the commands a user would type."""
    rows: Rows = []

    def train(name: str, *overrides: str) -> dict[str, float]:
        command = runs.command("train", "--config", f"configs/{name}.py", "--workdir", str(folder / name), *overrides)
        started = time.monotonic()
        result = runs.run(command)
        seconds = time.monotonic() - started
        assert result.returncode == 0, result.stderr
        rows.append((f"{name}, whole command", f"{seconds:.0f} s (limit 180)", seconds <= 180))
        return json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])

    counts = target_counts("stdlib_gpt")
    bits = -sum(n * math.log2(n / sum(counts)) for n in counts if n)
    final = train("stdlib_gpt", "--config.train.num_train_steps=200")
    bits_per_byte = final["eval/bits_per_byte"]
    unigram = bits_per_byte * bits / (final["eval/loss"] / math.log(2) * sum(counts))
    figure = f"{bits_per_byte:.3f} (unigrams: {unigram:.3f}; limit {unigram - 0.5:.3f})"
    rows.append(("GPT, validation bits a byte", figure, bits_per_byte <= unigram - 0.5))

    counts = target_counts("bert_tiny")
    accuracy, unigram = train("bert_tiny")["eval/accuracy"], max(counts) / sum(counts)
    figure = f"{accuracy:.1%} (commonest token: {unigram:.1%}; limit 20%)"
    rows.append(("BERT, masked tokens right", figure, accuracy >= 0.2))

    rng, words = random.Random(0), set[str]()
    while len(words) < 20_500:
        words.add("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 10))))
    verbs = {"copy": slice(None), "reverse": slice(None, None, -1)}
    pairs = [(f"{verb}: {word}", word[verbs[verb]]) for word in sorted(words) for verb in [rng.choice([*verbs])]]
    rng.shuffle(pairs)
    held_out, pairs = pairs[:500], pairs[500:]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs))
    train("copy_reverse", f"--config.data.files={path}")

    import gptjax

    write = gptjax.pipeline("text2text-generation", model=folder / "copy_reverse", max_new_tokens=16)
    outputs = [result["generated_text"] for result in write([source for source, _ in held_out])]
    exact = sum(output == target for output, (_, target) in zip(outputs, held_out, strict=True)) / len(held_out)
    rows.append(("encoder-decoder, 500 unseen words exact", f"{exact:.1%} (limit 99%)", exact >= 0.99))
    return rows


def target_counts(name: str) -> list[int]:
    """How often each token is a target in the validation split of a config: what knowing the counts alone is worth."""
    import numpy as np

    from experiments import build, cli
    from gptjax.data.pipeline import eval_batches

    data = build.prepare_data(cli.load_config(f"configs/{name}.py"))
    counts = np.zeros(data.tokenizer.vocab_size, np.int64)
    for batch in eval_batches(data, batch_size=64):
        counts += np.bincount(batch["targets"][batch["loss_weights"] > 0], minlength=len(counts))
    return counts.tolist()


def invariance(folder: pathlib.Path) -> Rows:
    """The long form of tests/invariance, and a run passed between devices and processes."""
    eight = runs.environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    suite = subprocess.run(
        [sys.executable, "-m", "tests.invariance.long"], env=eight, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert suite.returncode == 0, "tests.invariance.long failed"
    rows: Rows = [tuple(row) for row in json.loads(suite.stdout)]

    from tests.invariance.processes import chain

    rows += chain(folder)
    corpus = runs.write_corpus(folder)
    one, two = folder / "bfloat16-alone", folder / "bfloat16-restarted"
    assert runs.run(runs.train_command(one, corpus, model__dtype="bfloat16")).returncode == 0
    for minutes in (0.0001, 0.0001, 0):
        runs.run(runs.train_command(two, corpus, model__dtype="bfloat16", train__max_minutes=minutes))
    runs.assert_same_run(one, two)
    return [*rows, ("bfloat16, restarted twice", "losses and final arrays bit for bit", True)]


def plan(folder: pathlib.Path) -> Rows:
    """Memory at the peak beside MaxText 0.2.5's; weak scaling; scan over layers."""
    if importlib.util.find_spec("libtpu") is None:
        return [("plan", "skipped: pip install -e '.[plan]', in an environment of its own", True)]

    def planned(config: str, topology: str, **fields: object) -> dict[str, float]:
        path = folder / "plan.json"
        overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
        result = runs.run(
            [
                *runs.command("plan", "--config", f"configs/{config}.py", "--topology", topology, "--json", str(path)),
                *overrides,
            ]
        )
        assert result.returncode == 0, result.stderr
        return json.loads(path.read_text())["metrics"]

    small: dict[str, object] = {"model__remat": "full", "train__accumulation_steps": 1}
    sharded = {"mesh__data": 1, "mesh__fsdp": -1}
    gpt2 = planned("gpt2_small", "v5e:4x4", train__batch_size=128, **small, **sharded)
    llama = planned("llama3_8b", "v5e:16x16")
    rows: Rows = []
    for what, n, most in (("124M, v5e:4x4", gpt2, 2.04e9), ("8B, v5e:16x16", llama, 4.75e9)):
        peak = n["bytes/needed"]
        rows.append(
            (f"{what}: peak", f"{peak / 1e9:.2f} GB (MaxText's, by benchmarks.plan: {most / 1e9})", peak <= most)
        )
    few, many = (
        planned("gpt2_small", topology, train__batch_size=rows_in_all, **small)
        for topology, rows_in_all in (("v5e:2x2", 32), ("v5e:16x16", 2048))
    )
    for what, name, most in (
        ("predicted sum", "predicted/step_seconds_high", 1.1),
        ("compile processor time", "compile/cpu_seconds", 2.0),
    ):
        growth = many[name] / few[name]
        rows.append((f"124M, 4 to 256 devices: {what}", f"{growth:.2f} times (limit {most})", growth <= most))
    deep = planned("gpt2_small", "v5e:4x4", train__batch_size=128, model__num_layers=48, **small, **sharded)
    ratio = deep["compile/cpu_seconds"] / gpt2["compile/cpu_seconds"]
    rows.append(("48 layers over 12: compile processor time", f"{ratio:.2f} times (limit 1.2)", ratio <= 1.2))
    return rows


def batches(folder: pathlib.Path) -> Rows:
    """200 greedy texts of 64 tokens by the model that $SMOLLM2 names, at three batch sizes."""
    source = os.environ.get("SMOLLM2")
    if source is None:
        return [("greedy texts at batch 1, 8 and 32", "skipped: name the model's file in $SMOLLM2", True)]
    import numpy as np

    import gptjax
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling

    model, params, tokenizer = gptjax.load(source)
    things = [
        "the sea",
        "a clock",
        "bread",
        "the moon",
        "a bridge",
        "rain",
        "chess",
        "an old map",
        "tea",
        "a lighthouse",
    ]
    asks = "Tell me about {}.|A poem on {}:|How is {} made?|The history of {} begins|Who first drew {}?|{} is like"
    asks += "|Three facts about {}: 1.|In a word, {} is|def {}():|Once upon a time there was {}|Why {}|{}, said she,"
    asks += "|We sold {} for|To repair {}, first|Es war einmal {}|Q: What is {}? A:|{} and {}|No {} today|My {}|{}"
    prompts = [tokenizer.encode(ask.replace("{}", thing)) for ask in asks.split("|") for thing in things]
    greedy = {"max_new_tokens": 64, "eos_ids": [tokenizer.eos_id], "sampling": Sampling(temperature=0.0)}

    def texts(size: int) -> list[np.ndarray]:
        groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [text for group in groups for text in generate(model, params, group, **greedy)]  # type: ignore[arg-type]

    alone = texts(1)
    same = [sum(map(np.array_equal, alone, texts(size))) for size in (8, 32)]
    figure = f"{same[0]} and {same[1]} of {len(prompts)} the same as alone"
    return [("greedy texts at batch 1, 8 and 32", figure, min(same) == len(prompts))]


def faults(folder: pathlib.Path) -> Rows:
    """benchmarks.faults for ten minutes."""
    path = folder / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--minutes", "10", "--json", str(path)]
    result = subprocess.run(command, env=runs.environment(), cwd=runs.ROOT, capture_output=True, text=True)
    assert path.exists(), result.stderr
    counts = json.loads(path.read_text())["metrics"]
    tried = {name.removesuffix("/tried"): int(n) for name, n in counts.items() if name.endswith("/tried")}
    survived = {name: int(counts[f"{name}/survived"]) for name in tried}
    return [(name, f"{survived[name]} of {n} survived", survived[name] == n) for name, n in tried.items()]


def serve(folder: pathlib.Path) -> Rows:
    """The suite of tests/serving in its long form, and memory, losses and compilations under load."""
    environment = runs.environment(SCHEMATHESIS_EXAMPLES="150")
    suite = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "tests/serving"], env=environment, cwd=runs.ROOT,
                           stdout=subprocess.PIPE, text=True)  # fmt: skip
    rows: Rows = [
        ("tests/serving, 150 drawn requests an operation", suite.stdout.splitlines()[-1], not suite.returncode)
    ]
    model = os.environ.get("SMOLLM2")
    if model is None:
        return [*rows, ("load", "skipped: name the model file in $SMOLLM2", True)]
    report = folder / "serve.json"
    load = ["--systems", "ours", "--clients", "8,64", "--seconds", "300", "--json", str(report)]
    load = [sys.executable, "-m", "benchmarks.serve", "--model", model, *load]
    done = subprocess.run(load, env=runs.environment(), cwd=runs.ROOT)  # longer than `runs.run` waits
    found = json.loads(report.read_text())["metrics"]
    for number in ("8 clients", "64 clients"):
        ours = {
            name: found[f"ours/{number}/{name}"]
            for name in ("answers", "lost", "resident_gib_half", "resident_gib_end")
        }
        growth = ours["resident_gib_end"] / ours["resident_gib_half"] - 1
        figure = (
            f"{ours['answers']:.0f} answers, {ours['lost']:.0f} lost; memory grows by {growth:.1%} in the second half"
        )
        rows.append((number, figure, not ours["lost"] and growth <= 0.05))
    return [*rows, ("programs compiled under load", f"{found['ours/compiled']:.0f}", not done.returncode)]


def ray(folder: pathlib.Path) -> Rows:
    """Sweeps as Ray jobs, on a head of their own and on two nodes of this machine."""
    if importlib.util.find_spec("ray") is None:
        return [("ray", "skipped: pip install -e '.[ray]'", True)]
    suite = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/sweeps/test_ray.py"], env=runs.environment(),
                           cwd=runs.ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    return [("tests/sweeps/test_ray.py", suite.stdout.splitlines()[-1], not suite.returncode)]


def notebooks(folder: pathlib.Path) -> Rows:
    """Every notebook, from its first cell to its last."""
    from nbclient.exceptions import CellExecutionError

    from colab import pair
    from tests.test_colab import execute

    rows: Rows = []
    for name in pair.NOTEBOOKS:
        started, error = time.monotonic(), ""
        (folder / name).mkdir()
        try:
            execute(name, folder / name)
        except CellExecutionError as found:
            error = f"; {found.ename}: {found.evalue}"
        rows.append((name, f"{time.monotonic() - started:.0f} s{error}", not error))
    return rows


def mup(folder: pathlib.Path, widths: tuple[int, ...] = (64, 128, 256, 512), steps: int = 60) -> Rows:
    """Which of a grid of powers of two is the best learning rate at each width, on the standard library's bytes."""
    rows: Rows = []
    for is_mup in (True, False):
        best = [min(final_losses(width, is_mup, steps).items(), key=lambda found: found[1])[0] for width in widths]
        spread = max(best) - min(best)
        met = spread <= 1 if is_mup else spread >= 2
        name = "muP (within a grid step)" if is_mup else "standard (drifts)"
        rows.append((f"best rate over {widths}, {name}", ", ".join(f"2^{exponent}" for exponent in best), met))
    return rows


def final_losses(width: int, is_mup: bool, steps: int, exponents: range = range(-12, -5)) -> dict[int, float]:
    """The mean training loss of the last fifth of the steps, by the learning rate's exponent; every row is new."""
    import jax
    import numpy as np

    from gptjax.models import make_model
    from gptjax.training.optimizers import Hyperparameters
    from gptjax.training.state import init_state
    from gptjax.training.step import StepSettings, make_train_step

    sizes = {"vocab_size": 256, "num_layers": 2, "max_seq_len": 64, "embed_dim": width, "mlp_dim": 4 * width}
    sizes |= {"num_heads": width // 32, "num_kv_heads": width // 32, "head_dim": 32}
    model = make_model("gpt", **sizes, mup=is_mup, mup_base_dim=256)
    text = b"".join(path.read_bytes() for path in sorted(pathlib.Path(os.__file__).parent.glob("*.py")))
    starts = np.random.default_rng(0).integers(len(text) - 65, size=(steps, 16))
    windows = np.frombuffer(text, np.uint8).astype(np.int32)[starts[..., None] + np.arange(65)]
    settings = StepSettings("adamw", "linear", steps, 1, 1.0, 0.0, 0.0, 0.0, use_dropout=False)
    step = jax.jit(make_train_step(model, settings), donate_argnums=0)
    init = jax.jit(lambda hyper: init_state(model, "adamw", hyper, np.uint32(0), np.float32(1), ema=False))
    ones = np.ones((16, 64), np.int32)
    found = {}
    for exponent in exponents:
        state = init(Hyperparameters(*map(np.float32, (2.0**exponent, steps // 10, 0, 0.1, 0.9, 0.95, 0, 0))))
        losses = []
        for rows in windows:
            batch = {"inputs": rows[:, :-1], "targets": rows[:, 1:], "loss_weights": ones.astype(np.float32)}
            batch |= {"segment_ids": ones, "positions": ones * np.arange(64, dtype=np.int32)}
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        found[exponent] = float(np.mean(np.nan_to_num(losses[-steps // 5 :], nan=np.inf)))
    print(
        f"width {width}, mup {is_mup}:", {e: round(loss, 3) for e, loss in found.items()}, file=sys.stderr, flush=True
    )
    return found


PARTS: dict[str, Callable[[pathlib.Path], Rows]] = {
    "crash": crash,
    "start": start,
    "quality": quality,
    "learn": learn,
    "invariance": invariance,
    "serve": serve,
    "mup": mup,
    "notebooks": notebooks,
    "ray": ray,
    "plan": plan,
    "batches": batches,
    "faults": faults,
}


def main() -> int:
    """Runs the parts and prints the table; returns 1 if something is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=[*PARTS, "all"])
    part = parser.parse_args().part
    table: list[tuple[str, str, str, bool]] = []
    for name in PARTS if part == "all" else [part]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                table += [(name, *row) for row in PARTS[name](pathlib.Path(folder))]
            except (AssertionError, subprocess.TimeoutExpired) as error:
                table.append((name, "failed", str(error).strip().splitlines()[-1][:200], False))
    for name, what, figure, met in table:
        print(f"{name:<8} {'ok  ' if met else 'MISS'} {what:<42} {figure}")
    return 0 if all(met for *_, met in table) else 1


if __name__ == "__main__":
    sys.exit(main())
