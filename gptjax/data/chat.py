"""Chat templates: a conversation as the token ids that a model was taught, and which of them the assistant said."""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptjax.data.tokenizers import Tokenizer

# What a tokenizer without a template gets; where it lacks <|im_end|>, its end token ends a turn.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GUARD = "\ue000"  # breaks up what would be a special token in the text of a message; taken out again
_END = "\ue001"  # where a message that is to go on ends

Message = dict[str, Any]


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """Gives a tokenizer without a chat template ChatML's; returns it."""
    if tokenizer.chat_template is None:
        has_end = tokenizer.special_id("<|im_end|>") is not None
        end = next(name for name, index in tokenizer.special_ids.items() if index == tokenizer.eos_id)
        tokenizer.chat_template = CHATML if has_end else CHATML.replace("<|im_end|>", end)
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, continue_final: bool = False) -> np.ndarray:
    """The ids, int32 [T], of a conversation whose next words are the assistant's.

    Args:
      tokenizer: with its chat template, or to get ChatML's.
      messages: dicts of `role` and `content`.
      continue_final: whether the next words go on with the last message, instead of beginning one.

    Raises:
      ValueError: the template fails, or leaves the message that is to go on out.
    """
    if not continue_final:
        return encode_rendered(tokenizer, render(tokenizer, messages, add_generation_prompt=True))
    *before, final = messages
    marked = final | {"content": final["content"] + _END + " "}
    rendered, end, rest = render(tokenizer, [*before, marked], add_generation_prompt=False).rpartition(_END)
    if not end:
        raise ValueError("the tokenizer's chat template leaves out the message that is to go on")
    # A template that trims messages took the space after the mark, and would have taken those before it.
    return encode_rendered(tokenizer, rendered if rest.startswith(" ") else rendered.rstrip())


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[tuple[np.ndarray, bool]]:
    """Encodes a conversation up to the assistant's last word.

    Each of the assistant's turns is encoded apart from what comes before it, as it is when the model writes it, and goes on
    to the token that ends the turn; line breaks after that are nobody's.

    Args:
      tokenizer: with its chat template, or to get ChatML's.
      messages: dicts of `role` and `content`.

    Returns:
      Parts (ids int32 [n], whether the assistant said them), in order.

    Raises:
      ValueError: no turn is the assistant's or it is empty, the template fails, or it writes the beginning of a
        conversation in another way once it goes on, so that no one can tell whose the tokens are.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no assistant turn")
    parts: list[tuple[str, bool]] = []
    done = ""
    for i in turns:
        if not messages[i]["content"].strip():
            raise ValueError(f"the assistant's turn {i + 1} is empty")
        before = render(tokenizer, messages[:i], add_generation_prompt=True)
        after = render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(
                f"the chat template writes what comes before message {i + 1} differently once the conversation goes on"
            )
        said = after[len(before) :]
        spoken = said.rstrip()
        parts += [(before[len(done) :], False), (spoken, True), (said[len(spoken) :], False)]
        done = after
    while not parts[-1][1]:
        parts.pop()
    merged: list[tuple[str, bool]] = []  # line breaks between a turn and the next belong to one text
    for text, is_said in parts:
        if merged and merged[-1][1] == is_said:
            merged[-1] = (merged[-1][0] + text, is_said)
        else:
            merged.append((text, is_said))
    return [(encode_rendered(tokenizer, text), is_said) for text, is_said in merged]


def render(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """What the template writes, for `encode_rendered`, which tells special tokens from text that looks like them.

    Raises:
      ValueError: the template fails.
    """

    def guard(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda match: match[0][0] + _GUARD + match[0][1:], value.replace(_GUARD, ""))
        if isinstance(value, dict):
            return {name: guard(item) for name, item in value.items()}
        return [guard(item) for item in value] if isinstance(value, list) else value

    special = re.compile("|".join(map(re.escape, tokenizer.special_ids)) or "(?!)")
    roles = {f"{role}_token": token for role, token in tokenizer.roles.items()}
    try:
        template = _compile(with_template(tokenizer).chat_template or "")
        return template.render(
            messages=guard(list(messages)),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **roles,
        )
    except Exception as error:  # the template is a program
        raise ValueError(f"the tokenizer's chat template fails: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # Transformers' own block, which marks what the assistant says.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template))


def encode_rendered(tokenizer: Tokenizer, rendered: str) -> np.ndarray:
    """Ids of what a template wrote: its special tokens as such, and all else as text."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", rendered) if names else [rendered]
    texts = iter(tokenizer.encode_batch([piece.replace(_GUARD, "") for piece in pieces[::2]]))
    ids = [next(texts) if i % 2 == 0 else np.array([tokenizer.special_ids[piece]]) for i, piece in enumerate(pieces)]
    return np.concatenate(ids).astype(np.int32)
