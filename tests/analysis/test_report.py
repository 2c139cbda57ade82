"""The report of a sweep: what it says is what was put into the runs, and its page needs nothing else."""

import html.parser
import shlex
import threading

import numpy as np
import pytest

import gptjax
from experiments import cli, report
from gptjax.analysis.report import summarize
from tests.analysis.sweeps import write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweep") / "runs")
    bad = {
        "seed": 0,
        "optimizer": {"learning_rate": 0.1},
        "model": {"num_layers": 2},
        "train": {"num_train_steps": 300},
    }
    write_run(folder / "diverged", [3.0] * 10 + [None], bad, done=False)
    return folder


@pytest.fixture(scope="module")
def runs(sweep):
    return gptjax.read_runs(sweep)


def call(capsys, *arguments):
    code = cli.exit_code(lambda: report.main([str(a) for a in arguments]))
    return code, *capsys.readouterr()


def test_groups_are_ordered_and_judged_as_they_were_made(runs, sweep):
    summary = summarize(runs, "eval/loss", "learning_rate=0.001, num_layers=2")
    groups = summary.groups.set_index("group")
    assert len(groups) == 7 and groups["runs"].tolist() == [4] * 6 + [0]
    assert groups.index[0] == "learning_rate=0.001, num_layers=4" and f"{sweep}/lr=0.001,layers=4" in summary.best
    assert groups.loc["learning_rate=0.001, num_layers=4", "verdict"] == "better"
    assert groups.loc["learning_rate=0.01, num_layers=2", "verdict"] == "worse"
    assert groups.loc["learning_rate=0.01, num_layers=4", "verdict"] == "cannot tell"  # made the same
    np.testing.assert_allclose(groups.loc["learning_rate=0.001, num_layers=4", "difference"], -0.1, atol=0.01)
    last = runs.metrics[runs.metrics["step"] == 300].merge(runs.table, on="run")
    means = last.groupby(["optimizer.learning_rate", "model.num_layers"])["eval/loss"].mean()
    np.testing.assert_allclose(groups.loc["learning_rate=0.01, num_layers=2", "mean"], means[0.01, 2], rtol=1e-12)


def test_accuracies_are_better_higher(runs):
    metrics = runs.metrics.assign(**{"eval/accuracy": -runs.metrics["eval/loss"]})
    summary = summarize(runs._replace(metrics=metrics), "eval/accuracy", "learning_rate=0.001, num_layers=2")
    assert summary.best == summarize(runs, "eval/loss").best
    groups = summary.groups.set_index("group")
    assert groups.loc["learning_rate=0.001, num_layers=4", "verdict"] == "better"


def test_the_page_needs_nothing_else_and_shows_everything(sweep, tmp_path, capsys):
    page = tmp_path / "page.html"
    code, out, err = call(capsys, sweep, "--html", page, "--baseline", "learning_rate=0.001, num_layers=2")
    assert code == 0 and not err and "24 finished, 1 diverged" in out and "cannot tell" in out

    tags = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

    Reader().feed(page.read_text())
    links = [a[name] for _, a in tags for name in ("src", "href") if name in a]
    assert len(links) == 3 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}  # the samples hold one
    text = page.read_text()
    assert (
        "&lt;script&gt;alert(1)" in text and "1 x &lt;none&gt;" in text and "@import" not in text and "url(" not in text
    )
    for run in sweep.iterdir():
        assert str(run) in text


def test_the_command_gives_the_config_of_the_best_run(sweep, capsys):
    words = shlex.split(call(capsys, sweep / "lr=0.01*")[1].splitlines()[-1])
    config = cli.load_config(
        "configs/default.py", [tuple(w[9:].split("=")) for w in words if w.startswith("--config.")]
    )
    assert config.optimizer.learning_rate == 0.01 and config.train.num_train_steps == 300
    assert words[words.index("--workdir") + 1].startswith(str(sweep / "lr=0.01,layers=4"))


def test_one_run_and_runs_without_configs(sweep, tmp_path, capsys):
    bare = write_run(tmp_path / "bare", [3.0] * 20)
    (bare / "config.json").unlink()
    odd = {"seed": 1, "optimizer": {"learning_rate": 0.1}, "lora": {"projections": "a_(b_c|mlp)$" * 9, "rank": 1}}
    write_run(tmp_path / "odd", [3.0] * 20, odd)
    plain = write_run(tmp_path / "plain", [3.0] * 20, odd | {"lora": {"projections": "_$x_y_z$", "rank": 3}})
    old = write_run(tmp_path / "old", [3.0] * 20, {"seed": 1, "optimizer": {"learning_rate": 0.1}})
    for runs in (
        [tmp_path / "odd", plain, old],
        [sweep / "diverged"],
        [bare],
        [sweep / "lr=0.01,layers=4,seed=0", bare],
    ):
        code, _, err = call(capsys, *runs, "--html", tmp_path / "page.html")
        assert code == 0 and not err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "eval/los"], "did you mean 'eval/loss'?"),
        (["--metric", "zzz"], "there are 'train/loss', 'train/tokens'"),
        (["--baseline", "learning_rate=0.001,num_layers=2"], "did you mean 'learning_rate=0.001, num_layers=2'?"),
        (["--html", "/nonexistent/page.html"], "there is no folder /nonexistent"),
        (["/nonexistent"], "/nonexistent: no runs found"),
    ],
)
def test_bad_input(sweep, capsys, arguments, words):
    code, _, err = call(capsys, sweep, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1


def test_watching_ends_with_the_runs(tmp_path, capsys):
    folder = write_run(tmp_path / "run [1]", (4 - np.arange(40) / 20).tolist(), done=False)
    content = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(content[: len(content) // 2])

    def finish():
        (folder / "metrics.jsonl").write_text(content)
        (folder / "loss.png").touch()

    timer = threading.Timer(0.5, finish)
    timer.start()
    code, out, err = call(capsys, folder, "--watch")
    timer.join()
    assert code == 0 and not err and "finished" in out and "40 of 40" in out and "0.0 min" in out and "run [1]" in out


def test_progress_of_a_run_that_goes_on(tmp_path):
    folder = write_run(
        tmp_path / "run", (4 - np.arange(40) / 20).tolist(), {"train": {"num_train_steps": 100}}, done=False
    )
    (row,) = report.progress(gptjax.read_runs(folder)).to_dict("records")
    assert row["status"] == "running" and row["step"] == "40 of 100" and row["left"] == "0.1 min"  # 60 steps of 0.1 s
    assert row["train/loss"] == row["eval/loss"] == "2.05" and row[""][0] == "█" and row[""][-1] == "▁"
