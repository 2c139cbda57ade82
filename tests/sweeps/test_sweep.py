"""Sweeps: checked before anything starts, each run as if alone, and nothing lost when they are killed."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import cli, hyper
from experiments.sweep import SweepFile, main
from tests.runs import ROOT, TINY, assert_same_run, call, command, environment, losses, run, train_command, write_corpus

SHORT = {"train.num_train_steps": 24, "eval.every_steps": 12, "model.num_layers": 1, "checkpoint.every_steps": 6}
TWO_BY_TWO = """
def get_hyper(h):
    return h.product([h.sweep("config.optimizer.learning_rate", [1e-3, 3e-3]), h.sweep("config.seed", [0, 1])])
"""


def sweep_command(folder, text, *flags, **changes):
    (folder / "sweep.py").write_text(text)
    fields = TINY | SHORT | {"data.files": folder / "corpus.txt"} | changes
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    flags = ("--sweep", str(folder / "sweep.py"), "--sweepdir", str(folder / "runs"), *flags)
    return command("sweep", "--config", "configs/default.py", *flags, *overrides)


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path)
    return tmp_path


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_killed_sweep_goes_on_and_its_runs_are_as_if_alone(folder):
    """SIGKILL while the second of four runs; finished runs stay untouched, and orphans do not go on."""
    arguments = sweep_command(folder, TWO_BY_TWO, "--parallel", "2")
    process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "finished" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    done = {path for path in (folder / "runs").iterdir() if (path / "loss.png").exists()}
    assert 1 <= len(done) < 4
    before = {path: contents(path) for path in done}
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert all(contents(path) == before[path] for path in done)
    names = [line.split()[0] for line in result.stdout.splitlines()[1:5]]
    assert sorted(names) == sorted(f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.003) for seed in (0, 1))
    alone = folder / "alone"
    changes = {name.replace(".", "__"): value for name, value in SHORT.items()}
    assert (
        run(train_command(alone, folder / "corpus.txt", seed=1, optimizer__learning_rate=0.003, **changes)).returncode
        == 0
    )
    assert_same_run(alone, folder / "runs" / "learning_rate=0.003,seed=1", least=20)
    again = run(arguments)
    assert again.returncode == 0 and again.stdout == result.stdout and again.stderr.count("finished before") == 4


def test_a_run_that_fails_takes_no_other_with_it(folder):
    """One crashes each time, one diverges, one is well."""
    text = 'def get_hyper(h):\n    return h.sweep("config.optimizer.learning_rate", [1e-3, 1e30, 2e-3])\n'
    workdir = folder / "runs" / "learning_rate=0.002"
    workdir.mkdir(parents=True)
    (workdir / "checkpoints").write_text("a file where a folder must be")
    changes = {"optimizer.clip_norm": 0.0, "optimizer.schedule": "constant"}
    result = run(sweep_command(folder, text, "--retries", "1", **changes))
    outcomes = dict(re.findall(r"^learning_rate=(\S+)\s+(\S+)", result.stdout, re.MULTILINE))
    assert outcomes["0.001"] == "finished" and outcomes["1e+30"] == "diverged", result.stderr
    assert outcomes["0.002"] in ("crashed", "refused") and result.returncode == 1


def test_runs_trained_in_one_program_are_as_if_alone(folder):
    """Their first steps, and what they leave; stopped halfway they go on, by themselves too."""
    arguments = sweep_command(folder, TWO_BY_TWO, "--launcher", "vmap")
    process = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    last = folder / "runs" / "learning_rate=0.003,seed=1"
    while not (last / "checkpoints" / "6" / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 4
    again = run(arguments)
    assert again.returncode == 0 and again.stdout == result.stdout and again.stderr.count("finished before") == 4
    changes = {name.replace(".", "__"): value for name, value in SHORT.items()}
    for rate, seed in ((0.001, 0), (0.003, 1)):
        together = folder / "runs" / f"learning_rate={rate},seed={seed}"
        own = {"seed": seed, "optimizer__learning_rate": rate}
        solo = train_command(folder / f"alone{seed}", folder / "corpus.txt", **changes, **own)
        assert run(solo).returncode == 0
        ours, alone = losses(together)[:20], losses(folder / f"alone{seed}")[:20]
        np.testing.assert_allclose([row[1] for row in ours], [row[1] for row in alone], rtol=1e-5)
        assert [row[3] for row in ours] == [row[3] for row in alone]
        names = {path.name for path in together.iterdir()} - {"log.txt"}
        assert names == {path.name for path in (folder / f"alone{seed}").iterdir()}
    again = run(train_command(last, folder / "corpus.txt", **changes, seed=1, optimizer__learning_rate=0.003))
    assert again.returncode == 0 and "finished" in again.stdout


@pytest.mark.parametrize(
    ("runs", "flags", "words"),
    [
        ('h.sweep("config.model.num_layers", [1, 2])', [], "runs differ in config.model.num_layers"),
        ('h.sweep("config.seed", [1, 2])', ["--config.lora.rank=2"], "does not take config.lora.rank=2"),
        (
            'h.sweep("config.seed", [1, 2])',
            ["--config.data.objective=dpo"],
            "does not take config.data.objective='dpo'",
        ),
    ],
)
def test_what_cannot_be_one_program_is_refused(folder, runs, flags, words):
    result = call([*sweep_command(folder, f"def get_hyper(h):\n    return {runs}\n", "--launcher", "vmap"), *flags])
    assert result.returncode == 2 and words in result.stderr and "--launcher local" in result.stderr
    assert not (folder / "runs").exists()


def test_dry_run_prints_commands_and_writes_nothing(folder):
    result = call(sweep_command(folder, TWO_BY_TWO, "--dry_run"))
    assert result.returncode == 0 and result.stdout.count("experiments.train") == 4
    assert "--config.optimizer.learning_rate=0.003 --config.seed=1" in result.stdout
    assert not (folder / "runs").exists()


def test_two_sweeps_on_one_folder_are_refused(folder):
    (folder / "runs").mkdir()
    with open(folder / "runs" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = call(sweep_command(folder, TWO_BY_TWO))
    assert result.returncode == 2 and "another sweep is running in it" in result.stderr
    assert [path.name for path in (folder / "runs").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('h.sweep("config.optimizer.learning_rat", [1.0])', "did you mean config.optimizer.learning_rate"),
        ('h.sweep("config.seed", ["one"])', "config.seed='one' is not an integer"),
        ('h.sweep("config.seed", [True])', "config.seed=True is not an integer"),
        ('h.sweep("config.seed", [])', "holds no runs"),
        ('h.sweep("config.seed", [1, 1])', "two runs are"),
        ('h.sweep("config.train.batch_size", [8, 0])', "run 2: config.train.batch_size=0 must be at least 1"),
        ('h.zipit([h.sweep("config.seed", [1]), h.sweep("config.train.batch_size", [2, 4])])', "zipit"),
        ('h.product([h.sweep("config.seed", [1]), h.sweep("config.seed", [2])])', "config.seed is set twice"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_said_before_anything_starts(tmp_path, text, words):
    file = tmp_path / "sweep.py"
    file.write_text(f"def get_hyper(h):\n    return {text}\n")
    with pytest.raises(cli.UserError, match=re.escape(words)):
        SweepFile(cli.load_config("configs/default.py"), str(file)).runs()


def test_a_file_that_is_no_sweep_is_named(tmp_path):
    for text, words in (("def get_hyper(h) return 1", "line 1: expected"), ("x = 1", "no function get_hyper()")):
        (tmp_path / "sweep.py").write_text(text)
        with pytest.raises(cli.UserError, match=re.escape(words)):
            SweepFile(cli.load_config("configs/default.py"), str(tmp_path / "sweep.py"))


def test_runs_are_combined():
    a, b = hyper.sweep("a", [1, 2]), hyper.sweep("b", "xy")
    assert hyper.product([a, b]) == [{"a": i, "b": j} for i in (1, 2) for j in "xy"]
    assert hyper.zipit([a, b]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert hyper.chainit([a, b]) == [*a, *b]
    ranges = {"rate": hyper.Range(1e-4, 1e-2, log=True), "seed": hyper.Range(0, 3), "name": hyper.discrete("x", "y")}
    drawn = hyper.sample(400, ranges)
    assert drawn == hyper.sample(400, ranges) and drawn != hyper.sample(400, ranges, seed=1)
    assert {run["seed"] for run in drawn} == {0, 1, 2, 3} and {run["name"] for run in drawn} == {"x", "y"}
    assert all(1e-4 <= run["rate"] <= 1e-2 for run in drawn)
    assert 150 < sum(run["rate"] < 1e-3 for run in drawn) < 250
    widths = [run["width"] for run in hyper.sample(400, {"width": hyper.Range(1, 100, log=True)})]
    assert {type(width) for width in widths} == {int} and min(widths) == 1 and 150 < sum(w < 10 for w in widths) < 250


def test_every_sweep_of_the_house_is_one():
    for path in (ROOT / "configs/sweeps").glob("*.py"):
        assert len(SweepFile(cli.load_config("configs/shakespeare_char.py"), str(path)).runs()) > 1


@pytest.mark.parametrize(
    ("library", "runs", "flags"),
    [
        ("ray", 'h.sweep("config.seed", [1])', ["--launcher", "ray"]),
        ("optuna", 'h.sweep("config.model.dropout", h.Range(0.0, 0.5))', ["--num_trials", "2"]),
    ],
)
def test_a_missing_extra_is_named(folder, monkeypatch, capsys, library, runs, flags):
    for module in ("experiments.ray_jobs", "experiments.search"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    arguments = sweep_command(folder, f"def get_hyper(h):\n    return {runs}\n", *flags)
    assert cli.exit_code(lambda: main(arguments[3:])) == 2
    extra = {"ray": "ray", "optuna": "search"}[library]
    assert f"pip install 'gptjax[{extra}]'" in capsys.readouterr().err and not (folder / "runs").exists()
