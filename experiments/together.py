"""Runs of a sweep that differ only in numbers, trained in one program: `experiments.sweep --launcher vmap`."""

import pathlib
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from experiments import build, cli
from experiments.train import check_workdir, write_results


def check(configs: Sequence[Any]) -> None:
    """Refuses runs that cannot be one program.

    Raises:
      UserError: names the field.
    """
    from gptjax.training.optimizers import Hyperparameters

    numbers = {f"optimizer.{name}" for name in Hyperparameters._fields} | {"seed", "init.scale", "model.dropout"}
    flat = [cli.flatten(config) for config in configs]
    for name in flat[0]:
        if name not in numbers and any(fields[name] != flat[0][name] for fields in flat):
            raise cli.UserError(
                f"--launcher vmap: runs differ in config.{name}, which changes shapes or what is compiled; "
                "use --launcher local"
            )
    first = flat[0]
    wanted = {"init.model": "", "lora.rank": 0, "profile.steps": ""}
    for name, neutral in wanted.items():
        if first[name] != neutral:
            raise cli.UserError(f"--launcher vmap does not take config.{name}={first[name]!r}; use --launcher local")
    if first["data.objective"] == "dpo":
        raise cli.UserError("--launcher vmap does not take config.data.objective='dpo'; use --launcher local")


def train_together(named: dict[str, Any], folder: pathlib.Path) -> tuple[dict[str, str], int]:
    """Trains runs {name: config}, each into its own folder, from where it is: their outcomes, and a signal or 0."""
    import jax
    import jax.numpy as jnp

    from gptjax import platform
    from gptjax.data.pipeline import eval_batches, target_bytes, train_batches
    from gptjax.distributed.sharding import tree_shardings
    from gptjax.evaluation.perplexity import evaluate
    from gptjax.models import make_model
    from gptjax.models.config import DTYPES
    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.lockstep import Lockstep, Row
    from gptjax.training.loop import Diverged, Functions, Loop, StopSignals
    from gptjax.training.metrics import MetricsWriter
    from gptjax.training.step import make_eval_step, make_train_step
    from gptjax.training.throughput import flops_per_token, peak_flops
    from gptjax.workdir import write_description

    configs = list(named.values())
    first, every = configs[0], configs[0].train.accumulation_steps
    with cli.user_errors():
        mesh = build.mesh(first)
        if mesh.size > 1:
            raise cli.UserError(f"--launcher vmap takes one device, and there are {mesh.size}; use --launcher local")
        for name, config in named.items():
            check_workdir(config, folder / name, override=False)
        data = build.prepare_data(first)

    class Saver(Checkpoints):
        """Saves a row as the state that it is."""

        def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
            with saving:
                super().save(step, state.get(), record)

    saving = threading.Lock()
    with jax.set_mesh(mesh):
        model = make_model(**build.model_sizes(first, build.vocab_size(first, data.tokenizer)))
        settings = build.step_settings(first)._replace(use_dropout=any(c.model.dropout > 0 for c in configs))
        init = jax.jit(build.initial_state(first, model))
        options = platform.compiler_options(first.model.dtype)
        checkpoints, states, records = [], [], []
        for name, config in named.items():
            own = make_model(**build.model_sizes(config, build.vocab_size(config, data.tokenizer)))
            write_description(folder / name, config.to_dict(), own, data.tokenizer)
            hyper = build.hyperparameters(config)
            numbers: Any = (jnp.uint32(config.seed), jnp.float32(config.init.scale), hyper, {})
            shapes = jax.eval_shape(init, *numbers)
            abstract = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                shapes,
                tree_shardings(shapes, mesh),
            )
            checkpoints.append(Saver(folder / name / "checkpoints", config.checkpoint.keep))
            with cli.user_errors():
                restored = checkpoints[-1].restore(abstract)
            state, record = restored if restored is not None else (init(*numbers), {})
            states.append(state._replace(hyper=jax.tree.map(jnp.asarray, hyper)))
            records.append(record)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
        step = jax.jit(jax.vmap(make_train_step(model, settings)), donate_argnums=0, compiler_options=options)
        lockstep = Lockstep(step, stacked, len(configs))
        eval_step = jax.jit(make_eval_step(model), compiler_options=options)

    def run_evaluation(row: Row) -> dict[str, float]:
        batches = eval_batches(
            data,
            batch_size=first.train.batch_size // every,
            cross_document=first.data.cross_document,
            max_batches=first.eval.max_batches or None,
        )
        results = evaluate(eval_step, row.get().eval_params, batches, target_bytes(data), lambda batch: batch)
        if first.data.objective in ("classification", "question_answering"):
            del results["eval/perplexity"]
        return results

    def probe(row: Row, batch: Any) -> float:
        micro = {name: x[::every] for name, x in batch.items()}
        return float(eval_step(row.get().model_params, micro)["loss_sum"])

    outcomes: dict[str, str] = {}
    finished: dict[str, Any] = {}

    def train_one(index: int, name: str, config: Any, stop: StopSignals) -> None:
        workdir, start = folder / name, int(states[index].step)
        writer = MetricsWriter(workdir, last_step=start)
        functions: Any = Functions(
            lockstep.train_step,  # type: ignore[arg-type]
            probe,  # type: ignore[arg-type]
            run_evaluation,  # type: ignore[arg-type]
            lambda step, line: None,
            lambda wish, loss: wish or bool(stop.received),
        )
        loop = Loop(
            functions,
            build.loop_settings(config),
            checkpoints[index],
            writer,
            flops_per_token=flops_per_token(model, shapes.params, data.seq_len, shapes.frozen),
            peak_flops=peak_flops(DTYPES[config.model.dtype]),
            trace_dir=str(workdir / "profile"),
        )
        batches: Any = train_batches(
            data,
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_row=start * config.train.batch_size,
            cross_document=config.data.cross_document,
        )
        row: Any = Row(lockstep, index)
        try:
            with jax.set_mesh(mesh):
                _, stopped = loop.run(row, batches, records[index])
                outcomes[name] = "stopped" if stopped else "finished"
                if not stopped:
                    finished[name] = row.get().eval_params
        except Diverged as error:
            outcomes[name] = "diverged"
            print(f"{name}: diverged: {error}", file=sys.stderr)
        except Exception:
            outcomes[name] = "crashed"
            traceback.print_exc()
        finally:
            lockstep.leave(index)
            writer.close()

    with StopSignals() as signals:
        threads = [
            threading.Thread(target=train_one, args=(index, name, config, signals), daemon=True)
            for index, (name, config) in enumerate(named.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # so that signals come through
    with jax.set_mesh(mesh):
        for name, params in finished.items():
            write_results(named[name], folder / name, model, params, data)
    return outcomes, signals.received
