"""Runs read back: what was written is what is read, while it is written too, and whatever else lies in the files."""

import os
import time

import numpy as np
import pytest

import gptjax
from gptjax.training.metrics import MetricsWriter
from tests import runs
from tests.analysis.sweeps import write_run


def test_what_the_writer_wrote_is_read(tmp_path):
    writer = MetricsWriter(tmp_path, last_step=0)
    written = [{"train/loss": 1.0 / step, "train/grad_norm": 0.1 + step} for step in range(1, 4)]
    for step, values in enumerate(written, 1):
        writer.write(step, values | ({"eval/loss": float("inf")} if step == 2 else {}))
        assert gptjax.read_runs(tmp_path).metrics["step"].tolist() == list(range(1, step + 1))  # before it is closed
    writer.close()
    metrics = gptjax.read_runs(str(tmp_path)).metrics
    assert metrics.columns.tolist() == ["run", "step", "train/loss", "train/grad_norm", "eval/loss"]
    np.testing.assert_array_equal(metrics["train/loss"], [values["train/loss"] for values in written])
    assert metrics["run"].unique().tolist() == [str(tmp_path)] and metrics["eval/loss"].isna().all()


def test_runs_of_other_metrics_and_configs_are_read_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"seed": 1, "optimizer": {"learning_rate": 0.1, "factors": []}}
    write_run(tmp_path / "runs/deep/a", [3.0, 2.0], model)
    write_run(
        tmp_path / "runs/b", [5.0], model | {"seed": 2, "optimizer": {"learning_rate": 0.1, "factors": [["x", 0]]}}
    )
    (tmp_path / "runs/b/metrics.jsonl").write_text('{"step": 1, "eval/accuracy": 0.5}\n')
    (tmp_path / "runs/b/checkpoints/1").mkdir(parents=True)
    metrics, table = gptjax.read_runs("runs/**")
    assert table.columns.tolist() == ["run", "status", "seed", "optimizer.factors", "train.num_train_steps"]
    assert table["run"].tolist() == ["runs/b", "runs/deep/a"] and table["optimizer.factors"].tolist() == [
        (("x", 0),),
        (),
    ]
    assert metrics.groupby("run")["eval/accuracy"].last().tolist()[0] == 0.5
    assert metrics["train/loss"].isna().tolist() == [True, False, False]
    for same in (["runs"], ["runs/deep", "runs/b"], ["runs/*", "runs/b"]):
        assert gptjax.read_runs(*same).metrics.equals(metrics)


def test_a_field_of_another_version_is_no_difference(tmp_path):
    write_run(tmp_path / "new", [3.0], {"seed": 1, "model": {"num_layers": 2, "mup": False}})
    write_run(tmp_path / "other", [3.0], {"seed": 1, "model": {"num_layers": 4, "mup": False}})
    write_run(tmp_path / "old", [3.0], {"seed": 1})
    table = gptjax.read_runs(tmp_path).table
    assert table.columns.tolist() == ["run", "status", "model.num_layers"]
    assert table["model.num_layers"].tolist() == [2, None, 4] and isinstance(table["model.num_layers"][0], int)


def test_a_corrupt_line_is_named_and_a_torn_one_left_out(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [4.0, 3.0, 2.0, 1.0])
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:10] + b"\x00\xff" + lines[1][12:]
    lines[2] = b"[1, 2]\n"
    path.write_bytes(b"".join(lines) + b'{"step": 5, "train/l')
    assert gptjax.read_runs(folder).metrics["step"].tolist() == [1, 4]
    assert [line.split(" is ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"warning: {path}, line {number}" for number in (2, 3)
    ]


def test_every_cut_of_a_file_is_a_prefix_of_its_lines(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [4.0, 3.0, 2.0])
    content = (folder / "metrics.jsonl").read_bytes()
    for length in range(len(content)):
        (folder / "metrics.jsonl").write_bytes(content[:length])
        steps = gptjax.read_runs(folder).metrics["step"].tolist()
        assert steps == list(range(1, len(steps) + 1)) and 0 <= len(steps) - content[:length].count(b"\n") <= 1
    assert not capsys.readouterr().err


def test_statuses(tmp_path):
    write_run(tmp_path / "finished", [3.0, 2.0])
    write_run(tmp_path / "diverged", [3.0, None], done=False)
    write_run(tmp_path / "running", [3.0, 2.0], done=False)
    (write_run(tmp_path / "starting", [3.0], done=False) / "metrics.jsonl").unlink()
    write_run(tmp_path / "stopped", [3.0, 2.0], done=False)
    for folder in ("finished", "stopped"):
        for path in (tmp_path / folder).iterdir():
            os.utime(path, (time.time() - 1000,) * 2)
    table = gptjax.read_runs(tmp_path).table.set_index("run")["status"]
    expected = {name: name for name in ("finished", "diverged", "running", "stopped")} | {"starting": "running"}
    assert table.to_dict() == {str(tmp_path / name): status for name, status in expected.items()}


def test_no_runs(tmp_path):
    with pytest.raises(ValueError, match="no runs found"):
        gptjax.read_runs(tmp_path)


def test_real_runs(tmp_path):
    corpus = runs.write_corpus(tmp_path)
    fields = {"train__num_train_steps": 4, "eval__every_steps": 0, "optimizer__warmup_steps": 0}
    for name, rate, code in (("good", 1e-3, 0), ("wild", 1e30, 3)):
        command = runs.train_command(tmp_path / "runs" / name, corpus, **fields, optimizer__learning_rate=rate)
        assert runs.run(command).returncode == code
    metrics, table = gptjax.read_runs(tmp_path / "runs")
    assert table["status"].tolist() == ["finished", "diverged"]
    assert table["optimizer.learning_rate"].tolist() == [1e-3, 1e30] and table.columns.size == 3
    assert metrics["eval/loss"].notna().tolist()[:4] == [False, False, False, True]
