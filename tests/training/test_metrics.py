"""What the writer tells TensorBoard and Weights & Biases, and what a missing package gets."""

import importlib.util
import json
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from experiments import build, cli
from gptjax.training.metrics import MetricsWriter


@pytest.fixture
def calls(monkeypatch):
    """What a wandb that only remembers was told."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: calls.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    return calls


def test_wandb_is_told_every_line_and_resumes_its_run(tmp_path, calls):
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for last_step in (0, 2):
        writer = MetricsWriter(tmp_path, last_step)
        for step in (last_step + 1, last_step + 2):
            writer.write(step, {"train/loss": 1.0 / step})
        writer.close()
    first, *logged, end = calls[:4]
    assert first["config"] == {"seed": 3} and first["resume"] == "allow" and first["dir"] == tmp_path
    assert logged == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})] and end == "finish"
    assert calls[4]["id"] == first["id"] and [call[0] for call in calls[5:7]] == [3, 4]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_no_project_no_wandb(tmp_path, calls, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT")
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert not calls


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_project_without_the_package_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    with pytest.raises(cli.UserError, match=r"pip install 'gptjax\[wandb\]'"):
        build.check(cli.load_config("configs/default.py"))


def test_event_files_hold_the_same_numbers_and_a_later_one_takes_back_what_came_after_its_step(tmp_path):
    for last_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = MetricsWriter(tmp_path, last_step)
        for step in steps:
            writer.write(step, {"loss": step + last_step / 10, "eval/loss": float("nan")})
        writer.close()
        (file,) = (tmp_path / "events").iterdir()
        events = list(read_events(file.read_bytes()))
        file.unlink()  # the next may have its name, made of seconds
        assert (events[1].step, events[1].session_log.status) == (last_step + 1, SessionLog.START)
        found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]
        assert [step for step, _ in found] == list(steps)
        np.testing.assert_allclose([v["loss"] for _, v in found], [step + last_step / 10 for step in steps], rtol=1e-6)
        assert all(np.isnan(v["eval/loss"]) for _, v in found)


def read_events(content):
    """The records of a TFRecord file: length, its checksum, the record, its checksum."""
    while content:
        (length,) = struct.unpack("Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
