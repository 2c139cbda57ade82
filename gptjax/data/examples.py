"""Examples of a task, recognised by the names of their fields and encoded as what packed rows hold.

messages or conversations                 [{role, content}, ...] or ShareGPT's {from, value}      sft
instruction, [input], output, [system]    Alpaca's                                                sft
prompt, completion                        texts without a chat template                           sft
[a conversation,] chosen, rejected        texts, messages or lists of messages                    dpo
text or sentence, [text_pair], label      the label a number from 0                               classification
question, context, answers                SQuAD's; no answers where there is none                 question_answering
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.data.chat import Message, conversation_ids
from gptjax.data.corpora import Record
from gptjax.data.tokenizers import Encoded, Tokenizer

# int32 [3, n]: inputs, targets, and for 'sft' and 'dpo' whether a target is one, else token types. Targets are the next
# tokens; of 'classification' the label, and of 'question_answering' the answer's first and last token, in front.
Example = np.ndarray
Encode = Callable[[Record], list[list[Example]]]
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def make_encoder(objective: str, tokenizer: Tokenizer, seq_len: int) -> Encode:
    """Builds the function from a record to its examples, in groups that belong in one row.

    A group is longer than `seq_len` where the record is, but of 'question_answering', whose contexts are cut into windows
    that share 128 tokens, as the pipeline of that name does.

    The function raises ValueError, naming the record, where its fields are none of the objective's, a conversation has no
    assistant turn, an answer is empty, a label is no number from 0, or an answer does not stand where it says.

    Args:
      objective: 'sft', 'dpo', 'classification' or 'question_answering'.
      tokenizer: with the chat template.
      seq_len: T, of a window.
    """
    encoders = {
        "sft": lambda fields: [[_supervised(tokenizer, fields)]],
        "dpo": lambda fields: [_preference(tokenizer, fields)],
        "classification": lambda fields: [[_labelled(tokenizer, fields)]],
        "question_answering": lambda fields: [[window] for window in _answered(tokenizer, fields, seq_len)],
    }

    def encode(record: Record) -> list[list[Example]]:
        try:
            return encoders[objective](record.fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"its fields are malformed: {error!r}"
            raise ValueError(f"data.objective {objective!r}: {record.where}: {reason}") from error

    return encode


def _supervised(tokenizer: Tokenizer, fields: dict[str, Any]) -> Example:
    if {"prompt", "completion"} <= fields.keys():
        if not fields["completion"].strip():
            raise ValueError("the completion is empty")
        ids: np.ndarray = tokenizer.encode_with_specials(fields["prompt"]).ids
        prompt = ids if len(ids) else np.array([tokenizer.eos_id], np.int32)
        return _shifted([(prompt, False), (np.append(tokenizer.encode(fields["completion"]), tokenizer.eos_id), True)])
    if {"instruction", "output"} <= fields.keys():
        asked = "\n\n".join(filter(None, (fields["instruction"], fields.get("input"))))
        system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
        messages = [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]
        return _shifted(conversation_ids(tokenizer, messages))
    for name in ("messages", "conversations"):
        if name in fields:
            return _shifted(conversation_ids(tokenizer, _messages(fields[name], "user")))
    raise _unknown(fields, "messages, conversations, instruction and output, or prompt and completion")


def _preference(tokenizer: Tokenizer, fields: dict[str, Any]) -> list[Example]:
    """The chosen and the rejected example; only the last turn, which is all that they differ in, is a target."""
    if not {"chosen", "rejected"} <= fields.keys():
        raise _unknown(fields, "chosen and rejected")
    prompt: Any = next((fields[name] for name in ("conversations", "messages", "prompt") if name in fields), [])
    pair = []
    for answer in (fields["chosen"], fields["rejected"]):
        parts = conversation_ids(tokenizer, _messages(prompt, "user") + _messages(answer, "assistant"))
        pair.append(_shifted([*((ids, False) for ids, _ in parts[:-1]), parts[-1]]))
    return pair


def _labelled(tokenizer: Tokenizer, fields: dict[str, Any]) -> Example:
    text = next((fields[name] for name in ("text", "sentence") if name in fields), None)
    if text is None or "label" not in fields:
        raise _unknown(fields, "text or sentence, and label")
    try:
        label = int(fields["label"])
    except ValueError:
        label = -1
    if label < 0:
        raise ValueError(f"label {fields['label']!r} is not a whole number from 0")
    encoded = tokenizer.encode_with_specials(text, fields.get("text_pair"))
    return _read_whole(encoded, [label])


def _answered(tokenizer: Tokenizer, fields: dict[str, Any], seq_len: int) -> list[Example]:
    """A window each with the answer's place in it, or the first token where it is not."""
    if not {"question", "context", "answers"} <= fields.keys():
        raise _unknown(fields, "question, context and answers")
    answers, context = fields["answers"], fields["context"]
    if isinstance(answers, dict):  # a list of texts and one of places, in place of a list of both
        answers = [
            {"text": t, "answer_start": s} for t, s in zip(answers["text"], answers["answer_start"], strict=True)
        ]
    start = end = -1
    if answers:
        start = int(answers[0]["answer_start"])
        end = start + len(answers[0]["text"])
        if context[start:end] != answers[0]["text"] or start == end:
            raise ValueError(f"the answer {answers[0]['text']!r} is not what the context has at character {start}")
    encoded = tokenizer.encode_with_specials(fields["question"].strip(), context)
    try:
        found = windows(encoded, seq_len, min(seq_len // 2, 128))
    except ValueError:  # the question leaves no room
        return [_read_whole(encoded, [0, 0])]
    examples = []
    for window in found:
        inside = window.sequence == 1
        first = np.flatnonzero(inside & (window.offsets[:, 0] <= start) & (start < window.offsets[:, 1]))
        last = np.flatnonzero(inside & (window.offsets[:, 0] < end) & (end <= window.offsets[:, 1]))
        is_here = len(first) and len(last)
        examples.append(_read_whole(window, [first[0], last[-1]] if is_here else [0, 0]))
    return examples


def windows(encoded: Encoded, length: int, stride: int) -> list[Encoded]:
    """Cuts the second text of a pair so that each window has the first text, its special tokens and `length` tokens.

    Args:
      encoded: a pair of texts.
      length: of a window.
      stride: tokens that neighbouring windows share.

    Raises:
      ValueError: the first text leaves no room for the second, or no more than `stride`.
    """
    second = np.flatnonzero(encoded.sequence == 1)
    start, end = (second[0], second[-1] + 1) if len(second) else (len(encoded.ids),) * 2
    room = length - (len(encoded.ids) - (end - start))
    if room < 1:
        raise ValueError(f"the question has {start} tokens, which leaves no room for a context in {length}")
    if end - start > room and not 0 <= stride < room:
        raise ValueError(f"doc_stride {stride} must be at least 0 and below {room}, the room for the context")
    starts = range(start, max(end - stride, start + 1), room - stride) if end - start > room else [start]
    index = np.arange(len(encoded.ids))
    kept = [(index < start) | (index >= end) | ((index >= s) & (index < s + room)) for s in starts]
    return [Encoded(*(field[keep] for field in encoded)) for keep in kept]


def _messages(given: Any, role: str) -> list[Message]:
    """Messages from a text of `role`, a message, or a list of them, in OpenAI's words or ShareGPT's."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    messages = []
    for message in [given] if isinstance(given, dict) else given:
        if "from" in message:
            message = {"role": _SPEAKERS.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message["content"], str):
            raise ValueError(f"the content of a message is not a text: {message['content']!r:.40}")
        messages.append(message)
    return messages


def _shifted(parts: Sequence[tuple[np.ndarray, bool]]) -> Example:
    ids = np.concatenate([ids for ids, _ in parts])
    is_target = np.concatenate([np.full(len(ids), said) for ids, said in parts])
    return np.stack([ids[:-1], ids[1:], is_target[1:]]).astype(np.int32)


def _read_whole(encoded: Encoded, targets: Sequence[int]) -> Example:
    example = np.zeros((3, max(len(encoded.ids), len(targets))), np.int32)
    example[0, : len(encoded.ids)], example[1, : len(targets)] = encoded.ids, targets
    example[2, : len(encoded.ids)] = encoded.token_types
    return example


def _unknown(fields: dict[str, Any], needed: str) -> ValueError:
    return ValueError(f"its fields are {sorted(fields)}, and not {needed}")
