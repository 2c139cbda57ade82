"""Runs of a sweep that differ only in numbers, trained in one program: `experiments.sweep --launcher vmap`."""

import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments import build, cli
from experiments.launch import Run
from experiments.train import check_workdir, evaluate, write_results


def check(runs: Sequence[Run], folder: pathlib.Path) -> None:
    """Refuses runs that cannot be one program, or whose folders hold other runs.

    Raises:
      UserError: names the field.
    """
    from gptjax.training.optimizers import Hyperparameters

    numbers = {f"optimizer.{name}" for name in Hyperparameters._fields} | {"seed", "init.scale", "model.dropout"}
    flat = [cli.flatten(run.config) for run in runs]
    for name, value in flat[0].items():
        if name not in numbers and any(fields[name] != value for fields in flat):
            raise cli.UserError(
                f"--launcher vmap: runs differ in config.{name}, which changes shapes or what is compiled; "
                "use --launcher local"
            )
    for name, neutral in {"init.model": "", "lora.rank": 0, "profile.steps": ""}.items():
        if flat[0][name] != neutral:
            raise cli.UserError(f"--launcher vmap does not take config.{name}={flat[0][name]!r}; use --launcher local")
    for run in runs:
        check_workdir(run.config, folder / run.name, override=False)


def train_together(runs: Sequence[Run], folder: pathlib.Path) -> tuple[dict[str, str], int]:
    """Trains runs from where they are: the outcome of each by name, and the signal that stopped them or 0."""
    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.lockstep import common_steps

    config = runs[0].config
    with cli.user_errors():
        build.mesh(config)
        data = build.prepare_data(config)
        # Two at least: a kill between the saves of two runs then leaves them a common step.
        keep = max(2, config.checkpoint.keep)
        checkpoints = [Checkpoints(folder / run.name / "checkpoints", keep) for run in runs]
        groups = common_steps(checkpoints)
    outcomes = {run.name: "stopped" for run in runs}
    for step, members in groups:
        own = [runs[i] for i in members]
        try:
            lost, stopped = _train_group(own, folder, [checkpoints[i] for i in members], step, data)
        except Exception as error:
            if isinstance(error, cli.UserError):
                raise
            traceback.print_exc()
            lost, stopped = dict.fromkeys(range(len(own)), "crashed"), 0
        for i, run in enumerate(own):
            outcomes[run.name] = lost.get(i, "stopped" if stopped else "finished")
        if stopped:
            return outcomes, stopped
    return outcomes, 0


def _train_group(
    runs: Sequence[Run], folder: pathlib.Path, checkpoints: Sequence[Any], step: int, data: Any
) -> tuple[dict[int, str], int]:
    """Trains runs that are all at `step`: what `lockstep.train` says of them."""
    import jax

    from gptjax import platform
    from gptjax.data.pipeline import train_batches
    from gptjax.distributed.mesh import AXES
    from gptjax.distributed.sharding import batch_sharding, tree_shardings
    from gptjax.models import make_model
    from gptjax.models.config import DTYPES
    from gptjax.training import lockstep
    from gptjax.training.lockstep import over_runs, with_runs
    from gptjax.training.loop import Functions, Loop, device_batches
    from gptjax.training.metrics import MetricsWriter
    from gptjax.training.step import make_eval_step, make_train_step
    from gptjax.training.throughput import flops_per_token, peak_flops
    from gptjax.workdir import write_description

    configs = [run.config for run in runs]
    config, workdirs = configs[0], [folder / run.name for run in runs]
    with cli.user_errors():
        mesh = lockstep.make_mesh_of_runs({axis: config.mesh[axis] for axis in AXES}, len(runs))
        build.check_division(config, mesh)
        model = make_model(**build.model_sizes(config, build.vocab_size(config, data.tokenizer)))
    settings = build.step_settings(config)._replace(use_dropout=any(c.model.dropout > 0 for c in configs))
    hyper = jax.tree.map(lambda *x: np.stack(x), *map(build.hyperparameters, configs))
    seeds = np.array([c.seed for c in configs], np.uint32)
    numbers: Any = (seeds, np.array([c.init.scale for c in configs], np.float32), hyper, {})
    init = build.initial_state(config, model)
    shapes = jax.eval_shape(init, *jax.tree.map(lambda x: x[0], numbers))
    options = platform.compiler_options(config.model.dtype)
    for own, workdir in zip(configs, workdirs, strict=True):
        write_description(workdir, own.to_dict(), model, data.tokenizer)

    with jax.set_mesh(mesh):
        shardings = tree_shardings(shapes, mesh)
        states_lie, rows = jax.tree.map(with_runs, shardings), batch_sharding(mesh)
        records: list[dict[str, Any]] = [{} for _ in runs]
        if step:
            lie = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
            abstract, restored = jax.tree.map(lie, shapes, shardings), []
            for run, own in enumerate(checkpoints):
                state, records[run] = own.restore(abstract, step)
                restored.append(jax.tree.map(np.asarray, state))
            states = jax.tree.map(lambda lies, *x: jax.device_put(np.stack(x), lies), states_lie, *restored)
            states = states._replace(hyper=jax.device_put(hyper, states_lie.hyper))
            print(f"resuming {len(runs)} runs from step {step}", file=sys.stderr)
        else:
            states = jax.jit(over_runs(init, (0, 0, 0, None)), out_shardings=states_lie)(*numbers)
        train_step = jax.jit(
            over_runs(make_train_step(model, settings)),
            donate_argnums=0,
            out_shardings=(states_lie, None),
            compiler_options=options,
        )
        every = config.train.accumulation_steps
        eval_step = make_eval_step(model)
        validate = jax.jit(over_runs(eval_step, (0, None)), compiler_options=options)
        probe = jax.jit(
            lambda states, batches: over_runs(eval_step)(
                states.model_params, {name: x[:, ::every] for name, x in batches.items()}
            )["loss_sum"],
            compiler_options=options,
        )
        take = jax.jit(lambda states, run: jax.tree.map(lambda x: x[run], states), out_shardings=shardings)
        bar = tqdm(total=config.train.num_train_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        functions = lockstep.Functions(
            train_step,
            lambda states, batches: np.asarray(probe(states, batches)),
            lambda states: evaluate(
                config, data, validate, states.eval_params, lambda batch: jax.device_put(batch, rows)
            ),
            take,
        )

        def progress(step: int, line: dict[str, float]) -> None:
            bar.update(step - bar.n)

        of_one: Any = Functions(None, None, None, progress, None)  # type: ignore[arg-type]
        writers = [MetricsWriter(workdir, last_step=step) for workdir in workdirs]
        shared = {
            "flops_per_token": flops_per_token(model, shapes.params, data.seq_len),
            "peak_flops": peak_flops(DTYPES[config.model.dtype]),
            "trace_dir": "",
        }
        loops = [
            Loop(of_one, build.loop_settings(config), own, writer, **shared)  # type: ignore[arg-type]
            for own, writer in zip(checkpoints, writers, strict=True)
        ]
        by_seed = {
            int(seed): train_batches(
                data,
                batch_size=config.train.batch_size,
                seed=int(seed),
                start_row=step * config.train.batch_size,
                cross_document=config.data.cross_document,
            )
            for seed in set(seeds)
        }
        try:
            put = lambda batches: jax.device_put(batches, with_runs(rows))  # noqa: E731
            states, lost, stopped = lockstep.train(
                loops, functions, states, device_batches(_stacked(by_seed, seeds), put), records
            )
        finally:
            bar.close()
            for writer in writers:
                writer.close()
        if not stopped:
            for i, (own, workdir) in enumerate(zip(configs, workdirs, strict=True)):
                if i not in lost:
                    write_results(own, workdir, model, take(states, i).eval_params, data)
    return lost, stopped


def _stacked(by_seed: dict[int, Any], seeds: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Batches [N, B, ...]; runs of one seed read the same rows."""
    try:
        while True:
            batches = {seed: next(own) for seed, own in by_seed.items()}
            yield {name: np.stack([batches[seed][name] for seed in seeds]) for name in batches[seeds[0]]}
    finally:
        for own in by_seed.values():
            own.close()
