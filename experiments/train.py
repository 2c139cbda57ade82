"""Train a model: python -m experiments.train --config configs/NAME.py --workdir DIR [--config.section.field=value ...]

Typed again, it continues where it stopped, after whatever stopped it, or says that the run is finished.
"""

import concurrent.futures
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

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
)


def main(argv: Sequence[str]) -> int:
    """Trains, or resumes; returns the exit code."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--workdir", help="the run's folder, made if it does not exist (required)")
    parser.add_argument("--override_config", action="store_true", help="go on with a run of another config")
    arguments = parser.parse(argv)
    if arguments.workdir is None:
        parser.error("--workdir DIR is required")
    config, workdir = arguments.config, pathlib.Path(arguments.workdir).absolute()
    build.check(config)
    check_workdir(config, workdir, override=arguments.override_config)
    if is_finished(config, workdir):
        print("this run is finished; --workdir another folder to start a new one")
    else:
        code = train(config, workdir)
        if code:
            print(f"stopped with the state saved; to go on, type the same command again: {_command()}", file=sys.stderr)
            return 128 + code
    final = read_metrics(workdir / "metrics.jsonl")[-1]
    summarize(workdir, final)
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
    new = cli.flatten(config)
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
    with cli.user_errors():
        mesh = build.mesh(config)
        data = build.prepare_data(config)

    import jax

    from gptjax.data.pipeline import eval_batches, train_batches
    from gptjax.distributed.sharding import batch_sharding, tree_shardings
    from gptjax.evaluation.perplexity import evaluate
    from gptjax.models import make_model
    from gptjax.models.transformer import DTYPES
    from gptjax.training.loop import Diverged, Functions, Loop, device_batches
    from gptjax.training.state import init_state
    from gptjax.training.step import make_eval_step, make_train_step
    from gptjax.training.throughput import flops_per_token, peak_flops
    from gptjax.workdir import write_description

    with cli.user_errors():
        model = make_model(**build.model_sizes(config, data.tokenizer.vocab_size))
        hyper = build.hyperparameters(config)
        settings = build.step_settings(config)

        def init(seed: Any, scale: Any, hyper: Any) -> Any:
            return init_state(model, settings.optimizer, hyper, seed, scale, ema=settings.ema_decay > 0)

        numbers = (jax.numpy.uint32(config.seed), jax.numpy.float32(config.init.scale), hyper)
        shapes = jax.eval_shape(init, *numbers)
        shardings = tree_shardings(shapes, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    write_description(workdir, config.to_dict(), model, data.tokenizer)

    rows = batch_sharding(mesh)
    abstract_state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )

    def abstract_batch(num_rows: int) -> dict[str, Any]:
        shape = (num_rows, config.model.max_seq_len)
        dtypes = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), "int32") | {"loss_weights": "float32"}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}

    # Compilation runs outside Python's lock, so the rest of the start goes on beside it.
    background = concurrent.futures.ThreadPoolExecutor()
    imports = background.submit(import_the_rest)
    init_fn = background.submit(lambda: jax.jit(init, out_shardings=shardings).lower(*numbers).compile())
    started = time.perf_counter()
    options = platform.compiler_options(config.model.dtype)
    step_fn = jax.jit(
        make_train_step(model, settings), donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )
    train_step = step_fn.lower(abstract_state, abstract_batch(config.train.batch_size)).compile()
    print(f"compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    imports.result()

    from gptjax.training.checkpoints import Checkpoints
    from gptjax.training.metrics import MetricsWriter

    # Resume order: 1. the latest whole checkpoint of this workdir; 2. the initial state.
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    with cli.user_errors():
        restored = checkpoints.restore(abstract_state)
    if restored is not None:
        state, record = restored
        print(f"resuming from step {int(state.step)}", file=sys.stderr)
        # The config's numbers, not the checkpoint's: the same unless the user overrides them.
        state = state._replace(hyper=jax.device_put(hyper, shardings.hyper))
    else:
        state, record = init_fn.result()(*numbers), {}
    first_step = int(state.step)

    micro_rows = config.train.batch_size // config.train.accumulation_steps
    eval_step = jax.jit(make_eval_step(model), compiler_options=options)

    def put(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: jax.make_array_from_process_local_data(rows, x) for name, x in batch.items()}

    def probe(params: Any, batch: Any) -> float:
        part = {name: jax.device_put(x[:micro_rows], rows) for name, x in batch.items()}
        return float(eval_step(params, part)["loss_sum"])

    def run_evaluation(params: Any) -> dict[str, float]:
        batches = eval_batches(
            data,
            batch_size=micro_rows,
            cross_document=config.data.cross_document,
            max_batches=config.eval.max_batches or None,
        )
        return evaluate(eval_step, params, batches, data.tokenizer.token_bytes, put)

    bar = tqdm(total=config.train.num_train_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)

    def progress(step: int, line: dict[str, float]) -> None:
        bar.set_postfix_str(
            f"loss {line['train/loss']:.3f}, {line['perf/tokens_per_second']:,.0f} tokens/s", refresh=False
        )
        bar.update(step - bar.n)

    writer = MetricsWriter(workdir, last_step=first_step)
    loop = Loop(
        Functions(train_step, probe, run_evaluation, progress),
        build.loop_settings(config),
        checkpoints,
        writer,
        flops_per_token=flops_per_token(model, shapes.params),
        peak_flops=peak_flops(DTYPES[config.model.dtype]),
        trace_dir=str(workdir / "profile"),
    )
    batches = device_batches(
        train_batches(
            data,
            batch_size=config.train.batch_size,
            seed=config.seed,
            start_row=first_step * config.train.batch_size,
            cross_document=config.data.cross_document,
        ),
        rows,
    )
    try:
        state, stopped = loop.run(state, batches, record)
    except Diverged as error:
        bar.close()
        steps = checkpoints.steps()
        good = (
            f"the last good checkpoint is step {steps[-1]} in {checkpoints.path}" if steps else "nothing was saved yet"
        )
        print(f"diverged: {error}; {good}; a lower --config.optimizer.learning_rate may help", file=sys.stderr)
        sys.exit(cli.DIVERGED)
    finally:
        bar.close()
        writer.close()
    if stopped:
        return stopped
    write_samples(config, workdir, model, state.params if state.ema is None else state.ema, data.tokenizer)
    from gptjax.analysis.plots import plot_losses

    plot_losses(read_metrics(workdir / "metrics.jsonl"), workdir / "loss.png")
    return 0


def write_samples(config: ConfigDict, workdir: pathlib.Path, model: Any, params: Any, tokenizer: Any) -> None:
    """Writes texts of the trained model to samples.txt."""
    import numpy as np

    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling

    e = config.eval
    texts = []
    if e.num_samples:
        prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(e.sample_prompt)])[-config.model.max_seq_len :]
        sampling = Sampling(temperature=0.8, top_k=50)
        new = generate(
            model,
            params,
            prompt,
            max_new_tokens=e.sample_tokens,
            eos_id=tokenizer.eos_id,
            sampling=sampling,
            num_samples=e.num_samples,
            seed=config.seed,
        )
        texts = [e.sample_prompt + tokenizer.decode(ids) for ids in new]
    (workdir / "samples.txt").write_text("".join(f"--- sample {i + 1} ---\n{text}\n" for i, text in enumerate(texts)))


def summarize(workdir: pathlib.Path, final: dict[str, Any]) -> None:
    """Prints the result, the samples, where the files are, and what to type next."""
    print((workdir / "samples.txt").read_text())
    print(
        f"step {final['step']}: validation loss {final['eval/loss']:.4f} nats a token, perplexity "
        f"{final['eval/perplexity']:.2f}, {final['eval/bits_per_byte']:.4f} bits a byte; "
        f"{final['train/tokens']:,} tokens in {final['time/seconds']:.0f} s"
    )
    print(f"files: {workdir} (loss.png, samples.txt, metrics.jsonl, checkpoints; tensorboard --logdir {workdir})")
    print(f"next:  python -m experiments.generate --model {workdir} --prompt 'def '")
    print(f"       python -m experiments.evaluate --model {workdir}")


def _command() -> str:
    import shlex

    return shlex.join(sys.orig_argv)


if __name__ == "__main__":
    cli.run(main)
