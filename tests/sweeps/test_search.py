"""Searches: trials shared through the folder, taken up again, given up when hopeless."""

import functools
import json

import optuna
import pytest

from experiments import cli
from experiments.search import Search
from experiments.sweep import SweepFile, main
from tests.runs import run
from tests.sweeps.test_sweep import folder, sweep_command  # noqa: F401 - the fixture

RATES = """
def get_hyper(h):
    rates = h.sweep("config.optimizer.learning_rate", h.Range(1e-4, 1e-1, log=True))
    steps = h.sweep("config.optimizer.warmup_steps", h.Range(1, 9))
    return h.product([rates, steps, h.sweep("config.train.z_loss", [0, 1])])
"""


def search_in(tmp_path, num_trials):
    (tmp_path / "sweep.py").write_text(RATES)
    return Search(tmp_path, SweepFile(cli.load_config("configs/default.py"), str(tmp_path / "sweep.py")), num_trials)


def log(tmp_path, taken, losses):
    lines = [{"step": step, "eval/loss": loss} for step, loss in losses.items()]
    (tmp_path / taken.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_numbers_are_of_their_fields_and_within_their_ranges(tmp_path):
    search = search_in(tmp_path, 12)
    runs = [search.take() for _ in range(12)]
    assert search.take() is None and len({run.name for run in runs}) == 12
    for taken in runs:
        o = taken.config.optimizer
        assert 1e-4 <= o.learning_rate <= 1e-1 and 1 <= o.warmup_steps <= 9 and type(o.warmup_steps) is int
        assert f"--config.optimizer.learning_rate={o.learning_rate}" in taken.overrides
    assert {taken.config.train.z_loss for taken in runs} == {0.0, 1.0}


def test_a_trial_left_alone_is_taken_up_and_one_in_work_is_not(tmp_path):
    one, other = search_in(tmp_path, 3), search_in(tmp_path, 3)
    first, second = one.take(), other.take()
    assert first.name != second.name
    one.ended(first, "stopped")  # lets go of it, as the end of its process does
    assert other.take() == first
    assert other.take().name[:3] == "002" and other.take() is None and one.take() is None
    log(tmp_path, first, {5: 2.0})
    other.ended(first, "finished")
    assert one.outcomes()[first.name] == "finished" and one.outcomes()[second.name] == "stopped"


def test_the_hopeless_are_given_up_and_the_sampler_learns(tmp_path, monkeypatch):
    """The loss is the distance of z_loss from 1, and of the learning rate from 1e-1: in half of the range by chance."""
    monkeypatch.setattr(optuna.samplers, "TPESampler", functools.partial(optuna.samplers.TPESampler, seed=0))
    search, best = search_in(tmp_path, 60), []
    for number in range(60):
        taken = search.take()
        distance = 2 - taken.config.train.z_loss - taken.config.optimizer.learning_rate
        log(tmp_path, taken, {5: distance})
        assert not (number == 0 and search.is_hopeless(taken))
        log(tmp_path, taken, {5: distance, 9: distance})
        search.ended(taken, "pruned" if search.is_hopeless(taken) else "finished")
        best.append(taken.config.train.z_loss == 1)
    assert 0 < list(search.outcomes().values()).count("pruned") < 60
    assert sum(best[-30:]) > 22


def test_a_search_from_the_command_line(folder):  # noqa: F811
    text = 'def get_hyper(h):\n    return h.sweep("config.optimizer.learning_rate", h.Range(1e-4, 1e-1, log=True))\n'
    arguments = sweep_command(folder, text, "--num_trials", "2", "--parallel", "2")
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 2 and "000,learning_rate=" in result.stdout
    again = run(arguments)
    assert again.returncode == 0 and again.stdout == result.stdout and not again.stderr


@pytest.mark.parametrize(
    ("values", "flags", "words"),
    [
        ("h.Range(1e-4, 1e-1)", [], "--num_trials N is for ranges"),
        ("[1e-4]", ["--num_trials", "2"], "holds none"),
        ("h.Range(1e-4, 1e-1)", ["--num_trials", "0"], "--num_trials 0 must be at least 1"),
        ("h.Range(1e-4, 1e-1)", ["--num_trials", "2", "--launcher", "vmap"], "use --launcher local"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys, values, flags, words):
    text = f'def get_hyper(h):\n    return h.sweep("config.optimizer.learning_rate", {values})\n'
    assert cli.exit_code(lambda: main(sweep_command(tmp_path, text, *flags)[3:])) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("optimizer.learning_rate", "h.Range(0.0, 0.1, log=True)", "must go up, and from above 0 if log"),
        ("optimizer.warmup_steps", "h.Range(1.5, 3.0)", "is not an integer"),
        ("model.dropout", "h.Range(0.5, 1.5)", "config.model.dropout=1.5 must be"),
    ],
)
def test_both_ends_of_a_range_are_checked(tmp_path, name, values, words):
    (tmp_path / "sweep.py").write_text(f'def get_hyper(h):\n    return h.sweep("config.{name}", {values})\n')
    with pytest.raises(cli.UserError, match=words):
        SweepFile(cli.load_config("configs/default.py"), str(tmp_path / "sweep.py")).runs()
