"""Tasks that write text."""

import dataclasses
import os
import warnings
from typing import Any

import numpy as np

from gptjax.data.chat import prompt_ids
from gptjax.data.objectives import decoder_start, document_start
from gptjax.generation.sampling import Sampling
from gptjax.pipelines.base import Pipeline, eos_ids, file_defaults, task_params, texts_of

# What a generating task does where neither the call nor the model's files say; `top_k` counts if it samples.
_SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 256}
_GREEDY = {"do_sample": False, "max_new_tokens": 256}
_CHOOSING = ("temperature", "top_k", "top_p", "min_p")  # only where it samples


def text_generation(pipe: Pipeline, inputs: Any, *, return_full_text: bool = True, **generation: Any) -> list[Any]:
    """Continues prompts, or answers in chats.

    Args:
      pipe: with a decoder-only language model.
      inputs: one prompt or several; or one chat, [{'role': ..., 'content': ...}, ...], or several, written out by the
        tokenizer's chat template. A chat whose last message is the assistant's is continued there.
      return_full_text: whether texts begin with their prompt, and chats are whole and not the answer alone.
      generation: max_new_tokens, or max_length with the prompt; do_sample, temperature, top_k, top_p, min_p,
        repetition_penalty; num_return_sequences; seed, None for a new one each time. What is not given comes from the
        model's files: `task_specific_params` in config.json, then generation_config.json; and else is what Transformers
        has: sampling at temperature 0.7 among 50 tokens, for at most 256.

    Returns:
      [{'generated_text': text}, ...], `num_return_sequences` of them, for a chat the messages with the answer after them;
      for several prompts or chats a list of such lists.

    Raises:
      ValueError: a prompt longer than the context or than max_length, numbers out of range, a chat for a tokenizer without
        a template or that is none.
    """
    alone = isinstance(inputs, str) or _is_chat(inputs)
    items = (
        [inputs] if alone else inputs if isinstance(inputs, list) and any(map(_is_chat, inputs)) else texts_of(inputs)
    )
    prompts = [_prompt(pipe, item) for item in items]
    new, num_samples = _generate(pipe, prompts, _SAMPLES, generation)
    results = []
    for i, item in enumerate(items):
        texts = [pipe.tokenizer.decode(ids) for ids in new[i * num_samples : (i + 1) * num_samples]]
        results.append([{"generated_text": _join(item, text) if return_full_text else text} for text in texts])
    return results[0] if alone else results


def _is_chat(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and isinstance(item[0], dict)


def _prompt(pipe: Pipeline, item: Any) -> np.ndarray:
    """The tokens of a prompt or chat, of which there is always one."""
    if isinstance(item, str):
        ids = pipe.tokenizer.encode_with_specials(item).ids
        return ids if len(ids) else document_start(pipe.tokenizer)
    for message in item if _is_chat(item) else [item]:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise ValueError(f"inputs: {message!r:.60} is no message: a dict of the texts 'role' and 'content'")
    if pipe.tokenizer.chat_template is None:
        raise ValueError("inputs are a chat, and the model's tokenizer has no chat template")
    return prompt_ids(pipe.tokenizer, item, continue_final=item[-1]["role"] == "assistant")


def _join(item: Any, text: str) -> Any:
    """A prompt or chat with what the model wrote."""
    if isinstance(item, str):
        return item + text
    if item[-1]["role"] == "assistant":
        return [*item[:-1], item[-1] | {"content": item[-1]["content"] + text}]
    return [*item, {"role": "assistant", "content": text}]


def text2text_generation(
    pipe: Pipeline, inputs: str | list[str], *, key: str = "generated_text", **generation: Any
) -> list[Any]:
    """Writes the target for sources.

    Args:
      pipe: with an encoder-decoder.
      inputs: one source or several.
      key: the name of the result.
      generation: as of `text_generation`, where max_length counts the token that the target begins with; greedy if neither
        the call nor the model's files say otherwise. A `prefix` in the files comes before each source.

    Returns:
      [{'generated_text': text}, ...]: with one sequence each, one for each source; else for several sources, lists of them.
    """
    texts = texts_of(inputs)
    prefix = file_defaults(pipe.task, pipe.facts).get("prefix") or pipe.facts.get("config", {}).get("prefix") or ""
    sources = [pipe.tokenizer.encode_with_specials(prefix + text).ids for text in texts]
    eos_id = pipe.tokenizer.eos_id
    sources = [ids if len(ids) and ids[-1] == eos_id else np.append(ids, eos_id) for ids in sources]
    files = pipe.facts.get("config", {}) | pipe.facts.get("generation_config", {})
    start = files.get("decoder_start_token_id")
    if start is None:
        start = decoder_start(pipe.tokenizer)
    new, num_samples = _generate(pipe, [np.array([start])] * len(texts), _GREEDY, generation, sources)
    results = [{key: pipe.tokenizer.decode(ids)} for ids in new]
    if isinstance(inputs, str) or num_samples == 1:
        return results
    return [results[i : i + num_samples] for i in range(0, len(results), num_samples)]


def translation(
    pipe: Pipeline, inputs: str | list[str], *, src_lang: str = "", tgt_lang: str = "", **generation: Any
) -> list[Any]:
    """As `text2text_generation`, with the key 'translation_text'.

    Args:
      src_lang, tgt_lang: choose among the tasks 'translation_XX_to_YY' in the model's files, as the name of the task can.
    """
    if src_lang or tgt_lang:
        pipe = dataclasses.replace(pipe, task=f"translation_{src_lang}_to_{tgt_lang}")
    known = [name for name in task_params(pipe.facts) if name.startswith("translation_")]
    if known and pipe.task not in known:
        raise ValueError(f"task {pipe.task!r} is not one of this model's: {', '.join(known)}")
    return text2text_generation(pipe, inputs, key="translation_text", **generation)


def _generate(
    pipe: Pipeline,
    prompts: list[np.ndarray],
    defaults: dict[str, Any],
    call: dict[str, Any],
    sources: list[np.ndarray] | None = None,
) -> tuple[list[np.ndarray], int]:
    """Generates as the call, the model's files and `defaults` say, in that order; returns the ids and how many a prompt."""
    numbers = ("max_new_tokens", "max_length", "do_sample", "num_return_sequences", "repetition_penalty", *_CHOOSING)
    unknown = call.keys() - {*numbers, "seed"}
    if unknown:
        raise ValueError(f"unknown argument {sorted(unknown)[0]!r}; known are {', '.join([*numbers, 'seed'])}")
    call = {name: value for name, value in call.items() if value is not None}
    files = {name: value for name, value in file_defaults(pipe.task, pipe.facts).items() if value is not None}
    if "max_length" in call or ("max_length" in files and "max_new_tokens" not in files):
        defaults = {name: value for name, value in defaults.items() if name != "max_new_tokens"}
    if {"max_length", "max_new_tokens"} & call.keys():
        files = {name: value for name, value in files.items() if name not in ("max_length", "max_new_tokens")}
    chosen = defaults | files | call
    do_sample, num_samples = bool(chosen.get("do_sample", False)), int(chosen.get("num_return_sequences", 1))
    if not do_sample:
        unused = [name for name in _CHOOSING if name in call]
        if unused:
            warnings.warn(f"{unused[0]} has no use without do_sample=True", stacklevel=4)
        if num_samples > 1:
            raise ValueError(f"num_return_sequences {num_samples} needs do_sample=True: greedy texts are all the same")
        chosen = {name: value for name, value in chosen.items() if name not in _CHOOSING} | {"temperature": 0.0}
    elif not chosen.get("temperature", 1.0) > 0:
        raise ValueError(f"temperature {chosen['temperature']} must be above 0; do_sample=False is greedy")
    longest = max(map(len, prompts), default=0)
    if "max_new_tokens" in chosen:
        new_tokens = [int(chosen["max_new_tokens"])] * len(prompts)
    else:
        new_tokens = [int(chosen["max_length"]) - len(ids) for ids in prompts]
        if min(new_tokens, default=1) < 1:
            raise ValueError(f"max_length {chosen['max_length']} leaves nothing to write after {longest} tokens")
    seed = call.get("seed")
    ids = pipe.engine.generate(
        prompts,
        max_new_tokens=max(new_tokens, default=1),
        eos_ids=eos_ids(pipe.tokenizer, pipe.facts),
        sampling=Sampling(**{name: chosen[name] for name in Sampling._fields if name in chosen}),
        num_samples=num_samples,
        seed=int.from_bytes(os.urandom(4)) if seed is None else seed,
        sources=sources,
    )
    lengths = [n for n in new_tokens for _ in range(num_samples)]
    return [row[:length] for row, length in zip(ids, lengths, strict=True)], num_samples
