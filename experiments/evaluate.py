"""Evaluate a model: python -m experiments.evaluate --model M [--corpus text --files F] [--json FILE]

Loss, perplexity, accuracy and bits per byte over the validation split. Of a workdir: the one it was trained beside, or
another corpus's, with the objective it was trained for. Of a Hugging Face folder, a GGUF file or a hub name: that of
--corpus, in rows of --seq_len tokens, causal for a decoder and masked for an encoder.
"""

import json
import pathlib
from collections.abc import Sequence

from experiments import build, cli
from gptjax import platform


def main(argv: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir, a folder, a .gguf or a hub name")
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; the best, if not given")
    parser.add_argument(
        "--corpus", help="stdlib, text, jsonl, tsv or tfds:NAME; the one it was trained on, if not given"
    )
    parser.add_argument(
        "--files", default="", help="for text, jsonl and tsv: paths, folders and globs, comma-separated"
    )
    parser.add_argument("--text_field", help="for jsonl, tsv and tfds: the field of the text; else as in training")
    parser.add_argument("--target_field", help="of a model trained on pairs: the field of the target")
    parser.add_argument("--validation_fraction", type=float, help="of --corpus, to evaluate on; 0.1 if not given")
    parser.add_argument("--seq_len", type=int, help="tokens a row; else as in training, or at most 1024")
    parser.add_argument("--batch_size", type=int, default=16, help="rows a batch")
    arguments = parser.parse(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size {arguments.batch_size} must be at least 1")
    path = pathlib.Path(arguments.model)
    is_workdir = (path / "model.json").is_file()
    if not path.exists() and arguments.corpus is None:
        raise cli.UserError(
            f"no such model: {arguments.model!r} is no file or folder here, and a hub name needs --corpus"
        )
    if not is_workdir and arguments.corpus is None:
        raise cli.UserError(
            f"--model {arguments.model} was not trained here, as it has no model.json: --corpus is required"
        )

    import jax

    from gptjax.data.pipeline import eval_batches, prepare, target_bytes
    from gptjax.evaluation.perplexity import describe, evaluate
    from gptjax.loading import load
    from gptjax.models import BERT
    from gptjax.training.step import make_eval_step
    from gptjax.workdir import environment, read

    with cli.user_errors():
        if is_workdir:
            model, params, tokenizer, step = read(path, step=arguments.step)
            config = json.loads((path / "config.json").read_text())
            d, longest = config["data"], model.config.max_seq_len
        else:
            model, params, tokenizer = load(arguments.model, step=arguments.step)
            config = cli.load_config("configs/default.py").to_dict()
            d, step, longest = config["data"], 0, min(model.config.max_seq_len, 1024)
            if model.config.head not in ("language_model", "masked_lm"):
                raise cli.UserError(f"--model {arguments.model} has no language-model head but {model.config.head!r}")
            d["objective"] = "masked" if isinstance(model, BERT) else "causal"
        seq_len = longest if arguments.seq_len is None else arguments.seq_len
        if not 1 <= seq_len <= model.config.max_seq_len:
            raise cli.UserError(f"--seq_len {seq_len} must be from 1 to the context, {model.config.max_seq_len}")
        objective = build.objective(d)
        data = prepare(
            corpus=arguments.corpus or d["corpus"],
            files=arguments.files if arguments.corpus else arguments.files or d["files"],
            text_field=arguments.text_field or d["text_field"],
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
            validation_fraction=arguments.validation_fraction
            or (0.1 if arguments.corpus else d["validation_fraction"]),
            seq_len=seq_len,
            cache_dir=platform.cache_dir() / "data",
            objective=objective,
            target_field=(arguments.target_field or d["target_field"]) if objective.name == "seq2seq" else None,
        )
    batches = eval_batches(data, batch_size=arguments.batch_size, cross_document=d["cross_document"])
    options = platform.compiler_options(model.config.dtype)
    eval_step = jax.jit(make_eval_step(model), compiler_options=options)
    with cli.user_errors():
        results = evaluate(eval_step, params, batches, target_bytes(data), lambda batch: batch)
    print(f"step {step}: {describe(results)}, over {results['eval/tokens']:,.0f} targets")
    cli.write_report(arguments.json, environment(), [config["seed"]], results | {"step": step})
    return 0


if __name__ == "__main__":
    cli.run(main)
