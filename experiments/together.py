"""Runs of a sweep that differ only in numbers, trained in one program: `experiments.sweep --launcher vmap`."""

import concurrent.futures
import functools
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from experiments import build, cli
from experiments.launch import Run
from experiments.train import check_workdir, draw_losses, write_samples


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
    if flat[0]["data.objective"] == "dpo":  # each run would need the reference of its own start
        raise cli.UserError("--launcher vmap does not take config.data.objective='dpo'; use --launcher local")
    for run in runs:
        check_workdir(run.config, folder / run.name, override=False)


def train_together(runs: Sequence[Run], folder: pathlib.Path) -> tuple[dict[str, str], int]:
    """Trains runs from where they are: the outcome of each by name, and the signal that stopped them or 0."""
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update(
            "jax_num_cpu_devices", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        )  # a core a device, and each its share of the runs
    config = runs[0].config
    # Two at least: a kill between the saves of two runs then leaves them a common step.
    keep = max(2, config.checkpoint.keep)
    with cli.user_errors():
        data = build.prepare_data(config)
        groups: list[tuple[int, list[int]]] = [(0, list(range(len(runs))))]
        folders = [folder / run.name / "checkpoints" for run in runs]
        if any(path.exists() for path in folders):
            from gptjax.training.checkpoints import Checkpoints
            from gptjax.training.lockstep import common_steps

            groups = common_steps([Checkpoints(path, keep) for path in folders])
    outcomes = {run.name: "stopped" for run in runs}
    for step, members in groups:
        own = [runs[i] for i in members]
        lost: dict[str, str] = {}
        try:
            stopped = _train_group(own, folder, keep, step, data, lost)
        except cli.UserError:
            raise
        except Exception:
            traceback.print_exc()
            lost, stopped = dict.fromkeys((run.name for run in own), "crashed"), 0
        for run in own:
            outcomes[run.name] = lost.get(run.name, "stopped" if stopped else "finished")
        if stopped:
            return outcomes, stopped
    return outcomes, 0


def _train_group(
    runs: Sequence[Run], folder: pathlib.Path, keep: int, step: int, data: Any, lost: dict[str, str]
) -> int:
    """Trains runs that are all at `step`: the signal that stopped them or 0; adds to `lost` who diverged or crashed."""
    import jax

    from experiments.fit import fit
    from gptjax.training.lockstep import TOGETHER, make_mesh_of_runs
    from gptjax.training.loop import Diverged

    configs, workdirs = [run.config for run in runs], [folder / run.name for run in runs]

    def give_up(number: int, error: Exception) -> None:
        name = runs[number].name
        lost[name] = "diverged" if isinstance(error, Diverged) else "crashed"
        print(f"{name}: {lost[name]}: {error}", file=sys.stderr)
        if lost[name] == "crashed":
            traceback.print_exception(error)

    with cli.user_errors():
        mesh = build.mesh(configs[0], functools.partial(make_mesh_of_runs, num_runs=len(runs)))
        build.check_division(configs[0], mesh)
    with jax.set_mesh(mesh):
        model, params, stopped = fit(mesh, data, configs, workdirs, TOGETHER, keep=keep, last=step, give_up=give_up)
    if stopped:
        return stopped
    with concurrent.futures.ThreadPoolExecutor(1) as drawing:
        drawn = []
        for run, own in zip(runs, TOGETHER.split(params), strict=True):
            if run.name not in lost:
                write_samples(run.config, folder / run.name, model, own, data)
                drawn.append(drawing.submit(draw_losses, run.config, folder / run.name))
        for picture in drawn:
            picture.result()
    return 0
