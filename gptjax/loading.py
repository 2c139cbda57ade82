"""`gptjax.load`: a model, its parameters and its tokenizer, from wherever they are."""

import pathlib
import re
from typing import Any, NamedTuple

from gptjax.array_types import Params
from gptjax.data.tokenizers import Tokenizer
from gptjax.models import Model

# What is asked of the hub: all of a folder but weights in other formats.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]


class Loaded(NamedTuple):
    """A model ready for use: `model.apply({"params": params}, tokens)`."""

    model: Model
    params: Params
    tokenizer: Tokenizer


def load(source: str | pathlib.Path, *, step: int | None = None, mesh: Any = None) -> Loaded:
    """Loads a model with its tokenizer.

    Args:
      source: a workdir, a Hugging Face folder with safetensors, a .gguf file, or a name on the Hugging Face hub, which is
        fetched, or found in the hub's cache if there is no network; or a folder with PEFT's adapter, which is added to
        the model that it names.
      step: which checkpoint of a workdir; None for the best, or the latest if none is recorded as the best.
      mesh: where the parameters go, each straight to its place, as `distributed.sharding` says; None for one device.

    Raises:
      ValueError: no such source, or it cannot be read; says why.
    """
    path = pathlib.Path(source).expanduser()
    if (path / "model.json").is_file():
        from gptjax import workdir

        model, params, tokenizer, _ = workdir.read(path, step=step, mesh=mesh)
        return Loaded(model, params, tokenizer)
    if step is not None:
        raise ValueError(f"step {step} is for a workdir, and {str(source)!r} is none: it has no model.json")
    if path.is_file():
        from gptjax.interop import gguf

        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{str(source)!r} is not a GGUF file, the only one that is a whole model")
        return Loaded(*gguf.read(path, mesh))
    folder = path if path.is_dir() else fetch(str(source))
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, mesh)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no such model: {str(source)!r} has neither a workdir's model.json nor a Hugging Face folder's config.json"
        )
    from gptjax.interop import huggingface

    model, params = huggingface.read(folder, mesh)
    try:
        tokenizer = Tokenizer.load(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(source)!r} has no tokenizer that can be read: tokenizer.json, or a vocabulary"
        ) from error
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{str(source)!r}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, beyond the model's vocabulary of "
            f"{model.config.vocab_size}"
        )
    return Loaded(model, params, tokenizer)


def _load_adapter(folder: pathlib.Path, mesh: Any) -> Loaded:
    from gptjax.finetuning import lora
    from gptjax.interop import huggingface, peft

    base = huggingface.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    model, params, tokenizer = load(base or "", mesh=mesh)
    return Loaded(model, lora.merge(lora.put(params, peft.read(folder, model))), tokenizer)


def fetch(name: str) -> pathlib.Path:
    """The folder of a hub name, fetched or from the cache.

    Raises:
      ValueError: it is no name, or the hub cannot give it; says why.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"no such model: {name!r} is neither a file nor a folder, nor a name that the hub could have")
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's own, its HTTP client's and the socket's, by whatever fails first
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"no such model: {name!r} is no file or folder here, nor can the hub give it: {reason}"
        ) from error
