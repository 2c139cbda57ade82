"""Fine-tuning beside Transformers: python -m benchmarks.finetune --config configs/sst2_minilm.py \
    --config.init.model=MINILM --config.data.files=sst2/train.tsv --config.data.validation_files=sst2/dev.tsv \
    [--seeds 3] [--config.lora.rank=8]

Both sides start from the same parameters, new head included, and read the same examples in the same order with the same
learning rates: the losses of the first steps without dropout; examples a second, in interleaved rounds of five steps, with
it; and with --seeds whole runs of `train.num_train_steps`, evaluated by ours, with the paired difference. Transformers
reads one example a row, padded to the longest of its batch, as its Trainer does, and its adapters are PEFT's; ours reads
several a row. Labels (SST-2) or answers (configs/xquad_minilm.py). Needs `make referee`; two threads for both.
"""

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.train_step import MALLOC, REFEREE, ROOT, environment
from experiments import build, cli

STEPS_A_ROUND = 5


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit code: 1 if losses differ by more than 1e-4."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--steps", type=int, default=50, help="whose losses are compared")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each side")
    parser.add_argument("--seeds", type=int, default=0, help="whole runs of each side")
    arguments = parser.parse(argv)
    config = arguments.config
    build.check(config)
    if config.data.objective not in ("classification", "question_answering"):
        parser.error(f"--config.data.objective={config.data.objective} asks for no label and no answer")
    if not REFEREE.exists():
        raise cli.UserError("the referee is missing: run `make referee` first")
    with cli.user_errors(), tempfile.TemporaryDirectory() as scratch:
        sides = Sides(config, pathlib.Path(scratch))
        try:
            metrics = compare_losses(sides, arguments.steps) | time_both(sides, arguments.rounds)
            metrics |= compare_runs(sides, arguments.seeds) if arguments.seeds else {}
        finally:
            sides.referee.kill()
            sides.referee.wait()
    cli.write_report(arguments.json, environment(), list(range(arguments.seeds)), metrics)
    return int(metrics["largest_loss_difference"] > 1e-4)


class Sides:
    """Ours, in this process, and the referee, in one of its own; each has one run under way."""

    def __init__(self, config: Any, scratch: pathlib.Path):
        from gptjax.models import make_model

        self.scratch = scratch
        self.config, tokenizer, self.initial = build.initial_model(config)
        self.data = build.prepare_data(self.config, tokenizer)
        self.model = make_model(**build.model_sizes(self.config, build.vocab_size(self.config, self.data.tokenizer)))
        self.steps: dict[bool, Any] = {}  # by whether there is dropout
        self.referee = subprocess.Popen(
            [REFEREE, ROOT / "benchmarks/referee_finetune.py", self.config.data.objective],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"GLIBC_TUNABLES": MALLOC, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
        )

    def start(self, seed: int, num_steps: int, *, dropout: bool) -> None:
        """Both sides at step 0 of a run, with the examples of its steps."""
        import jax

        from gptjax.data.pipeline import train_batches
        from gptjax.finetuning import lora
        from gptjax.finetuning.start import start_from
        from gptjax.interop import huggingface, peft
        from gptjax.training.optimizers import learning_rate
        from gptjax.training.step import make_train_step

        c, settings, hyper = self.config, build.step_settings(self.config), build.hyperparameters(self.config)
        taken = dict(start_from(self.model, self.initial).taken)
        init = jax.jit(build.initial_state(c, self.model))
        self.state = init(np.uint32(seed), np.float32(c.init.scale), hyper, taken)
        if dropout not in self.steps:
            step = make_train_step(self.model, settings._replace(use_dropout=dropout))
            self.steps[dropout] = jax.jit(step, donate_argnums=0)
        self.step = self.steps[dropout]
        rows = train_batches(self.data, batch_size=c.train.batch_size, seed=seed)
        self.batches = list(itertools.islice(rows, num_steps))
        rows.close()

        folder = self.scratch / "start"
        huggingface.write(folder, self.model, lora.merge(self.state.model_params), self.data.tokenizer)
        if c.lora.rank:
            peft.write(self.scratch / "adapter", self.model, self.state.model_params, base=str(folder))
        (self.scratch / "batches.json").write_text(json.dumps([list(self.texts(batch)) for batch in self.batches]))
        rate = jax.jit(lambda step: learning_rate(step, settings.schedule, settings.num_train_steps, hyper))
        request = {
            "folder": str(folder),
            "adapter": str(self.scratch / "adapter") if c.lora.rank else None,
            "batches": str(self.scratch / "batches.json"),
            "dropout": c.model.dropout * dropout,
            "rates": [float(rate(step)) for step in range(num_steps)],
            "betas": [c.optimizer.beta1, c.optimizer.beta2],
            "weight_decay": c.optimizer.weight_decay,
            "clip_norm": c.optimizer.clip_norm,
            "seed": seed,
        }
        self.ask(request)

    def texts(self, batch: dict[str, np.ndarray]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Ids, token types and what is asked of each text of a batch, places counted in the text."""
        per_text = 1 if self.config.data.objective == "classification" else 2
        for row, segments in enumerate(batch["segment_ids"]):
            asked = batch["targets"][row].reshape(-1, per_text)
            for number in range(segments.max()):
                here = np.flatnonzero(segments == number + 1)
                places = asked[number] - (here[0] if per_text == 2 else 0)
                yield batch["inputs"][row][here].tolist(), batch["token_types"][row][here].tolist(), places.tolist()

    def ours(self, first: int, last: int) -> tuple[list[float], float]:
        """Trains from step `first` to before `last`: (losses, seconds)."""
        started, losses = time.perf_counter(), []
        for batch in self.batches[first:last]:
            self.state, metrics = self.step(self.state, batch)
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses], time.perf_counter() - started

    def theirs(self, first: int, last: int) -> tuple[list[float], float]:
        """The same by Transformers."""
        return tuple(self.ask([first, last]))

    def ask(self, request: Any) -> Any:
        """Has the referee do what a line says."""
        assert self.referee.stdin and self.referee.stdout
        self.referee.stdin.write(json.dumps(request) + "\n")
        self.referee.stdin.flush()
        answer = self.referee.stdout.readline()
        if not answer:
            raise RuntimeError(f"the referee ended with code {self.referee.wait()}")
        return json.loads(answer)


def compare_losses(sides: Sides, num_steps: int) -> dict[str, float]:
    """The losses of the first steps, without dropout."""
    sides.start(0, num_steps, dropout=False)
    ours, theirs = sides.ours(0, num_steps)[0], sides.theirs(0, num_steps)[0]
    differences = np.abs(np.subtract(ours, theirs))
    print(
        f"losses of {num_steps} steps without dropout: {ours[0]:.4f} to {ours[-1]:.4f}, Transformers {theirs[0]:.4f} to "
        f"{theirs[-1]:.4f}; they differ by at most {differences.max():.1e}, on average {differences.mean():.1e}",
        flush=True,
    )
    return {"largest_loss_difference": float(differences.max())}


def time_both(sides: Sides, rounds: int) -> dict[str, float]:
    """Examples and tokens a second, with dropout."""
    each = STEPS_A_ROUND + 1
    sides.start(0, each * (rounds + 1), dropout=True)
    speeds: dict[str, list[tuple[float, float]]] = {"gptjax": [], "Transformers": []}
    for turn in range(rounds + 1):
        first = turn * each
        texts = [text for batch in sides.batches[first + 1 : first + each] for text in sides.texts(batch)]
        for name, train in (("gptjax", sides.ours), ("Transformers", sides.theirs)):
            time.sleep(0.5)  # the other's threads stop spinning
            train(first, first + 1)  # the first after a pause does not count
            seconds = train(first + 1, first + each)[1]
            if turn:  # nor the round that compiles
                speeds[name].append((len(texts) / seconds, sum(len(ids) for ids, _, _ in texts) / seconds))
    ratios = sorted(a / b for (a, _), (b, _) in zip(*speeds.values(), strict=True))
    metrics = {"ratio": statistics.median(ratios)}
    for name, measured in speeds.items():
        examples, tokens = (statistics.median(column) for column in zip(*measured, strict=True))
        metrics |= {f"{name}/examples_per_second": examples, f"{name}/tokens_per_second": tokens}
        print(f"{name:<12} {examples:7.1f} examples/s  {tokens:7.0f} tokens/s, padding not counted")
    print(f"ours over theirs: {metrics['ratio']:.2f} (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
    return metrics


def compare_runs(sides: Sides, num_seeds: int) -> dict[str, float]:
    """What whole runs of both sides reach on held-out examples, by the same evaluation.

    The interval of the difference is one over seeds, paired; of one seed, over examples.
    """
    from gptjax.analysis.statistics import mean_interval
    from gptjax.data.corpora import open_corpus
    from gptjax.evaluation.task_files import of_records
    from gptjax.evaluation.tasks import Subject, run_task
    from gptjax.evaluation.text_metrics import Measurement, bootstrap
    from gptjax.finetuning import lora
    from gptjax.loading import Loaded, load
    from gptjax.platform import cache_dir

    d, num_steps = sides.config.data, sides.config.train.num_train_steps
    names = ("corpus", "files", "validation_files", "validation_fraction")
    corpus = open_corpus(**{name: d[name] for name in names}, as_records=True, cache_dir=cache_dir() / "data")
    task = of_records("validation", d.objective, corpus.splits["validation"]())
    wanted = ("accuracy",) if task.kind == "classify" else ("exact_match", "f1")
    measured: dict[str, list[list[Measurement]]] = {name: [] for name in wanted}

    def values(pair: list[Measurement]) -> list[float]:
        return [one.value(one.rows) for one in pair]

    for seed in range(num_seeds):
        sides.start(seed, num_steps, dropout=True)
        seconds = [train(0, num_steps)[1] for train in (sides.ours, sides.theirs)]
        folder = sides.scratch / "tuned"
        sides.data.tokenizer.save(folder)
        sides.ask(str(folder))
        tuned = Loaded(sides.model, lora.merge(sides.state.model_params), sides.data.tokenizer), load(folder)
        results = [run_task(task, Subject(one, {"config": {}, "generation_config": {}})).metrics for one in tuned]
        for name in wanted:
            measured[name].append([result[name] for result in results])
            ours, theirs = values(measured[name][-1])
            print(
                f"seed {seed}, {num_steps} steps: {name} {ours:.4f} after {seconds[0]:.0f} s, Transformers {theirs:.4f} "
                f"after {seconds[1]:.0f} s",
                flush=True,
            )
    metrics: dict[str, float] = {}
    for name, of_seeds in measured.items():
        ours, theirs = np.mean(scores := [values(pair) for pair in of_seeds], axis=0)
        if num_seeds > 1:
            over, (_, low, high) = f"{num_seeds} seeds", mean_interval(np.subtract(*np.transpose(scores)))
        else:
            over, (_, low, high, _) = f"{len(task.examples)} examples", bootstrap(*of_seeds[0])
        print(
            f"{name}: {ours:.4f}, Transformers {theirs:.4f}; difference {ours - theirs:+.4f}, 95 % interval over "
            f"{over} {low:+.4f} to {high:+.4f}"
        )
        metrics |= {f"{name}/gptjax": float(ours), f"{name}/Transformers": float(theirs)}
        metrics |= {f"{name}/low": float(low), f"{name}/high": float(high)}
    return metrics


if __name__ == "__main__":
    cli.run(main)
