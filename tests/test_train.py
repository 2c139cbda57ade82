"""Whole runs through the command line: train, resume, stop, evaluate, generate; and what bad input gets."""

import json
import shutil
import signal
import subprocess
import time

import pytest

from tests.runs import (
    ROOT,
    assert_same_run,
    call,
    command,
    crash_suite,
    environment,
    losses,
    run,
    train_command,
    write_corpus,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def corpus(folder):
    return write_corpus(folder)


@pytest.fixture(scope="module")
def finished(folder, corpus):
    workdir = folder / "finished"
    result = run([*train_command(workdir, corpus), "--json", str(folder / "report.json")])
    assert result.returncode == 0, result.stderr
    assert (
        "validation loss" in result.stdout and "sample 1" in result.stdout and "experiments.generate" in result.stdout
    )
    return workdir


def test_a_run_learns_and_leaves_every_file(finished, folder):
    for name in (
        "config.json",
        "model.json",
        "environment.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.txt",
        "loss.png",
    ):
        assert (finished / name).stat().st_size > 0
    assert list((finished / "events").iterdir())
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 1
    names = {"train/loss", "train/tokens", "train/grad_norm", "train/learning_rate", "time/seconds", "perf/mfu"}
    names |= {"perf/tokens_per_second", "perf/flops", "perf/peak_memory_bytes"}
    assert names <= lines[0].keys()
    assert {"eval/loss", "eval/perplexity", "eval/bits_per_byte"} <= lines[-1].keys()
    report = json.loads((folder / "report.json").read_text())
    assert report["metrics"]["eval/loss"] == lines[-1]["eval/loss"]
    assert report["seeds"] == [0] and "jax" in report["versions"] and "cpu" in report["device"]
    best = json.loads((finished / "checkpoints/best.json").read_text())
    assert best["eval/loss"] == min(line["eval/loss"] for line in lines if "eval/loss" in line)
    assert (finished / "checkpoints" / str(best["step"]) / "manifest.json").exists()


def test_a_finished_run_says_so(finished, corpus):
    before = (finished / "metrics.jsonl").read_bytes()
    result = run(train_command(finished, corpus))
    assert result.returncode == 0 and "finished" in result.stdout
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_load_needs_no_config(finished, folder):
    import gptjax
    from gptjax import workdir

    bare = folder / "bare"
    bare.mkdir()
    for name in ("model.json", "tokenizer.json"):
        shutil.copy(finished / name, bare / name)
    shutil.copytree(finished / "checkpoints", bare / "checkpoints")
    model, params, tokenizer = gptjax.load(bare)
    assert workdir.read(bare).step == json.loads((bare / "checkpoints/best.json").read_text())["step"]
    logits = model.apply({"params": params}, tokenizer.encode("abc")[None])
    assert logits.shape == (1, 3, tokenizer.vocab_size)


def test_evaluate_and_generate(finished, folder):
    result = call(command("evaluate", "--model", str(finished), "--json", str(folder / "eval.json")))
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "eval.json").read_text())["metrics"]["eval/loss"] < 4
    generate = command("generate", "--model", str(finished), "--prompt", "abc", "--max_new_tokens", "50")
    first, again = call([*generate, "--seed", "3"]), call([*generate, "--seed", "3"])
    assert first.returncode == 0 and first.stdout.startswith("abc") and first.stdout == again.stdout
    assert call([*generate, "--seed", "4"]).stdout != first.stdout
    sampled = call([*generate, "--temperature", "0", "--stop", "zzzz"])
    looked_up, beam = (call([*generate, "--temperature", "0", *way]) for way in (["--lookup"], ["--num_beams", "2"]))
    assert looked_up.returncode == 0 and sampled.stdout.startswith(looked_up.stdout[:20]), looked_up.stderr
    assert beam.returncode == 0 and beam.stdout.startswith("abc"), beam.stderr


def test_generate_from_a_file_and_in_conversation(finished, folder):
    generate = command("generate", "--model", str(finished), "--temperature", "0", "--max_new_tokens", "5")
    (folder / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "de"}\n')
    out = folder / "texts.jsonl"
    result = call([*generate, "--prompts", str(folder / "prompts.jsonl"), "--output", str(out), "--num_samples", "2"])
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [("abc", 0), ("abc", 1), ("de", 0), ("de", 1)]
    assert call([*generate, "--prompt", "de"]).stdout == "de" + lines[2]["text"] + "\n"
    left = subprocess.Popen([*generate, "--prompt", "a"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    left.stdout.close()  # as `| head` does
    assert left.wait() == 1 and "BrokenPipe" not in left.stderr.read()
    refused = call([*generate, "--prompts", str(folder / "prompts.jsonl"), "--output", str(out)])
    assert refused.returncode == 2 and "exists" in refused.stderr
    (folder / "wrong.jsonl").write_text('{"prompt": "abc"}\n{"promt": "de"}\n')
    refused = call([*generate, "--prompts", str(folder / "wrong.jsonl")])
    assert refused.returncode == 2 and "wrong.jsonl, line 2" in refused.stderr and not refused.stdout
    said = subprocess.run([*generate, "--interactive"], input="a\n\n/reset\na\n", capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.splitlines()[:1], said.stdout.splitlines()[-1:]
    assert first == second


def test_killed_runs_equal_the_uninterrupted_one(finished, folder, corpus):
    counts = crash_suite(folder, corpus, finished, kills=2)
    assert counts["compared"] >= 1


def test_control_c_saves_and_the_run_goes_on(finished, folder, corpus):
    """As SIGTERM does, with which every run of tests/faults is stopped."""
    workdir = folder / "control-c"
    process = subprocess.Popen(
        train_command(workdir, corpus),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    while not (workdir / "metrics.jsonl").exists() or len((workdir / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "to go on" in stderr.splitlines()[-1]
    stopped_at = losses(workdir)[-1][0]
    assert stopped_at < 120
    assert (workdir / "checkpoints" / str(stopped_at) / "manifest.json").exists()
    assert run(train_command(workdir, corpus)).returncode == 0
    assert [line for line in losses(finished) if line[4] is None] == [
        line for line in losses(workdir) if line[4] is None
    ]


def test_a_time_budget_stops_with_the_state_saved(finished, folder, corpus):
    workdir = folder / "budget"
    result = run(train_command(workdir, corpus, train__max_minutes=0.0001))
    assert result.returncode == 143 and "to go on" in result.stderr.splitlines()[-1]
    assert run(train_command(workdir, corpus)).returncode == 0
    assert_same_run(finished, workdir)


def test_divergence_stops_and_keeps_only_good_states(folder, corpus):
    workdir = folder / "diverged"
    wild = {"optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0, "checkpoint__every_steps": 1}
    result = run(train_command(workdir, corpus, **wild))
    assert result.returncode == 3, result.stderr
    last = result.stderr.splitlines()[-1]
    assert "diverged: the loss after step 1 is nan; nothing was saved yet" in last
    assert "Traceback" not in result.stderr
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
    assert not list((workdir / "checkpoints").glob("*/manifest.json"))


def test_divergence_names_the_last_good_checkpoint(folder, corpus):
    workdir = folder / "diverged-later"
    assert run(train_command(workdir, corpus, train__max_minutes=0.0001)).returncode == 143
    good = losses(workdir)[-1][0]
    result = run([*train_command(workdir, corpus, optimizer__learning_rate=1e30), "--override_config"])
    assert result.returncode == 3, result.stderr
    assert f"the last good checkpoint is step {good} in" in result.stderr.splitlines()[-1]
    assert [p.parent.name for p in (workdir / "checkpoints").glob("*/manifest.json")] == [str(good)]
    resumed = run([*train_command(workdir, corpus), "--override_config"])
    assert resumed.returncode == 0, resumed.stderr


def bad_cases(folder, corpus):
    latin = folder / "latin.txt"
    latin.write_bytes(b"fine text, then \xe9 alone")
    short = folder / "short.txt"
    short.write_text("ab")
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    return {
        "unknown field": ({"model__num_layer": 3}, "did you mean config.model.num_layers"),
        "wrong type": ({"model__num_layers": "many"}, "is not an integer"),
        "heads": ({"model__num_heads": 3}, "not divisible by config.model.num_heads=3"),
        "accumulation": ({"train__accumulation_steps": 3}, "not divisible"),
        "devices": ({"mesh__data": 3}, "the product must be the number of devices"),
        "platform": ({"mesh__platform": "tpu"}, "found only cpu"),
        "missing corpus": ({"data__files": "/nonexistent"}, "data.files"),
        "empty corpus": ({"data__files": empty}, "data.files"),
        "not UTF-8": ({"data__files": latin}, "latin.txt"),
        "short corpus": ({"data__files": short}, "row"),
        "unknown tokenizer": ({"data__tokenizer": "bytes"}, "data.tokenizer"),
        "unknown corpus": ({"data__corpus": "web"}, "data.corpus"),
        "no config": (None, "no such file"),
    }


@pytest.mark.parametrize("case", range(13))
def test_bad_input_is_one_line_and_writes_nothing(folder, corpus, case):
    changes, words = list(bad_cases(folder, corpus).values())[case]
    workdir = folder / f"bad-{case}"
    if changes is None:
        arguments = command("train", "--config", "configs/nothing.py", "--workdir", str(workdir))
    else:
        arguments = train_command(workdir, corpus, **changes)
    result = call(arguments)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not workdir.exists()


def test_another_config_in_a_workdir_is_refused_and_can_be_overridden(finished, folder, corpus):
    result = call(train_command(finished, corpus, optimizer__learning_rate=0.5))
    assert result.returncode == 2
    assert "config.optimizer.learning_rate was 0.001, is 0.5" in result.stderr and "--override_config" in result.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("generate", ["--prompt", "abc " * 50], "the prompt has 201 tokens"),
        ("generate", ["--prompt", "a", "--temperature", "-1"], "temperature -1.0 must be at least 0"),
        ("generate", ["--prompt", "a", "--top_p", "0"], "top_p 0.0 must be above 0"),
        ("generate", ["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens 0"),
        ("generate", ["--prompt", "a", "--num_beams", "0"], "--num_beams 0 must be at least --num_samples, 1"),
        ("generate", ["--promt", "a"], "--promt"),
        ("generate", ["--prompt", "a", "--suffix", "b"], "no tokens for filling in the middle"),
        ("generate", ["--prompt", "a", "--suffix_first"], "--suffix_first goes with --suffix"),
        ("generate", ["--prompt", "a", "--interactive"], "only one of --prompt, --interactive"),
        ("generate", ["--prompt", "a", "--weights", "int2"], "weights 'int2' is not one of"),
        ("evaluate", ["--step", "7"], "holds no whole checkpoint of step 7"),
        ("evaluate", ["--batch_size", "0"], "--batch_size 0 must be at least 1"),
    ],
)
def test_bad_arguments_of_the_other_commands(finished, module, arguments, words):
    result = call(command(module, "--model", str(finished), *arguments))
    assert result.returncode == 2, result.stderr
    assert words in result.stderr and len(result.stderr.splitlines()) == 1


def test_no_such_model(folder):
    for module in ("evaluate", "generate"):
        result = call(command(module, "--model", str(folder / "nothing")))
        assert result.returncode == 2 and "no such model" in result.stderr


@pytest.mark.parametrize("module", ["train", "evaluate", "generate"])
def test_help_imports_nothing_heavy(module):
    probe = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('experiments.{module}', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'jax', 'flax', 'grain', 'orbax', 'tensorflow_datasets', 'tensorboardX'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [*command("train")[:1], "-c", probe], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    if module == "train":
        assert "optimizer.learning_rate=0.001" in result.stdout and "the peak" in result.stdout
