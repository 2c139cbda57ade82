"""Evaluate a trained model: python -m experiments.evaluate --model WORKDIR [--corpus text --files F] [--json FILE]

Loss, perplexity and bits per byte over the validation split it was trained beside, or over another corpus.
"""

import json
import pathlib
from collections.abc import Sequence

from experiments import cli
from gptjax import platform


def main(argv: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir")
    parser.add_argument("--step", type=int, help="which checkpoint; the best, if not given")
    parser.add_argument("--corpus", help="stdlib, text, jsonl or tfds:NAME; the one it was trained on, if not given")
    parser.add_argument("--files", default="", help="for text and jsonl: paths, folders and globs, comma-separated")
    parser.add_argument("--text_field", default="text", help="for jsonl and tfds: the field that holds the text")
    parser.add_argument("--validation_fraction", type=float, help="of --corpus, to evaluate on; 0.1 if not given")
    parser.add_argument("--batch_size", type=int, default=16, help="rows a batch")
    arguments = parser.parse(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size {arguments.batch_size} must be at least 1")
    workdir = pathlib.Path(arguments.model)
    if not (workdir / "model.json").exists():
        raise cli.UserError(f"no such model: {arguments.model!r} is not a workdir, it has no model.json")

    import jax

    from gptjax.data.pipeline import eval_batches, prepare
    from gptjax.evaluation.perplexity import evaluate
    from gptjax.training.step import make_eval_step
    from gptjax.workdir import environment, load

    with cli.user_errors():
        loaded = load(workdir, step=arguments.step)
        config = json.loads((workdir / "config.json").read_text())
        d = config["data"]
        data = prepare(
            corpus=arguments.corpus or d["corpus"],
            files=arguments.files if arguments.corpus else arguments.files or d["files"],
            text_field=arguments.text_field if arguments.corpus else d["text_field"],
            tokenizer=str(workdir / "tokenizer.json"),
            vocab_size=loaded.tokenizer.vocab_size,
            validation_fraction=arguments.validation_fraction
            or (0.1 if arguments.corpus else d["validation_fraction"]),
            seq_len=loaded.model.config.max_seq_len,
            cache_dir=platform.cache_dir() / "data",
        )
    batches = eval_batches(data, batch_size=arguments.batch_size, cross_document=d["cross_document"])
    options = platform.compiler_options(loaded.model.config.dtype)
    eval_step = jax.jit(make_eval_step(loaded.model), compiler_options=options)
    results = evaluate(eval_step, loaded.params, batches, data.tokenizer.token_bytes, lambda batch: batch)
    print(
        f"step {loaded.step}: loss {results['eval/loss']:.4f} nats a token, perplexity {results['eval/perplexity']:.2f}, "
        f"{results['eval/bits_per_byte']:.4f} bits a byte, over {data.num_tokens['validation']:,} tokens"
    )
    metrics = results | {"step": loaded.step, "eval/tokens": data.num_tokens["validation"]}
    cli.write_report(arguments.json, environment(), [config["seed"]], metrics)
    return 0


if __name__ == "__main__":
    cli.run(main)
