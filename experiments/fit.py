"""From configs to trained parameters: what `experiments.train` and a sweep in one program run.

Imports everything that training needs, which takes seconds: commands import it once they know that they will train.
"""

import concurrent.futures
import functools
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, cli
from gptjax import platform
from gptjax.array_types import Params
from gptjax.data.objectives import loss_unit
from gptjax.data.pipeline import empty_batch, eval_batches, target_bytes, train_batches
from gptjax.distributed.processes import data_share, is_first, make_vote, to_global, to_host
from gptjax.distributed.sharding import batch_sharding, path_of, tree_shardings
from gptjax.evaluation import perplexity
from gptjax.finetuning import lora, preference
from gptjax.finetuning.start import start_from
from gptjax.models import Model, make_model
from gptjax.models.config import DTYPES
from gptjax.training import loop
from gptjax.training.lockstep import Axis
from gptjax.training.metrics import MetricsWriter
from gptjax.training.profile import top_operations
from gptjax.training.state import TrainState
from gptjax.training.step import make_eval_step, make_train_step
from gptjax.training.throughput import flops_per_token, peak_flops
from gptjax.workdir import write_description


class Parts(NamedTuple):
    """What a run, or several that differ only in numbers, is made of.

    Attributes:
      model: of all runs.
      loss: None for cross entropy.
      settings: of the training step.
      init: as `build.initial_state` gives it.
      numbers: its arguments, of all runs.
      state: shapes, dtypes and shardings of one run's.
      lies: how those of all runs lie.
    """

    model: Model
    loss: Any
    settings: Any
    init: Callable[..., TrainState]
    numbers: tuple[Any, ...]
    state: TrainState
    lies: TrainState


class Programs(NamedTuple):
    """Compiled: `step.make_train_step`'s and `make_eval_step`'s functions and `Parts.init`, of all runs."""

    train_step: Any
    eval_step: Any
    init: Any


def fit(
    mesh: Mesh,
    data: Any,
    configs: Sequence[ConfigDict],
    workdirs: Sequence[pathlib.Path],
    axis: Axis,
    *,
    keep: int | None = None,
    last: int | None = None,
    initial: Params | None = None,
    give_up: Callable[[int, Exception], None] | None = None,
) -> tuple[Model, Params, int]:
    """Trains one run, or several that differ only in numbers, on a mesh that is set, from where they are to the end.

    Args:
      data: as `build.prepare_data` gives it.
      axis: `lockstep.ALONE` or `TOGETHER`.
      keep: checkpoints, if not as many as the config says.
      last: checkpoints of later steps are dropped.
      initial: parameters to start from; None to draw them, or go on with the workdir's.
      give_up: as `loop.Functions` has it; None to raise what goes wrong.

    Returns:
      (the model, the parameters, of several runs [N, ...], and the number of the signal that stopped it or 0).
    """
    config = configs[0]
    batch_size, every = config.train.batch_size, config.train.accumulation_steps
    with cli.user_errors():
        parts = assemble(mesh, data, configs, axis, initial)
        share, num_shares = data_share(mesh, batch_size)
    if parts.loss is not None:
        nothing = {s: np.broadcast_to(np.float32(0), (rows, data.seq_len)) for s, rows in data.num_rows.items()}
        data = data._replace(columns={split: {"reference": zeros} for split, zeros in nothing.items()})
    rows = axis.lies(batch_sharding(mesh))
    programs = compile_programs(parts, data, configs, workdirs, axis, rows)
    state, checkpoints, records = restore(parts, programs, config, workdirs, axis, keep, last)
    first_step = int(np.ravel(state.step)[0])

    def put(batch: dict[str, Any]) -> dict[str, Any]:
        # Every process reads all of it, which counts the bytes of all targets, and keeps the rows of its devices.
        of_all = axis.stack([batch] * len(configs))
        return {name: jax.make_array_from_callback(x.shape, rows, x.__getitem__) for name, x in of_all.items()}

    if parts.loss is not None:
        options = platform.compiler_options(config.model.dtype)
        score = jax.jit(functools.partial(preference.target_log_probabilities, parts.model), compiler_options=options)
        with cli.user_errors():
            data = with_reference(
                data, workdirs[0], lambda batch: score(state.model_params, put(batch)), first_step, batch_size
            )
    with cli.user_errors():
        by_seed = {
            own.seed: train_batches(
                data,
                batch_size=batch_size,
                seed=own.seed,
                start_row=first_step * batch_size,
                cross_document=config.data.cross_document,
                process_index=share,
                process_count=num_shares,
            )
            for own in configs
        }

    def batches() -> Iterator[dict[str, Any]]:
        """Runs of one seed read the same rows."""
        try:
            while True:
                read = {seed: next(own) for seed, own in by_seed.items()}
                yield to_global(axis.stack([read[own.seed] for own in configs]), rows, num_shares)
        finally:
            for own in by_seed.values():
                own.close()

    micro_batch = jax.jit(axis.over(lambda batch: {name: x[::every] for name, x in batch.items()}), out_shardings=rows)

    def probe(state: Any, batch: Any) -> Any:
        return np.ravel(programs.eval_step(state.model_params, micro_batch(batch))["loss_sum"])

    def stop(run: int, error: Exception) -> None:
        raise error

    when = build.loop_settings(config)
    flops = flops_per_token(parts.model, parts.state.params, data.seq_len, parts.state.frozen)
    peak = peak_flops(DTYPES[config.model.dtype])
    writers = [MetricsWriter(workdir, last_step=first_step, writes=is_first()) for workdir in workdirs]
    logbooks = [
        loop.Logbook(when, *own, flops_per_token=flops, peak_flops=peak)
        for own in zip(checkpoints, writers, records, strict=True)
    ]
    trace_dir = workdirs[0] / "profile"
    bar = Progress(config.train.num_train_steps, first_step)
    functions = loop.Functions(
        train_step=programs.train_step,
        probe=probe,
        evaluate=lambda state: evaluate(config, data, programs.eval_step, state.eval_params, put),
        split=axis.split,
        progress=bar,
        give_up=give_up or stop,
        vote=make_vote(mesh),
    )
    try:
        state, stopped = loop.train(logbooks, functions, state, batches(), str(trace_dir))
    finally:
        bar.close()
        for writer in writers:
            writer.close()
    if is_first() and config.profile.steps and trace_dir.exists():
        print(top_operations(trace_dir, programs.train_step.as_text() or ""), file=sys.stderr)
    return parts.model, lora.merge(state.eval_params), stopped


def assemble(mesh: Mesh, data: Any, configs: Sequence[ConfigDict], axis: Axis, initial: Params | None) -> Parts:
    """What the configs describe, before anything is compiled; says which arrays of `initial` are taken, and which not.

    Raises:
      ValueError: sizes that do not fit, or a regex that finds no parameter.
    """
    config = configs[0]
    model = make_model(**build.model_sizes(config, build.vocab_size(config, data.tokenizer)))
    settings = build.step_settings(config)
    settings = settings._replace(use_dropout=any(build.step_settings(own).use_dropout for own in configs))
    taken: dict[str, Any] = {}
    if initial is not None:
        taken, new, left = start_from(model, initial)
        if is_first():
            said = [f"{len(taken)} arrays from {config.init.model}"]
            said += [f"{what} {', '.join(names)}" for what, names in (("new:", new), ("left out:", left)) if names]
            print("; ".join(said), file=sys.stderr)
    init = build.initial_state(config, model)
    numbers = [(np.uint32(own.seed), np.float32(own.init.scale), build.hyperparameters(own), taken) for own in configs]
    shapes = jax.eval_shape(init, *numbers[0])
    check_factors(config, shapes)
    lies = tree_shardings(shapes, mesh)
    state = jax.tree.map(lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), shapes, lies)
    of_all = axis.stack(numbers), state, jax.tree.map(axis.lies, lies)
    return Parts(model, build.loss(config), settings, init, *of_all)


def check_factors(config: ConfigDict, state: TrainState) -> None:
    """Refuses a regex that finds no parameter, and a run that trains none."""
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.model_params)]
    for pattern, _ in config.optimizer.factors:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"config.optimizer.factors: {pattern!r} finds none of the parameters {', '.join(paths)}")
    if not state.params:
        raise ValueError(f"config.optimizer.factors={config.optimizer.factors!r} freezes every parameter")


def compile_programs(
    parts: Parts,
    data: Any,
    configs: Sequence[ConfigDict],
    workdirs: Sequence[pathlib.Path],
    axis: Axis,
    rows: jax.sharding.Sharding,
) -> Programs:
    """Compiles for batches that lie as `rows` do; meanwhile writes the workdirs' descriptions and imports the rest."""
    config, options = configs[0], platform.compiler_options(configs[0].model.dtype)
    leading = np.shape(parts.numbers[0])

    def lying(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=sharding)

    def rows_of(num_rows: int) -> dict[str, Any]:
        return {name: lying(x, rows) for name, x in empty_batch(data, num_rows).items()}

    state = jax.tree.map(lying, parts.state, parts.lies)
    background = concurrent.futures.ThreadPoolExecutor()

    def compiled(function: Any, *arguments: Any, **how: Any) -> Any:
        """A future: compilation runs outside Python's lock, so the rest of the start goes on beside it."""
        return background.submit(jax.jit(axis.over(function), **how).lower(*arguments).compile)

    started = time.perf_counter()
    train_step = compiled(
        make_train_step(parts.model, parts.settings, parts.loss),
        state,
        rows_of(config.train.batch_size),
        donate_argnums=0,
        out_shardings=(parts.lies, None),
        compiler_options=options,
    )
    init = compiled(parts.init, *parts.numbers, out_shardings=parts.lies, donate_argnums=3)
    eval_step = compiled(
        make_eval_step(parts.model) if parts.loss is None else preference.make_eval_step(parts.model, parts.loss),
        state.eval_params,
        rows_of(config.train.batch_size // config.train.accumulation_steps),
        compiler_options=options,
    )
    if is_first():
        for own, workdir in zip(configs, workdirs, strict=True):
            write_description(workdir, own.to_dict(), parts.model, data.tokenizer)
    import_the_rest()
    programs = Programs(train_step.result(), eval_step.result(), init.result())
    if is_first():
        print(f"compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return programs


def import_the_rest() -> None:
    """Imports what the first step does not need, while it compiles."""
    import grain  # noqa: F401
    import tensorboardX  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401


def restore(
    parts: Parts,
    programs: Programs,
    config: ConfigDict,
    workdirs: Sequence[pathlib.Path],
    axis: Axis,
    keep: int | None,
    last: int | None,
) -> tuple[TrainState, list[Any], list[dict[str, Any]]]:
    """The state to go on from, with each run's checkpoints and record.

    That is the latest whole checkpoint of the workdirs, else the initial state.
    """
    from gptjax.training.checkpoints import Checkpoints  # imported by now, see `import_the_rest`

    checkpoints = [Checkpoints(workdir / "checkpoints", keep or config.checkpoint.keep) for workdir in workdirs]
    with cli.user_errors():
        restored = [found for own in checkpoints if (found := own.restore(parts.state, last)) is not None]
    if not restored:
        return programs.init(*parts.numbers), checkpoints, [{} for _ in workdirs]
    state = jax.device_put(axis.stack([found.state for found in restored]), parts.lies)
    # The config's numbers, not the checkpoint's: the same unless the user overrides them.
    state = state._replace(hyper=jax.device_put(parts.numbers[2], parts.lies.hyper))
    if is_first():
        print(f"resuming from step {int(np.ravel(state.step)[0])}", file=sys.stderr)
    return state, checkpoints, [found.record for found in restored]


class Progress:
    """A bar on the terminal, of the first process; nothing where there is no terminal."""

    def __init__(self, num_steps: int, first_step: int):
        disable = None if is_first() else True  # None: without a terminal
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=disable, dynamic_ncols=True)
        self.close = self._bar.close

    def __call__(self, step: int, lines: list[dict[str, float]]) -> None:
        """Shows a step, with the least loss and the throughput of all runs."""
        loss = min((line["train/loss"] for line in lines), default=np.nan)
        rate = sum(line["perf/tokens_per_second"] for line in lines)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)


def evaluate(config: ConfigDict, data: Any, eval_step: Any, params: Any, put: Any) -> list[dict[str, float]]:
    """What the validation split says of each model whose sums `eval_step` returns."""
    with cli.user_errors():
        batches = eval_batches(
            data,
            batch_size=config.train.batch_size // config.train.accumulation_steps,
            cross_document=config.data.cross_document,
            max_batches=config.eval.max_batches or None,
        )
        results = perplexity.evaluate(eval_step, params, batches, target_bytes(data), put)
    if loss_unit(config.data.objective) != "token":
        for result in results:
            del result["eval/perplexity"]  # there are no tokens to be perplexed by
    return results


def with_reference(data: Any, workdir: pathlib.Path, score: Any, step: int, batch_size: int) -> Any:
    """Adds to the rows what the model that training began with gives their targets: computed once, kept in the workdir.

    Raises:
      ValueError: training has begun, and the file is gone.
    """
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
