"""What every task has: a model, with what its files say besides weights and tokens."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from gptjax import loading
from gptjax.array_types import Params
from gptjax.data.tokenizers import Tokenizer
from gptjax.generation.engine import Engine
from gptjax.models import Model

ROWS = 8  # texts that a model reads or writes at once


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A task with its model: call it with inputs, and with arguments that then replace those given to `pipeline`.

    Attributes:
      task: a name in `pipelines.TASKS`, or 'translation_XX_to_YY'.
      function: what it runs, of this, inputs and arguments.
      model, params, tokenizer: as `gptjax.load` gives them.
      facts: as `source_facts` gives them.
      arguments: of every call.
    """

    task: str
    function: Callable[..., Any]
    model: Model
    params: Params
    tokenizer: Tokenizer
    facts: dict[str, Any]
    arguments: dict[str, Any]

    @functools.cached_property
    def engine(self) -> Engine:
        """What writes texts; made at the first call that does."""
        return Engine(self.model, self.params, num_slots=ROWS)

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        """Does the task; see `function` for inputs, arguments and what it returns."""
        return self.function(self, *inputs, **(self.arguments | arguments))


def source_facts(source: str | os.PathLike) -> dict[str, Any]:
    """What a model's files say besides its weights and tokens.

    Args:
      source: as `pipeline` takes it.

    Returns:
      `config` and `generation_config`, the contents of the files of that name; {} where there is none, and for a workdir,
      whose config.json is not a model's.

    Raises:
      ValueError: no such source, or a file that is not a JSON object.
    """
    path = local_path(source)
    files = {name: path / f"{name}.json" for name in ("config", "generation_config")}
    is_workdir = (path / "model.json").exists()
    return {name: _read_object(file) if file.exists() and not is_workdir else {} for name, file in files.items()}


def eos_ids(tokenizer: Tokenizer, facts: dict[str, Any]) -> list[int]:
    """The tokens that end a text: what the model's files say in `facts`, else the tokenizer's own."""
    ids = facts.get("generation_config", {}).get("eos_token_id")
    ids = tokenizer.eos_id if ids is None else ids
    return ids if isinstance(ids, list) else [ids]


def local_path(source: str | os.PathLike) -> pathlib.Path:
    """The file or folder of a source, for a hub name the one that was fetched."""
    path = pathlib.Path(source).expanduser()
    return path if path.exists() else loading.fetch(os.fspath(source))


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object but a {type(content).__name__}")
    return content


def texts_of(inputs: Any) -> list[str]:
    texts = inputs if isinstance(inputs, list) else [inputs]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"inputs must be a text or a list of texts, not {text!r:.60}")
    return texts


def task_params(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return facts.get("config", {}).get("task_specific_params") or {}


def file_defaults(task: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What a model's files say about generating, the task's own parameters first."""
    return facts.get("generation_config", {}) | task_params(facts).get(task, {})
