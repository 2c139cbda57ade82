"""Logged metrics: one JSON line a step in `metrics.jsonl`, and the same numbers for TensorBoard and Weights & Biases."""

import json
import math
import os
import pathlib
import sys
import time
import uuid
from typing import Any

import orjson

_FLUSH_SECONDS = 10  # between writes of the event file to disk


class MetricsWriter:
    """Appends to the metrics of a workdir; also to Weights & Biases if the environment names a WANDB_PROJECT.

    Args:
      workdir: an existing folder.
      last_step: lines past it are cut, with a torn last line, so that after a resume each step appears once.
      writes: False in all processes but one, which know what is written and write nothing.
    """

    def __init__(self, workdir: pathlib.Path, last_step: int, *, writes: bool = True):
        # Here, because it is slow to import and only this class needs it. Its SummaryWriter writes in a thread that a full
        # disk ends, and after that whoever adds to its queue waits for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.path, self.writes = workdir / "metrics.jsonl", writes
        lines = [line for line in read_metrics(self.path) if line["step"] <= last_step]
        self.steps = {line["step"] for line in lines}
        if not writes:
            return
        temporary = self.path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.rename(self.path)
        self._file = self.path.open("a")
        (workdir / "events").mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / "events/events"))
        self._flushed = time.monotonic()
        # TensorBoard forgets what earlier files say of later steps.
        self._write_event(last_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._wandb = _open_wandb(workdir) if os.environ.get("WANDB_PROJECT") else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line; a number that is not finite becomes null."""
        self.steps.add(step)
        if not self.writes:
            return
        line: dict[str, Any] = {"step": step}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        summary = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write_event(step, summary={"value": summary})
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _write_event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Flushes both files to disk."""
        if not self.writes:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(workdir: pathlib.Path) -> Any:
    """The run of a workdir at Weights & Biases, the same after a resume; its own variables say where and how."""
    import wandb

    file = workdir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    config = workdir / "config.json"
    return wandb.init(
        id=file.read_text(),
        name=workdir.name,
        dir=workdir,
        config=json.loads(config.read_text()) if config.exists() else None,
        resume="allow",
    )


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in order; a missing file has none.

    A torn last line is left out; one that is no JSON with a step, before it, is named on stderr and left out.
    """
    if not path.exists():
        return []
    parsed = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = orjson.loads(line)
            int(values["step"])
            parsed.append(values)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # else the writer was killed inside it, or is at it
                print(f"warning: {path}, line {number} is not a line of metrics, and is left out", file=sys.stderr)
    return parsed
