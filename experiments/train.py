"""Train a model: python -m experiments.train --config configs/NAME.py --workdir DIR [--config.section.field=value ...]

Typed again, it continues where it stopped, after whatever stopped it, or says that the run is finished.
"""

import argparse
import json
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import build, cli
from gptjax import platform
from gptjax.training.metrics import read_metrics

# Fields that may change between two starts of one run: they choose when it stops, not what it computes.
FREE_FIELDS = (
    "train.max_minutes",
    "profile.steps",
    "mesh.platform",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.context",
    "mesh.expert",
)


def main(argv: Sequence[str]) -> int:
    """Trains, or resumes; returns the exit code."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--workdir", help="the run's folder, made if it does not exist (required)")
    parser.add_argument("--override_config", action="store_true", help="go on with a run of another config")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of the first of several processes; auto: JAX finds out; SLURM, Open MPI and TPU slices on GKE need no flag",
    )
    parser.add_argument("--num_processes", type=int, help="how many processes this run has, with --coordinator")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0, with --coordinator")
    arguments = parser.parse(argv)
    if arguments.workdir is None:
        parser.error("--workdir DIR is required")
    flags = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if platform.launched_with_others() or any(flag is not None for flag in flags):
        return run_as_one_of_many(arguments, *flags)
    return run(arguments)


def run_as_one_of_many(
    arguments: argparse.Namespace, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> int:
    """Runs with other processes; whatever ends one of them ends all."""
    import jax

    from gptjax.distributed import processes

    def together() -> int:
        with cli.user_errors():
            processes.start(None if coordinator == "auto" else coordinator, num_processes, process_id)
            fields = {f"config.{name}": value for name, value in cli.flatten(arguments.config).items()}
            processes.check_equal(fields | {"--workdir": arguments.workdir})
        return run(arguments, writes=processes.is_first())

    lost = False
    try:
        code = cli.exit_code(together)
    except SystemExit as error:
        code = int(error.code or 0)
    except Exception as error:
        lost = processes.is_loss(error)
        if lost:
            print(f"error: lost another process of this run: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        else:
            traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        processes.leave(code, lost=lost)
    return code


def run(arguments: argparse.Namespace, *, writes: bool = True) -> int:
    """Trains, or resumes; returns the exit code. Of several processes one `writes` and prints."""
    config, workdir = arguments.config, pathlib.Path(arguments.workdir).absolute()
    build.check(config)
    if config.init.model and (workdir / "model.json").exists():
        config = build.with_model(config, json.loads((workdir / "model.json").read_text()))
    check_workdir(config, workdir, override=arguments.override_config)
    if is_finished(config, workdir):
        print("this run is finished; --workdir another folder to start a new one")
    else:
        code = train(config, workdir)
        if code and writes:
            print(f"stopped with the state saved; to go on, type the same command again: {_command()}", file=sys.stderr)
        if code:
            return 128 + code
    if not writes:
        return 0
    lines = read_metrics(workdir / "metrics.jsonl")
    summarize(config, workdir, lines)
    environment = json.loads((workdir / "environment.json").read_text())
    cli.write_report(arguments.json, environment, [config.seed], lines[-1])
    return 0


def check_workdir(config: ConfigDict, workdir: pathlib.Path, *, override: bool) -> None:
    """Refuses a workdir that is a file, or holds a run of another config.

    Raises:
      UserError: names the fields that differ and the flag that overrides.
    """
    if workdir.exists() and not workdir.is_dir():
        raise cli.UserError(f"--workdir {workdir} is not a folder")
    path = workdir / "config.json"
    if override or not path.exists():
        return
    old = {
        f"{section}.{name}" if isinstance(value, dict) else section: leaf
        for section, value in json.loads(path.read_text()).items()
        for name, leaf in (value.items() if isinstance(value, dict) else [("", value)])
    }
    new = {name: json.loads(json.dumps(value)) for name, value in cli.flatten(config).items()}  # tuples are lists there
    differing = [n for n in sorted(old | new) if n not in FREE_FIELDS and old.get(n) != new.get(n)]
    if differing:
        shown = ", ".join(f"config.{n} was {old.get(n)!r}, is {new.get(n)!r}" for n in differing)
        raise cli.UserError(
            f"--workdir {workdir} holds the run of another config: {shown}; choose another folder, or --override_config "
            "to continue that run with the new values"
        )


def is_finished(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether the run has reached its last step and everything about it is written; loss.png is written last."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] >= config.train.num_train_steps and (workdir / "loss.png").exists()


def train(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Runs from the last checkpoint, or the start, to the end; returns 0 or the number of the signal that stopped it."""
    import jax

    from experiments.fit import fit
    from gptjax.distributed.processes import is_first, to_host
    from gptjax.training.lockstep import ALONE
    from gptjax.training.loop import Diverged

    with cli.user_errors():
        mesh = build.mesh(config)
        config, tokenizer, initial = start_model(config, workdir, mesh)
        build.check_division(config, mesh)
        data = build.prepare_data(config, tokenizer)
    try:
        with jax.set_mesh(mesh):
            model, params, stopped = fit(mesh, data, [config], [workdir], ALONE, initial=initial)
    except Diverged as error:
        if is_first():
            where = workdir / "checkpoints"
            steps = sorted(int(path.parent.name) for path in where.glob("[0-9]*/manifest.json"))
            good = f"the last good checkpoint is step {steps[-1]} in {where}" if steps else "nothing was saved yet"
            print(f"diverged: {error}; {good}; a lower --config.optimizer.learning_rate may help", file=sys.stderr)
        sys.exit(cli.DIVERGED)
    if stopped:
        return stopped
    params = to_host(params)
    if is_first():
        write_samples(config, workdir, model, params, data)
        draw_losses(config, workdir)
    return 0


def write_samples(config: ConfigDict, workdir: pathlib.Path, model: Any, params: Any, data: Any) -> None:
    """Writes what the model of a finished run makes of a few examples."""
    from experiments.samples import sample

    texts = sample(config, model, params, data)
    shown = "".join(f"--- sample {i + 1} ---\n{text}\n" for i, text in enumerate(texts))
    (workdir / "samples.txt").write_text(shown)


def draw_losses(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Draws the losses of a finished run, the last that it leaves."""
    from gptjax.analysis.plots import plot_losses
    from gptjax.data.objectives import loss_unit

    plot_losses(read_metrics(workdir / "metrics.jsonl"), workdir / "loss.png", loss_unit(config.data.objective))


def start_model(config: ConfigDict, workdir: pathlib.Path, mesh: Any) -> tuple[ConfigDict, Any, Any]:
    """Opens the model to start from: returns the config with its fields, its tokenizer, and its parameters.

    There is none, or one that only a first checkpoint needs: a workdir that has one goes on by itself, without parameters.
    """
    if not config.init.model:
        return config, None, None
    if (workdir / "model.json").exists() and any((workdir / "checkpoints").glob("[0-9]*/manifest.json")):
        from gptjax.data.tokenizers import Tokenizer

        return config, Tokenizer.load(workdir / "tokenizer.json"), None
    return build.initial_model(config, mesh)


def summarize(config: ConfigDict, workdir: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Prints the result, the samples, where the files are, and what to type next."""
    from gptjax.data.objectives import loss_unit
    from gptjax.evaluation.perplexity import describe

    unit, final = loss_unit(config.data.objective), lines[-1]
    print((workdir / "samples.txt").read_text())
    if lines[0]["step"] == 0:
        print(f"step 0: validation {describe(lines[0], unit)}")
    print(
        f"step {final['step']}: validation {describe(final, unit)}; "
        f"{final['train/tokens']:,} tokens in {final['time/seconds']:.0f} s"
    )
    print(f"files: {workdir} (loss.png, samples.txt, metrics.jsonl, checkpoints; tensorboard --logdir {workdir})")
    print(f"next:  python -m experiments.evaluate --model {workdir}")
    if json.loads((workdir / "model.json").read_text())["family"] == "gpt":
        how = "--prompt 'def '"
        if config.data.objective in ("sft", "dpo"):
            how = "--interactive  (trained on prompts and completions: --prompt TEXT)"
        print(f"       python -m experiments.generate --model {workdir} {how}")


def _command() -> str:
    import shlex

    return shlex.join(sys.orig_argv)


if __name__ == "__main__":
    cli.run(main)
