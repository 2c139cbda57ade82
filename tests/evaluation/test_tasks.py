"""Tasks in files, from their fields to their metrics, with models whose answers are known."""

import gzip
import json

import jax
import numpy as np
import pytest

from experiments import cli, evaluate
from gptjax.data.objectives import special_tokens
from gptjax.data.tokenizers import build_tokenizer
from gptjax.evaluation import tasks
from gptjax.evaluation.likelihood import Request, log_likelihoods
from gptjax.evaluation.task_files import Task, read_task
from gptjax.evaluation.tasks import Settings, Subject, run_task
from gptjax.generation import engine
from gptjax.loading import Loaded
from gptjax.models import init_params, make_model

FACTS = {"config": {}, "generation_config": {}, "trained_here": True}


def subject(family="gpt", **changes):
    tokenizer = build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0)
    sizes = dict(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        embed_dim=16,
        mlp_dim=32,
        max_seq_len=64,
    )
    model = make_model(family, **sizes | changes)
    return Subject(Loaded(model, init_params(model, jax.random.key(1), 4.0), tokenizer), FACTS)


@pytest.fixture(scope="module")
def gpt():
    return subject()


def value(result, name):
    return result.metrics[name].value(result.metrics[name].rows)


def write(folder, name, examples):
    (folder / name).write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(folder / name)


def nats(subject, context, text):
    model, params, tokenizer = subject.loaded
    before = tokenizer.encode(context) if context else np.array([tokenizer.eos_id])
    return -float(log_likelihoods(model, params, [Request(before, tokenizer.encode(text))])[0].log_probs.sum())


def test_perplexity(gpt):
    texts = ["a short text", "another, größer", "x", ""]
    sources = ["one", "two", "one", "two"]
    task = Task("t", "perplexity", [{"text": t, "source": s} for t, s in zip(texts, sources, strict=True)])
    result = run_task(task, gpt)
    each = [nats(gpt, "", t) if t else 0.0 for t in texts]
    sizes = [len(t.encode()) for t in texts]
    assert value(result, "perplexity") == pytest.approx(np.exp(sum(each) / sum(sizes)), rel=1e-5)  # tokens are bytes
    assert value(result, "bits_per_byte") == pytest.approx(sum(each) / sum(sizes) / np.log(2), rel=1e-5)
    one = (each[0] + each[2]) / (sizes[0] + sizes[2]) / np.log(2)
    assert value(result, "bits_per_byte/one") == pytest.approx(one, rel=1e-5)
    assert [s["nats"] for s in result.samples] == pytest.approx(each, rel=1e-5)


def test_perplexity_of_a_long_text_slides(gpt):
    model, params, tokenizer = gpt.loaded
    text = "".join(chr(97 + i * i % 23) for i in range(150))
    ids = np.concatenate([[tokenizer.eos_id], tokenizer.encode(text)])
    apply = jax.jit(lambda x: jax.nn.log_softmax(model.apply({"params": params}, x[None])[0]))
    for stride in (64, 16, 1):
        known, end = 0.0, 64
        for target in range(1, 151):
            if target > end:
                end += stride
            begin = max(0, min(end, 150) - 64)
            row = np.zeros(64, np.int32)
            row[: target - begin] = ids[begin:target]
            known -= float(apply(row)[target - begin - 1, ids[target]])
        result = run_task(Task("t", "perplexity", [{"text": text}]), gpt, Settings(stride=stride))
        assert np.log(value(result, "perplexity")) == pytest.approx(known / 150, rel=1e-5)


def test_choice_and_last_word(gpt):
    examples = [
        {"context": "ab", "choices": ["cdefgh", "z", "yy"], "answer": 0},
        {"context": "one ", "choices": ["two", "three four"], "answer": "two"},
        {"context": "", "choices": ["x", "yz"], "answer": 1},
    ]
    result = run_task(Task("t", "choice", examples), gpt)
    joined = [("ab", " "), ("one", " "), ("", "")]
    plain, by_bytes = [], []
    for (context, space), example, sample in zip(joined, examples, result.samples, strict=True):
        logs = -np.array([nats(gpt, context, space + c) for c in example["choices"]])
        np.testing.assert_allclose(sample["log_likelihoods"], logs, rtol=1e-5)
        answer = 0 if example["answer"] == "two" else example["answer"]
        plain.append(logs.argmax() == answer)
        by_bytes.append((logs / [len(c) for c in example["choices"]]).argmax() == answer)
    assert value(result, "accuracy") == np.mean(plain) and value(result, "accuracy_by_bytes") == np.mean(by_bytes)

    model, params, tokenizer = gpt.loaded
    likeliest = engine.generate(model, params, [tokenizer.encode("ab")], max_new_tokens=1, eos_ids=[])[0]
    assert len(likeliest) == 1
    result = run_task(Task("t", "last_word", [{"text": "the cat"}, {"text": "a b "}]), gpt)
    mean = np.mean([nats(gpt, "the", " cat"), nats(gpt, "a", " b")])
    assert np.log(value(result, "perplexity")) == pytest.approx(mean, rel=1e-5)


def test_texts_that_are_cut_and_stopped(gpt, monkeypatch):
    written = []

    def generate(self, prompts, *, max_new_tokens, **rest):
        written.append([len(p) for p in prompts])
        return [gpt.loaded.tokenizer.encode("yes. no")] * len(prompts)

    monkeypatch.setattr(tasks.Engine, "generate", generate)
    examples = [{"prompt": "a", "answer": "yes", "stop": ["."]}, {"prompt": "b" * 90, "references": ["no", "yes. no"]}]
    result = run_task(Task("t", "generate", examples), gpt, Settings(metrics=("exact_match",), max_new_tokens=24))
    assert [s["output"] for s in result.samples] == ["yes", "yes. no"] and value(result, "exact_match") == 1
    assert written == [[40, 1]] and result.num_cut == 1


@pytest.mark.parametrize("family", ["gpt", "encoder_decoder"])
def test_searched_texts_are_those_of_each_prompt_alone(family, monkeypatch):
    of = subject(family, **({"num_encoder_layers": 1} if family == "encoder_decoder" else {}))
    monkeypatch.setattr(tasks, "_BEAM_ROWS", 2)
    prompts = ["abc", "a", "abcdefg"]
    task = Task("t", "generate", [{"prompt": prompt, "answer": "x"} for prompt in prompts])
    settings = Settings(metrics=("chrf",), max_new_tokens=5)
    model, params, tokenizer = of.loaded
    ids, sources = [tokenizer.encode(p) for p in prompts], None
    if family == "encoder_decoder":
        sources = [np.append(i, tokenizer.eos_id) for i in ids]
        ids = [np.array([tokenizer.eos_id])] * 3
    arguments = dict(max_new_tokens=5, eos_ids=[tokenizer.eos_id], sources=sources)
    greedy = engine.generate(model, params, ids, sampling=tasks.Sampling(temperature=0.0), **arguments)
    assert [s["output"] for s in run_task(task, of, settings).samples] == [tokenizer.decode(g) for g in greedy]
    searched = tasks.beam_search(tasks.Engine(model, params), ids, num_beams=3, **arguments)
    outputs = [s["output"] for s in run_task(task, of, settings._replace(num_beams=3)).samples]
    assert outputs == [tokenizer.decode(texts[0][0]) for texts in searched]


def test_thousand_prompts_in_eight_programs():
    """Of all lengths up to the context; everything that XLA compiles, and not the programs of the engine alone."""
    of, rng, names = subject(max_seq_len=400), np.random.default_rng(0), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: names.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    prompts = [{"prompt": "x" * int(n), "answer": "y"} for n in rng.integers(0, 390, 1000)]
    run_task(Task("t", "generate", prompts), of, Settings(metrics=("exact_match",), max_new_tokens=2))
    assert 1 < len(names) <= 8


def test_code(gpt, monkeypatch):
    bodies = [
        "\n    return a + b\n",
        "\n    return a + b\ndef other():\n    syntax error",  # what comes after the function is left out
        "\n    return a - b\n",
        "\n    import sys; sys.exit(0)\n",  # ends before its tests: no pass
        "\n    while True: pass\n",
        "\n    return (\n",
    ]
    monkeypatch.setattr(tasks, "_continue", lambda task, *_: ([[tasks.cut_at(b, tasks.CODE_ENDS) for b in bodies]], 0))
    monkeypatch.setattr(tasks.sandbox.run, "__defaults__", (tasks.sandbox.Limits(cpu_seconds=1, wall_seconds=3.0),))
    example = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}
    result = run_task(Task("t", "code", [example]), gpt, Settings(num_samples=6, temperature=1.0))
    assert [s["passed"] for s in result.samples] == [True, True, False, False, False, False]
    assert value(result, "pass@1") == pytest.approx(2 / 6) and result.metrics.keys() == {"pass@1"}
    assert "AssertionError" in result.samples[2]["printed"]


def test_middles_are_asked_for_in_both_orders(gpt, monkeypatch):
    example = {"prefix": "a = ", "suffix": "\nb", "middle": "1"}
    model, params, plain = gpt.loaded
    specials = special_tokens("fim")
    tokenizer = build_tokenizer("byte", documents=lambda: iter(()), vocab_size=0, special_tokens=specials)
    asked = []

    def generate(self, prompts, **rest):
        asked.append(tokenizer.decode(prompts[0], skip_special_tokens=False))
        return [plain.encode("1\n2" if "<|fim_suffix|>\nb" in asked[-1] and asked[-1].endswith("a = ") else "2")]

    monkeypatch.setattr(tasks.Engine, "generate", generate)
    result = run_task(Task("t", "infill", [example]), gpt, Settings())
    assert asked == ["a = "] * 2  # a model that knows no middles
    result = run_task(Task("t", "infill", [example]), Subject(Loaded(model, params, tokenizer), FACTS), Settings())
    assert asked[2:] == [
        "<|fim_prefix|>a = <|fim_suffix|>\nb<|fim_middle|>",
        "<|fim_prefix|><|fim_suffix|>\nb<|fim_middle|>a = ",
    ]
    assert result.samples == [example | {"prefix_first": "2", "suffix_first": "1"}]
    assert [value(result, f"exact_match_{order}_first") for order in ("prefix", "suffix")] == [0, 1]


def test_classes_and_numbers():
    for num_labels in (2, 3, 1):
        of = subject("bert", head="sequence_classification", num_labels=num_labels)
        texts = [f"text {i}{' longer' * (i % 2)}" for i in range(9)]
        labels = [i % num_labels for i in range(9)] if num_labels > 1 else [i / 3 for i in range(9)]
        result = run_task(
            Task("t", "classify", [{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)]), of
        )
        ids = [of.loaded.tokenizer.encode_with_specials(t).ids for t in texts]
        apply = jax.jit(lambda x, of=of: of.loaded.model.apply({"params": of.loaded.params}, x[None])[0])
        logits = np.array([apply(x) for x in ids])
        if num_labels == 1:
            known = np.corrcoef(logits[:, 0], labels)[0, 1]
            assert result.metrics.keys() == {"pearson", "spearman"} and value(result, "pearson") == pytest.approx(
                known, rel=1e-4
            )
            continue
        assert value(result, "accuracy") == np.mean(logits.argmax(1) == labels)
        assert ("f1" in result.metrics) == (num_labels == 2)
        sure = np.asarray(jax.nn.softmax(logits)).max(1)
        np.testing.assert_allclose(result.metrics["calibration_error"].rows[:, 0], sure, rtol=1e-4)


def test_spans():
    of = subject("bert", head="span")
    examples = [{"question": "q?", "context": "some text here", "answers": a} for a in (["some text here"], [])]
    result = run_task(Task("t", "span", examples), of)
    assert all(s["output"] in s["context"] for s in result.samples) and 0 <= value(result, "f1") <= 1


def test_formats(tmp_path):
    lines = [{"text": "a"}, {"text": "b"}]
    assert read_task(write(tmp_path, "a.jsonl", lines)).kind == "perplexity"
    assert read_task(f"last_word:{write(tmp_path, 'a.jsonl', lines)}").kind == "last_word"
    assert len(read_task(write(tmp_path, "a.jsonl", lines), 1).examples) == 1
    for name, text in {"s.en": "one\ntwo\n", "s.de": "eins\nzwei\n"}.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    pair = read_task(f"{tmp_path / 's.en.gz'}+{tmp_path / 's.de.gz'}")
    assert pair.kind == "generate" and pair.examples[1] == {"prompt": "two", "references": ["zwei"]}
    (tmp_path / "c.tsv").write_text("good film\t1\nbad\t0\n")
    assert read_task(str(tmp_path / "c.tsv")).examples[0] == {"text": "good film", "label": "1"}
    (tmp_path / "t.txt").write_text("one\n\ntext")
    assert read_task(str(tmp_path / "t.txt")).examples == [{"text": "one\n\ntext"}]
    answers = [{"text": "Rome", "answer_start": 0}]
    squad = {"data": [{"paragraphs": [{"context": "Rome is", "qas": [{"question": "What?", "answers": answers}]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    task = read_task(str(tmp_path / "squad.json"))
    assert task.kind == "span" and task.examples == [{"question": "What?", "context": "Rome is", "answers": ["Rome"]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models as folders, and their files of tasks."""
    from gptjax.interop import huggingface

    folder = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("one", 1), ("two", 2)):
        model, _, tokenizer = subject().loaded
        huggingface.write(folder / name, model, init_params(model, jax.random.key(seed), 4.0), tokenizer)
    write(folder, "texts.jsonl", [{"text": f"some words {i * i}"} for i in range(6)])
    write(folder, "gen.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}])
    return folder


def run(*arguments):
    return cli.exit_code(lambda: evaluate.main([str(a) for a in arguments]))


def test_command(folders, capsys):
    given = (
        "--tasks",
        f"{folders / 'texts.jsonl'},{folders / 'gen.jsonl'}",
        "--max_new_tokens",
        4,
        "--metrics",
        "bleu:char",
    )
    out, report = folders / "out", folders / "r.json"
    model = ("--model", folders / "one", "--compare", folders / "two")
    assert run(*model, *given, "--output_dir", out, "--json", report) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "95 % interval" in printed and "tok:char" in printed and "difference" in printed
    metrics = json.loads(report.read_text())["metrics"]
    texts = str(folders / "texts.jsonl")
    low, middle, high = (metrics[f"{texts}/perplexity{x}"] for x in ("/low", "", "/high"))
    assert low < middle < high and 0 < metrics[f"{texts}/perplexity/p_value"] <= 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16 and {"model", "task", "nats", "text"} == samples[0].keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "nothing"], "unknown task 'nothing'"),
        (["--tasks", "gen.jsonl", "--metrics", "blue"], "metric 'blue' is not one of"),
        (["--tasks", "gen.jsonl", "--metrics", "bleu:french"], "tokenizer 'french'"),
        (["--tasks", "none.jsonl"], "example 0 has no references"),
        (["--tasks", "unequal"], "2 sources for 1 references"),
        (["--tasks", "choice.jsonl"], "example 0: answer 2 is to be one of its 2 choices"),
        (
            ["--tasks", "span.jsonl"],
            "needs a model with model.head 'span'; this is a GPT with model.head 'language_model'",
        ),
        (["--tasks", "odd.jsonl"], "which no kind of task has"),
        (["--tasks", "lacks.jsonl"], "example 1 lacks fields of kind 'perplexity': text"),
        (["--tasks", "broken.jsonl"], "is neither JSON lines nor SQuAD's JSON"),
        (["--tasks", "empty.jsonl"], "has no examples"),
        (["--tasks", "texts.jsonl", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "texts.jsonl", "--stride", "99"], "stride 99 must be from 1 to 64"),
        (["--tasks", "texts.jsonl", "--corpus", "text"], "--corpus is not for --tasks"),
        (["--corpus", "text", "--limit", "3"], "--limit is only for --tasks"),
        (["--tasks", "gen.jsonl", "--num_samples", "3"], "needs a --temperature above 0"),
        (["--tasks", "gen.jsonl", "--num_beams", "3", "--temperature", "1"], "--num_beams looks for the likeliest"),
        (["--tasks", "last_word:word.jsonl"], "example 0 has no word before the last"),
    ],
)
def test_bad_input(folders, capsys, arguments, words):
    write(folders, "none.jsonl", [{"prompt": "a", "references": []}])
    write(folders, "choice.jsonl", [{"context": "a", "choices": ["b", "c"], "answer": 2}])
    write(folders, "span.jsonl", [{"question": "a", "context": "b", "answers": ["b"]}])
    write(folders, "odd.jsonl", [{"a": 1}])
    write(folders, "lacks.jsonl", [{"text": "a"}, {"prompt": "a"}])
    write(folders, "word.jsonl", [{"text": "word"}])
    (folders / "broken.jsonl").write_text('{"text": \n')
    (folders / "empty.jsonl").write_text("")
    (folders / "two.en").write_text("a\nb\n")
    (folders / "one.de").write_text("a\n")
    if "unequal" in arguments:
        arguments = ["--tasks", f"{folders / 'two.en'}+{folders / 'one.de'}"]
    for i, a in enumerate(arguments):
        kind, _, name = a.rpartition(":")
        if name.endswith("jsonl"):
            arguments = [*arguments[:i], (f"{kind}:" if kind else "") + str(folders / name), *arguments[i + 1 :]]
    assert run("--model", folders / "one", *arguments) == 2
    printed = capsys.readouterr().err
    assert words in printed and len(printed.splitlines()) == 1


def test_labels_out_of_range():
    of = subject("bert", head="sequence_classification", num_labels=2)
    with pytest.raises(ValueError, match="example 0: label 2 is not one of the model's 2: 0 to 1, or LABEL_0, LABEL_1"):
        run_task(Task("t", "classify", [{"text": "a", "label": 2}]), of)
