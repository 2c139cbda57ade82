"""Hugging Face folders, read and written: config.json beside safetensors files, one or several with an index.

`families` holds what is particular to a model type; this is about files.
"""

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
from jax.sharding import Mesh

from gptjax.array_types import Params
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.families import FAMILIES, Family, Json, find_family, is_tied, our_arguments, their_config
from gptjax.interop.rules import (
    Rule,
    check_tensors,
    leaves_by_path,
    load_params,
    their_shapes,
    their_tensor,
    used_rules,
)
from gptjax.models import Model, make_model
from gptjax.models.config import TransformerConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MODULES, _POOLING = pathlib.Path("modules.json"), pathlib.Path("1_Pooling/config.json")  # sentence-transformers'
_POOLING_MODES = {
    "first": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def read(folder: str | pathlib.Path, mesh: Mesh | None = None) -> tuple[Model, Params]:
    """Reads a model from a Hugging Face folder, a tensor at a time.

    Args:
      folder: with config.json and model.safetensors, or several safetensors files and their index. With sentence-
        transformers' 1_Pooling/config.json the model gives one vector a text.
      mesh: where the parameters go, as `distributed.sharding` says; None for the default device.

    Returns:
      (model, params), the parameters in float32 whatever the file has.

    Raises:
      ValueError: an unknown architecture or one with settings that ours lacks; missing, unknown or misshapen tensors; a
        damaged file; pickled weights alone.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / "config.json")
    with _open_tensors(folder) as files:
        try:
            family = find_family(config)
            names = _names(files, family)
            tied = _drop_copies(names, config, family, files)
            model = make_model(**our_arguments(config, family, names, tied) | _read_pooling(folder))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        rules = family.rules(model.config)
        found = {name: files[actual].get_slice(actual).get_shape() for name, actual in names.items()}
        check_tensors(found, their_shapes(model, rules), str(folder))
        return model, load_params(model, rules, lambda name: files[names[name]].get_tensor(names[name]), mesh)


def _names(files: Mapping[str, Any], family: Family) -> dict[str, str]:
    """The names of a folder's tensors as the family's table has them, and as the files do."""
    # A model without a head has no prefix, and some with a head (GPT-2's own) have none either.
    bare = family.prefix and not any(name.startswith(family.prefix) for name in files)
    heads = ("lm_head.", "cls.", "classifier.", "qa_outputs.")
    names = {family.prefix + name if bare and not name.startswith(heads) else name: name for name in files}
    return {name: actual for name, actual in names.items() if not re.search(family.ignored, name)}


def _drop_copies(names: dict[str, str], config: Json, family: Family, files: Mapping[str, Any]) -> bool:
    """Takes copies of other tensors out of `names`; returns whether the head is one, in the file or out of it.

    Where config.json says that the head is tied and the file has another one, the file is right, as Transformers 5 has it.
    """
    head = next(iter(family.copies))
    tied = is_tied(config, family)
    for copy, original in family.copies.items():
        if copy not in names or (copy == head and not tied):
            continue
        if original not in names:
            names[original] = names.pop(copy)  # a file needs one of them, and writers do not agree on which
            continue
        one, other = (files[names[name]].get_tensor(names[name]) for name in (copy, original))
        if np.array_equal(one, other):
            del names[copy]
        elif copy == head:
            tied = False
        else:
            raise ValueError(f"tensors {copy} and {original} must be the same, and differ")
    return tied


@contextlib.contextmanager
def _open_tensors(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Opens the folder's safetensors files; gives the open file of each tensor by its name."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        paths = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / WEIGHTS).is_file():
        weight_map, paths = None, [folder / WEIGHTS]
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = f"; {pickles[0]} is pickled, which can run any code, and is not read" if pickles else ""
        raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}{reason}")
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in paths:
            try:
                file = stack.enter_context(safetensors.safe_open(str(path), framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
            files |= dict.fromkeys(file.keys(), file)
        missing = sorted((weight_map or {}).keys() - files.keys())
        if missing:
            raise ValueError(f"{folder / INDEX} lists {missing[0]}, which {weight_map[missing[0]]} does not hold")
        yield files


def _read_pooling(folder: pathlib.Path) -> Json:
    """Our head and pooling, if the folder is a sentence-transformers model."""
    if not (folder / _POOLING).is_file():
        return {}
    modes = [name for name, value in read_json(folder / _POOLING).items() if name.startswith("pooling_mode_") and value]
    pooling = [ours for ours, theirs in _POOLING_MODES.items() if [theirs] == modes]
    if not pooling:
        raise ValueError(f"{_POOLING}: {modes} must be one of {', '.join(_POOLING_MODES.values())}")
    return {"head": "embedding", "pooling": pooling[0]}


def write(
    folder: str | pathlib.Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model as a Hugging Face folder, in float32, a tensor at a time.

    Args:
      folder: made if need be; files of the same names are overwritten.
      model, params: what to write.
      tokenizer: its files are written beside the model's, and its special ids into config.json.
      max_file_bytes: weights that take more are split over several files, with an index.

    Raises:
      ValueError: a model that no architecture of Transformers can express; names the field.
    """
    folder = pathlib.Path(folder)
    config = their_config(model)
    if tokenizer is not None:
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        config |= {name: index for name, index in ids.items() if index is not None}
    family = FAMILIES[config["model_type"]]
    prefix = family.prefix if config["architectures"] == ["BertModel"] else ""
    rules = family.rules(model.config)
    shapes = their_shapes(model, rules)
    sources: dict[str, tuple[list[Rule], int]] = {}  # the rules of a tensor, in order of parts, and its layer
    for rule, num_layers in used_rules(model, rules):
        for layer in range(num_layers):
            sources.setdefault(rule.name.format(layer), ([], layer))[0].append(rule)
    for its_rules, _ in sources.values():
        its_rules.sort(key=lambda rule: rule.part or 0)
    leaves = leaves_by_path(params)

    folder.mkdir(parents=True, exist_ok=True)
    groups = _split(shapes, max_file_bytes)
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups):
        file = WEIGHTS if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header({name.removeprefix(prefix): shapes[name] for name in group}))
            for name in group:
                stream.write(np.ascontiguousarray(their_tensor(model.config, leaves, *sources[name])).data)
        weight_map |= dict.fromkeys((name.removeprefix(prefix) for name in group), file)
    if len(groups) > 1:
        total = sum(4 * math.prod(shape) for shape in shapes.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if tokenizer is not None:
        tokenizer.save(folder)
    if model.config.head == "embedding":
        _write_pooling(folder, model.config)
    _write_json(folder / "config.json", config)


def _split(shapes: Mapping[str, tuple[int, ...]], max_bytes: int) -> list[list[str]]:
    """The names, sorted, in groups of at most `max_bytes` each, or of one tensor."""
    groups: list[list[str]] = []
    size = 0
    for name in sorted(shapes):
        own = 4 * math.prod(shapes[name])
        if not groups or size + own > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """How a safetensors file of float32 tensors begins; their bytes follow. The library's own writer takes all at once."""
    header: Json = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_pooling(folder: pathlib.Path, config: TransformerConfig) -> None:
    """What sentence-transformers needs to know of a model that gives one vector a text."""
    kind = "sentence_transformers.models."
    parts = (("0", "", "Transformer"), ("1", str(_POOLING.parent), "Pooling"), ("2", "2_Normalize", "Normalize"))
    modules = [{"idx": int(i), "name": i, "path": path, "type": kind + name} for i, path, name in parts]
    modes = {name: ours == config.pooling for ours, name in _POOLING_MODES.items()}
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir(exist_ok=True)
    _write_json(folder / _POOLING, {"word_embedding_dimension": config.embed_dim} | modes)
    _write_json(folder / _MODULES, modules)


def read_json(file: pathlib.Path) -> Json:
    """Reads a JSON object.

    Raises:
      ValueError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
