"""Train a model: python -m experiments.train --config configs/NAME.py --workdir DIR [--config.section.field=value ...]

Typed again, it continues where it stopped, after whatever stopped it, or says that the run is finished.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

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
    final = read_metrics(workdir / "metrics.jsonl")[-1]
    summarize(config, workdir, final)
    environment = json.loads((workdir / "environment.json").read_text())
    cli.write_report(arguments.json, environment, [config.seed], final)
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


def import_the_rest() -> None:
    """Imports what the first step does not need, while it compiles."""
    import grain  # noqa: F401
    import tensorboardX  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401


def train(config: ConfigDict, workdir: pathlib.Path) -> int:
    """Runs from the last checkpoint, or the start, to the end; returns 0 or the number of the signal that stopped it."""
    import jax

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
            model, params, stopped = train_on(mesh, data, [config], [workdir], ALONE, initial=initial)
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
        draw_losses(workdir)
    return 0


def write_samples(config: ConfigDict, workdir: pathlib.Path, model: Any, params: Any, data: Any) -> None:
    """Writes what the model of a finished run makes of a few examples."""
    from experiments.samples import sample

    texts = sample(config, model, params, data)
    shown = "".join(f"--- sample {i + 1} ---\n{text}\n" for i, text in enumerate(texts))
    (workdir / "samples.txt").write_text(shown)


def draw_losses(workdir: pathlib.Path) -> None:
    """Draws the losses of a finished run, the last that it leaves."""
    from gptjax.analysis.plots import plot_losses

    plot_losses(read_metrics(workdir / "metrics.jsonl"), workdir / "loss.png")


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


def train_on(
    mesh: Any,
    data: Any,
    configs: Sequence[ConfigDict],
    workdirs: Sequence[pathlib.Path],
    axis: Any,
    *,
    keep: int | None = None,
    last: int | None = None,
    initial: Any = None,
    give_up: Callable[[int, Exception], None] | None = None,
) -> tuple[Any, Any, int]:
    """Trains one run, or several that differ only in numbers, on a mesh that is set.

    Args:
      axis: `lockstep.ALONE` or `TOGETHER`.
      keep: checkpoints, if not as many as the config says.
      last: checkpoints of later steps are dropped.
      initial: parameters to start from; None to draw them, or go on with the workdir's.
      give_up: as `loop.Functions` has it; None to raise what goes wrong.

    Returns:
      (the model, the parameters, of several runs [N, ...], and what `train` returns).
    """
    import jax

    from gptjax.data.pipeline import empty_batch, train_batches
    from gptjax.distributed.processes import data_share, is_first, make_vote, to_global
    from gptjax.distributed.sharding import batch_sharding, tree_shardings
    from gptjax.finetuning import lora, preference
    from gptjax.finetuning.start import start_from
    from gptjax.models import make_model
    from gptjax.models.config import DTYPES
    from gptjax.training import loop
    from gptjax.training.step import make_eval_step, make_train_step
    from gptjax.training.throughput import flops_per_token, peak_flops
    from gptjax.workdir import write_description

    config = configs[0]
    batch_size, every = config.train.batch_size, config.train.accumulation_steps
    with cli.user_errors():
        model = make_model(**build.model_sizes(config, build.vocab_size(config, data.tokenizer)))
        settings = build.step_settings(config)
        settings = settings._replace(use_dropout=any(build.step_settings(own).use_dropout for own in configs))
        loss = build.loss(config)
        if loss is not None:
            nothing = {s: np.broadcast_to(np.float32(0), (rows, data.seq_len)) for s, rows in data.num_rows.items()}
            data = data._replace(columns={split: {"reference": zeros} for split, zeros in nothing.items()})
        taken: dict[str, Any] = {}
        if initial is not None:
            taken, new, left = start_from(model, initial)
            if is_first():
                said = [f"{len(taken)} arrays from {config.init.model}"]
                said += [f"{what} {', '.join(names)}" for what, names in (("new:", new), ("left out:", left)) if names]
                print("; ".join(said), file=sys.stderr)

        init = build.initial_state(config, model)
        numbers = [
            (np.uint32(own.seed), np.float32(own.init.scale), build.hyperparameters(own), taken) for own in configs
        ]
        shapes = jax.eval_shape(init, *numbers[0])
        check_factors(config, shapes)
        shardings = tree_shardings(shapes, mesh)
        share, num_shares = data_share(mesh, batch_size)

    all_numbers = axis.stack(numbers)
    leading, rows = np.shape(all_numbers[0]), axis.lies(batch_sharding(mesh))
    states_lie = jax.tree.map(axis.lies, shardings)

    def lying(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding)

    def rows_of(num_rows: int) -> dict[str, Any]:
        return {name: lying(x, rows) for name, x in empty_batch(data, num_rows).items()}

    options = platform.compiler_options(config.model.dtype)
    abstract_state = jax.tree.map(lying, shapes, states_lie)
    background = concurrent.futures.ThreadPoolExecutor()

    def compiled(function: Any, *arguments: Any, **how: Any) -> Any:
        """A future: compilation runs outside Python's lock, so the rest of the start goes on beside it."""
        return background.submit(jax.jit(axis.over(function), **how).lower(*arguments).compile)

    started = time.perf_counter()
    program = compiled(
        make_train_step(model, settings, loss),
        abstract_state,
        rows_of(batch_size),
        donate_argnums=0,
        out_shardings=(states_lie, None),
        compiler_options=options,
    )
    init_program = compiled(init, *all_numbers, out_shardings=states_lie, donate_argnums=3)
    eval_fn = make_eval_step(model) if loss is None else preference.make_eval_step(model, loss)
    eval_program = compiled(eval_fn, abstract_state.eval_params, rows_of(batch_size // every), compiler_options=options)
    if is_first():
        for own, workdir in zip(configs, workdirs, strict=True):
            write_description(workdir, own.to_dict(), model, data.tokenizer)
    import_the_rest()
    train_step, init_state, eval_step = program.result(), init_program.result(), eval_program.result()
    if is_first():
        print(f"compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)

    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.metrics import MetricsWriter
    from gptjax.training.profile import top_operations

    # Resume order: 1. the latest whole checkpoint of this workdir; 2. the initial state.
    checkpoints = [Checkpoints(workdir / "checkpoints", keep or config.checkpoint.keep) for workdir in workdirs]
    one = jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, shardings)
    with cli.user_errors():
        restored = [found for own in checkpoints if (found := own.restore(one, last)) is not None]
    if restored:
        state = jax.device_put(axis.stack([found.state for found in restored]), states_lie)
        # The config's numbers, not the checkpoint's: the same unless the user overrides them.
        state = state._replace(hyper=jax.device_put(all_numbers[2], states_lie.hyper))
        records = [found.record for found in restored]
    else:
        state, records = init_state(*all_numbers), [{} for _ in configs]
    first_step = int(np.ravel(state.step)[0])
    if restored and is_first():
        print(f"resuming from step {first_step}", file=sys.stderr)

    micro_batch = jax.jit(axis.over(lambda batch: {name: x[::every] for name, x in batch.items()}), out_shardings=rows)

    def put(batch: dict[str, Any]) -> dict[str, Any]:
        # Every process reads all of it, which counts the bytes of all targets, and keeps the rows of its devices.
        of_all = axis.stack([batch] * len(configs))
        return {name: jax.make_array_from_callback(x.shape, rows, x.__getitem__) for name, x in of_all.items()}

    if loss is not None:
        score = jax.jit(functools.partial(preference.target_log_probabilities, model), compiler_options=options)
        with cli.user_errors():
            data = with_reference(
                data, workdirs[0], lambda batch: score(state.model_params, put(batch)), first_step, batch_size
            )

    def probe(state: Any, batch: Any) -> Any:
        return np.ravel(eval_step(state.model_params, micro_batch(batch))["loss_sum"])

    bar = tqdm(
        total=config.train.num_train_steps,
        initial=first_step,
        unit="step",
        disable=None if is_first() else True,  # None: without a terminal
        dynamic_ncols=True,
    )

    def progress(step: int, lines: list[dict[str, float]]) -> None:
        loss = min((line["train/loss"] for line in lines), default=np.nan)
        rate = sum(line["perf/tokens_per_second"] for line in lines)
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update(step - bar.n)

    def stop(run: int, error: Exception) -> None:
        raise error

    writers = [MetricsWriter(workdir, last_step=first_step, writes=is_first()) for workdir in workdirs]
    when, flops = build.loop_settings(config), flops_per_token(model, shapes.params, data.seq_len, shapes.frozen)
    peak = peak_flops(DTYPES[config.model.dtype])
    logbooks = [
        loop.Logbook(when, *own, flops_per_token=flops, peak_flops=peak)
        for own in zip(checkpoints, writers, records, strict=True)
    ]
    seeds = [own.seed for own in configs]
    with cli.user_errors():
        by_seed = {
            seed: train_batches(
                data,
                batch_size=batch_size,
                seed=seed,
                start_row=first_step * batch_size,
                cross_document=config.data.cross_document,
                process_index=share,
                process_count=num_shares,
            )
            for seed in seeds
        }

    def batches() -> Iterator[dict[str, Any]]:
        """Runs of one seed read the same rows."""
        try:
            while True:
                read = {seed: next(own) for seed, own in by_seed.items()}
                yield to_global(axis.stack([read[seed] for seed in seeds]), rows, num_shares)
        finally:
            for own in by_seed.values():
                own.close()

    functions = loop.Functions(
        train_step=train_step,
        probe=probe,
        evaluate=lambda state: evaluate(config, data, eval_step, state.eval_params, put),
        split=axis.split,
        progress=progress,
        give_up=give_up or stop,
        vote=make_vote(mesh),
    )
    trace_dir = workdirs[0] / "profile"
    try:
        state, stopped = loop.train(logbooks, functions, state, batches(), str(trace_dir))
    finally:
        bar.close()
        for writer in writers:
            writer.close()
    if is_first() and config.profile.steps and trace_dir.exists():
        print(top_operations(trace_dir, train_step.as_text() or ""), file=sys.stderr)
    return model, lora.merge(state.eval_params), stopped


def evaluate(config: ConfigDict, data: Any, eval_step: Any, params: Any, put: Any) -> list[dict[str, float]]:
    """What the validation split says of each model whose sums `eval_step` returns."""
    from gptjax.data.pipeline import eval_batches, target_bytes
    from gptjax.evaluation import perplexity

    with cli.user_errors():
        batches = eval_batches(
            data,
            batch_size=config.train.batch_size // config.train.accumulation_steps,
            cross_document=config.data.cross_document,
            max_batches=config.eval.max_batches or None,
        )
        results = perplexity.evaluate(eval_step, params, batches, target_bytes(data), put)
    if config.data.objective in ("dpo", "classification", "question_answering"):
        for result in results:
            del result["eval/perplexity"]  # there are no tokens to be perplexed by
    return results


def with_reference(data: Any, workdir: pathlib.Path, score: Any, step: int, batch_size: int) -> Any:
    """Adds to the rows what the model that training began with gives their targets: computed once, kept in the workdir.

    Raises:
      ValueError: training has begun, and the file is gone.
    """
    from gptjax.data.pipeline import eval_batches
    from gptjax.distributed.processes import is_first, to_host

    columns = {}
    for split, num_rows in data.num_rows.items():
        file = workdir / f"reference_{split}.npy"
        if step and not file.exists():
            raise ValueError(f"{file} is gone, without which this run cannot go on")
        if not step:
            scores = [to_host(score(batch)) for batch in eval_batches(data, split, batch_size=batch_size)]
            if is_first():
                temporary = file.with_suffix(".tmp.npy")
                np.save(temporary, np.concatenate(scores)[:num_rows])
                temporary.rename(file)
            columns[split] = {"reference": np.concatenate(scores)[:num_rows]}
        else:
            columns[split] = {"reference": np.load(file, mmap_mode="r")}
    return data._replace(columns=columns)


def check_factors(config: ConfigDict, state: Any) -> None:
    """Refuses a regex that finds no parameter, and a run that trains none."""
    import jax

    from gptjax.distributed.sharding import path_of

    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.model_params)]
    for pattern, _ in config.optimizer.factors:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"config.optimizer.factors: {pattern!r} finds none of the parameters {', '.join(paths)}")
    if not state.params:
        raise ValueError(f"config.optimizer.factors={config.optimizer.factors!r} freezes every parameter")


def summarize(config: ConfigDict, workdir: pathlib.Path, final: dict[str, Any]) -> None:
    """Prints the result, the samples, where the files are, and what to type next."""
    from gptjax.evaluation.perplexity import describe

    print((workdir / "samples.txt").read_text())
    print(
        f"step {final['step']}: validation {describe(final)}; "
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
