"""Checkpoints of a run, through Orbax: written in the background, atomic, verified, the last few and the best kept.

A checkpoint is a folder `checkpoints/STEP`. Orbax writes it under a temporary name and renames it; then `manifest.json`
is renamed into it, with the hash of every file. A folder without a manifest was interrupted and does not count; one whose
files do not match its manifest is damaged and is passed over, aloud.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from gptjax.array_types import Params
from gptjax.distributed.processes import from_first, is_first
from gptjax.training.state import TrainState, gather

MANIFEST = "manifest.json"
FROZEN = "frozen"  # the folder of parameters that are never trained: written once, before the first checkpoint
BEST = "best.json"
# Orbax reports each save in several lines, and retries that the fall-back here reports in one.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def _but_late_writes(unraisable: Any, hook: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Passes over what TensorStore says of writes that end after one has failed and Orbax closed their event loop."""
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


sys.unraisablehook = _but_late_writes


class Restored(NamedTuple):
    """A checkpoint read back: the state, and what was saved beside it."""

    state: TrainState
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir. With several processes, all of them make the same calls.

    Args:
      path: the folder `checkpoints` of the workdir; made by the first save.
      keep: how many of the latest to keep; the best, if one is recorded, stays besides.
    """

    def __init__(self, path: pathlib.Path, keep: int = 3):
        self.path = path.absolute()  # Orbax refuses relative paths
        self.keep = keep
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps of whole checkpoints, ascending."""
        return sorted(int(m.parent.name) for m in self.path.glob(f"*/{MANIFEST}") if m.parent.name.isdigit())

    def whole_steps(self) -> list[int]:
        """The steps of checkpoints whose files are as they were written, ascending; damaged ones are named on stderr."""
        return [step for step in self.steps() if self._verified(step) is not None]

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Copies `state` off the devices and writes it in the background; first waits for the save before.

        Args:
          step: the number of updates made.
          state: the state; may be donated to the next step as soon as this returns.
          record: anything JSON can hold, read back with the state.

        Raises:
          OSError: the disk is full or not writable; also raised by `wait` for a save that failed in the background.
        """
        self.wait()
        target, frozen = self.path / str(step), self.path / FROZEN
        if state.frozen is not None and not from_first(lambda: self._make_room(frozen)):
            with _full_disk_as_os_error(frozen), _uncompressed():
                ocp.save_checkpointables(frozen, {FROZEN: state.frozen})
            if is_first():
                _write_manifest(frozen, {})
        if from_first(lambda: self._make_room(target)):
            return
        items = {"params": state.params, "ema": state.ema, "training": _rest(state)}
        if jax.default_backend() == "cpu":
            # Orbax would write from the very memory that the next step overwrites.
            items = jax.tree.map(lambda x: x.copy(), items)
        with _full_disk_as_os_error(target), _uncompressed():
            response = ocp.save_checkpointables_async(target, {k: v for k, v in items.items() if v is not None})
        self._writer = threading.Thread(target=self._finish, args=(target, response, {"step": step, "record": record}))
        self._writer.start()

    def _make_room(self, target: pathlib.Path) -> bool:
        """Removes what an interrupted save left in `target`; returns whether it is saved already."""
        if (target / MANIFEST).exists():
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in [target, *self.path.glob(f"{target.name}.*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        return False

    def _finish(self, target: pathlib.Path, response: Any, manifest: dict[str, Any]) -> None:
        try:
            with _full_disk_as_os_error(target):
                response.result()
            if not is_first():
                return
            _write_manifest(target, manifest)
            self._delete_old()
        except BaseException as error:  # raised again by wait(), in the thread that trains
            self._error = error

    def _delete_old(self) -> None:
        best = self.best()
        for step in self.steps()[: -self.keep]:
            if best is None or step != best["step"]:
                # The manifest goes first: a half-deleted checkpoint must not look whole.
                (self.path / str(step) / MANIFEST).unlink()
                shutil.rmtree(self.path / str(step))

    def wait(self) -> None:
        """Returns when the save in the background is done; raises what it raised."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def best(self) -> dict[str, Any] | None:
        """The recorded best checkpoint, {"step", "eval/loss"}, or None."""
        path = self.path / BEST
        return json.loads(path.read_text()) if path.exists() else None

    def record_best(self, step: int, loss: float) -> None:
        """Records `step` as the best if `loss` is lower than the best so far; its save must be done (`wait`)."""
        if not is_first():
            return
        best = self.best()
        if best is None or loss < best["eval/loss"] or best["step"] not in self.steps():
            write_json(self.path / BEST, {"step": step, "eval/loss": loss})
            self._delete_old()

    def verify(self, step: int | str) -> dict[str, Any]:
        """Reads the manifest of `step`, or of `FROZEN`, and compares the hash of every file with it.

        Raises:
          ValueError: a file is missing or differs.
        """
        folder = self.path / str(step)
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if not (folder / name).exists():
                raise ValueError(f"{folder / name} is missing")
            if _digest(folder / name) != digest:
                raise ValueError(f"{folder / name} is damaged: its hash is not the one in {MANIFEST}")
        return manifest

    def restore(self, abstract: TrainState, last: int | None = None) -> Restored | None:
        """Loads the latest checkpoint that is whole, passing over damaged ones with a line on stderr.

        Args:
          abstract: shapes, dtypes and shardings of the state to load.
          last: later checkpoints are dropped.

        Returns:
          None if there is no checkpoint.

        Raises:
          ValueError: there are checkpoints, and all are damaged, or what was frozen is.
        """
        manifest = from_first(lambda: self._latest(last))
        if manifest is None:
            return None
        targets = {"params": abstract.params, "ema": abstract.ema, "training": _rest(abstract)}
        targets = {name: target for name, target in targets.items() if target is not None}
        items = ocp.load_checkpointables(self.path / str(manifest["step"]), targets)
        state = items["training"]._replace(params=items["params"], ema=items.get("ema"))
        if abstract.frozen is not None:
            self.verify(FROZEN)
            state = state._replace(**ocp.load_checkpointables(self.path / FROZEN, {FROZEN: abstract.frozen}))
        if is_first():
            # Later ones are damaged, or not wanted: the run writes them again.
            for damaged in self.steps():
                if damaged > manifest["step"]:
                    shutil.rmtree(self.path / str(damaged))
            best = self.best()
            if best is not None and best["step"] not in self.steps():
                (self.path / BEST).unlink()
        return Restored(state, manifest["record"])

    def _latest(self, last: int | None) -> dict[str, Any] | None:
        """The manifest of the latest whole checkpoint, without its files; None if there is no checkpoint at all."""
        for step in reversed([step for step in self.steps() if last is None or step <= last]):
            manifest = self._verified(step)
            if manifest is not None:
                return {name: manifest[name] for name in ("step", "record")}
        if self.steps():
            raise ValueError(f"every checkpoint in {self.path} is damaged")
        return None

    def restore_params(self, place: Callable[[Params], Params], step: int | None = None) -> tuple[int, Params]:
        """Loads parameters alone: the moving average if the run kept one, of `step` or the best or else the latest.

        Args:
          place: from the shapes and dtypes of what there is, shapes, dtypes and shardings to load.
          step: None for the best recorded checkpoint, else the latest.

        Returns:
          (step, params).

        Raises:
          ValueError: no such checkpoint, or it is damaged and there is none before it.
        """
        steps = self.steps()
        best = self.best()
        if step is None and best is not None and best["step"] in steps:
            candidates = [best["step"], *reversed([s for s in steps if s != best["step"]])]
        else:
            candidates = [s for s in reversed(steps) if step in (None, s)]
        for candidate in candidates:
            if self._verified(candidate) is not None:
                name = "ema" if (self.path / str(candidate) / "ema").exists() else "params"
                trees = [self._load(str(candidate), name, place)]
                if (self.path / FROZEN).exists():
                    self.verify(FROZEN)
                    trees.append(self._load(FROZEN, FROZEN, place))
                return candidate, gather(tuple(trees))
        raise ValueError(f"{self.path} holds no whole checkpoint" + (f" of step {step}" if step is not None else ""))

    def _load(self, folder: str, name: str, place: Callable[[Params], Params]) -> Params:
        found = ocp.checkpointables_metadata(self.path / folder).metadata[name]
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found)
        return ocp.load_checkpointables(self.path / folder, {name: place(shapes)})[name]

    def _verified(self, step: int) -> dict[str, Any] | None:
        try:
            return self.verify(step)
        except (OSError, ValueError) as error:
            print(f"checkpoint {step} is passed over: {error}", file=sys.stderr)
            return None


def _rest(state: TrainState) -> TrainState:
    """What of a state is neither parameters nor their average."""
    return state._replace(params={}, ema=None, frozen=None)


def _write_manifest(folder: pathlib.Path, content: dict[str, Any]) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    digests = {str(file.relative_to(folder)): _digest(file) for file in files}
    write_json(folder / MANIFEST, content | {"files": digests})


def _uncompressed() -> ocp.Context:
    """Float numbers barely shrink, and compressing them takes the processor from the training beside it."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


@contextlib.contextmanager
def _full_disk_as_os_error(path: pathlib.Path) -> Iterator[None]:
    """Orbax reports a full disk as an error of its storage library, in many lines."""
    try:
        yield
    except Exception as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
