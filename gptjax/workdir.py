"""A run's folder: the names of its files, what they hold, and reading a trained model back from it.

config.json       the resolved config            metrics.jsonl   a JSON line for each logged step
model.json        the model's constructor        events/         the same for TensorBoard
tokenizer.json    arguments                      checkpoints/    the last few states, and the best
environment.json  versions, commit, devices      samples.txt, loss.png   written at the end
"""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.array_types import Params
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed.sharding import tree_shardings
from gptjax.finetuning import lora
from gptjax.models import Model, init_params, make_model, model_arguments
from gptjax.training.checkpoints import Checkpoints, write_json


class Run(NamedTuple):
    """What a workdir holds of a trained model.

    Attributes:
      model, params, tokenizer: as `gptjax.load` returns them.
      step: of the checkpoint.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def read(path: str | pathlib.Path, *, step: int | None = None, mesh: Mesh | None = None, merged: bool = True) -> Run:
    """Reads a trained model from a workdir; needs its `model.json`, `tokenizer.json` and a checkpoint, no config.

    Args:
      path: of the workdir.
      step: which checkpoint; None for the best, or the latest if none is recorded as the best.
      mesh: where the parameters go, as `distributed.sharding` says; None for one device.
      merged: whether adapters are added to what they are beside, or left as they are.

    Raises:
      ValueError: no such workdir, no checkpoint, or every checkpoint is damaged or of another model.
    """
    workdir = pathlib.Path(path)
    if not (workdir / "model.json").exists():
        raise ValueError(f"no such model: {str(path)!r} is not a workdir, it has no model.json")
    model = make_model(**json.loads((workdir / "model.json").read_text()))

    def place(found: Params) -> Params:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, found) if mesh is None else tree_shardings(found, mesh)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), found, shardings)

    step, params = Checkpoints(workdir / "checkpoints").restore_params(place, step)
    whole = lora.merge(params)
    needed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    if jax.tree.map(jnp.shape, whole) != jax.tree.map(jnp.shape, needed):
        raise ValueError(f"{workdir / 'checkpoints'} holds the parameters of another model than model.json describes")
    return Run(model, whole if merged else params, Tokenizer.load(workdir / "tokenizer.json"), step)


def write_description(workdir: pathlib.Path, config: dict[str, Any], model: Model, tokenizer: Tokenizer) -> None:
    """Makes the workdir and writes everything about the run that is known before its first step."""
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir / "tokenizer.json")
    write_json(workdir / "model.json", model_arguments(model))
    write_json(workdir / "environment.json", environment())
    write_json(workdir / "config.json", config)


def environment() -> dict[str, Any]:
    """Versions, commit and devices, for `environment.json` and every report of figures."""
    packages = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "machine": platform.platform(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    }


def _commit() -> str | None:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # installed without its repository
        return None
