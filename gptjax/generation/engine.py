"""Continuous batching: texts join and leave a running batch, in programs whose number does not depend on what is asked.

A batch has one slot, eight or all of them, and room for 64, 256, 1024, ... tokens in each; prompts are read in parts of
three shapes. That is all there is to compile: `num_compiles` counts, and `Engine.warm_up` compiles it beforehand. A batch
that does not grow is as large as it gets from the start, for seven programs in all.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gptjax.array_types import Params
from gptjax.generation import decoding
from gptjax.generation.decoding import NUM_EOS, Entry, Slots
from gptjax.generation.sampling import Sampling, check_sampling
from gptjax.models import GPT, EncoderDecoder, Model

_PART = 256  # tokens of a prompt read at once, so that those who write do not wait long
_SHORT = 64  # prompts up to here are read several at once
_ROWS = 8  # that many, of which half must be there: a row of padding takes as long as a prompt
_TOKENS_AT_ONCE = 64  # written in one dispatch, at most
_NOWHERE = 1 << 30  # beyond the last slot


class Constraint(Protocol):
    """What a text may be, token by token."""

    def allowed(self) -> np.ndarray:
        """bool [V], the tokens that may come next."""

    def advance(self, token: int) -> None:
        """Takes note of the token that came."""


class Request(NamedTuple):
    """A text to write.

    Attributes:
      prompt: token ids, at least one; of an encoder-decoder, what the target begins with.
      max_new_tokens: the most tokens to write.
      eos_ids: ids that end the text, at most `NUM_EOS`.
      sampling: how tokens are chosen.
      seed: of the random choices; the text depends on it, and not on who else is in the batch.
      source: token ids, for an encoder-decoder.
      logit_bias: added to the logits of token ids.
      logprobs: whether to give those of the tokens, and of the likeliest.
      constraint: a mask for each token; such a text is written one token a dispatch.
    """

    prompt: np.ndarray
    max_new_tokens: int
    eos_ids: Sequence[int] = ()
    sampling: Sampling = Sampling()
    seed: int = 0
    source: np.ndarray | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: bool = False
    constraint: Constraint | None = None


class Output(NamedTuple):
    """What a text has gained since the last time.

    Attributes:
      id: as `submit` gave it.
      tokens: new ids [N], without the one that ended the text.
      logprobs, top_ids, top_logprobs: [N], [N, NUM_TOP] and [N, NUM_TOP]; None unless asked for.
      finish_reason: 'stop' after an id of `eos_ids`, 'length' at max_new_tokens or the end of the context; else None.
    """

    id: int
    tokens: np.ndarray
    logprobs: np.ndarray | None
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    finish_reason: str | None


class _Text(NamedTuple):
    id: int
    request: Request
    limit: int  # tokens in all


class _Part(NamedTuple):
    """A long prompt, of which `done` tokens are read into a cache of its own."""

    text: _Text
    cache: list
    done: int


@functools.cache
def _programs() -> dict[str, Callable[..., Any]]:
    options = decoding.CPU_OPTIONS if jax.default_backend() == "cpu" else {}

    def compiled(function: Callable[..., Any], static: Sequence[str] = (), donated: Sequence[str] = ()) -> Any:
        return jax.jit(function, static_argnames=static, donate_argnames=donated, compiler_options=options)

    return {
        "init_slots": compiled(decoding.init_slots, ("model", "num_slots", "cache_len", "memory_len")),
        "init_cache": compiled(decoding.init_cache, ("model", "batch_size", "cache_len", "memory_len")),
        "grow": compiled(decoding.grow, donated=("new",)),
        "prefill": compiled(decoding.prefill, ("model",), ("cache",)),
        "insert": compiled(decoding.insert, donated=("slots",)),
        "decode": compiled(decoding.decode, ("model", "capacity"), ("slots",)),
        "end": compiled(_end, donated=("slots",)),
        "set_bias": compiled(_set_bias, donated=("slots",)),
    }


def num_compiles() -> int:
    """How many programs generation has compiled in this process."""
    return sum(program._cache_size() for program in _programs().values())  # type: ignore[attr-defined]


def _run(name: str, *arguments: Any, **static: Any) -> Any:
    return _programs()[name](*arguments, **static)


def _end(slots: Slots, slot: jax.Array) -> Slots:
    return slots._replace(active=slots.active.at[slot].set(False))


def _set_bias(slots: Slots, slot: jax.Array, bias: jax.Array) -> Slots:
    return slots._replace(bias=slots.bias.at[slot].set(bias, mode="drop"))


class Engine:
    """Writes texts for many requests at once. Not thread-safe: one thread submits and steps.

    Args:
      model, params: a decoder-only language model, or an encoder-decoder, as `gptjax.load` gives them.
      num_slots: texts that are written at once; others wait.
      cache_len: tokens that a text may have, prompt and all; None for the model's context. With `num_slots` it bounds the
        memory.
      grows: whether slots and room are added as texts need them, so that few and short ones are written faster.
      weights: 'float32', 'bfloat16', 'int8' or 'int4', the format that kernels are kept in; None for the model's dtype, and
        float32 on CPU.

    Raises:
      ValueError: a model that does not generate, an unknown format, or a size out of range.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        num_slots: int = 8,
        cache_len: int | None = None,
        grows: bool = True,
        weights: str | None = None,
    ):
        c = model.config
        if not isinstance(model, GPT | EncoderDecoder) or c.head != "language_model":
            raise ValueError(f"a {type(model).__name__} with model.head {c.head!r} does not generate text")
        if num_slots < 1:
            raise ValueError(f"num_slots {num_slots} must be at least 1")
        if cache_len is not None and not 1 <= cache_len <= c.max_seq_len:
            raise ValueError(f"cache_len {cache_len} must be from 1 to the model's context, {c.max_seq_len}")
        on_cpu = jax.default_backend() == "cpu"
        self.model, self.params = decoding.prepare(
            model, params, weights or ("float32" if on_cpu else model.config.dtype)
        )
        self.num_slots, self.cache_len = num_slots, cache_len or c.max_seq_len
        self.memory_len = c.max_seq_len if isinstance(model, EncoderDecoder) else 0
        self.grows = grows
        self._rows = min(_ROWS, num_slots)
        self._batch_sizes = sorted({1, self._rows, num_slots})
        self._whole = _PART if grows or self.memory_len else _SHORT  # tokens; longer prompts are read in parts
        self._waiting: collections.deque[_Text] = collections.deque()
        self._part: _Part | None = None
        self._texts: list[_Text | None] = []  # by slot
        self._lengths: list[int] = []  # of their tokens
        self._ids = 0
        self._slots: Any = None
        self._reset()

    def submit(self, request: Request) -> int:
        """Lines a text up; returns its id.

        Raises:
          ValueError: a prompt that is empty or too long, ids outside the vocabulary, or numbers out of range.
        """
        c = self.model.config
        if (self.memory_len > 0) != (request.source is not None):
            raise ValueError("a source must be given for an encoder-decoder, and only for one")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {request.max_new_tokens} must be at least 1")
        if len(request.eos_ids) > NUM_EOS:
            raise ValueError(f"eos_ids: {len(request.eos_ids)} are more than {NUM_EOS}")
        if not 0 <= request.seed < 1 << 32:
            raise ValueError(f"seed {request.seed} must be from 0 to 2**32 - 1")
        check_sampling(request.sampling)
        longest = self.cache_len if request.source is None else min(self.cache_len, _PART)
        prompt = check_ids("prompt", request.prompt, longest, c.vocab_size)
        if request.source is not None:
            source = check_ids("source", request.source, self.memory_len, c.vocab_size)
            request = request._replace(source=source)
        for token, bias in (request.logit_bias or {}).items():
            if not 0 <= token < c.vocab_size or not np.isfinite(bias):
                raise ValueError(
                    f"logit_bias {bias} of token {token}: tokens are 0 to {c.vocab_size - 1}, biases finite numbers"
                )
        self._ids += 1
        # The last token of a text is not read again, so it needs no room.
        limit = min(len(prompt) + request.max_new_tokens, self.cache_len + 1)
        sampling = request.sampling._replace(top_k=min(int(request.sampling.top_k), c.vocab_size))
        self._waiting.append(_Text(self._ids, request._replace(prompt=prompt, sampling=sampling), limit))
        return self._ids

    def cancel(self, text_id: int) -> None:
        """Ends a text without an output; does nothing if it is over."""
        self._waiting = collections.deque(text for text in self._waiting if text.id != text_id)
        if self._part and self._part.text.id == text_id:
            self._part = None
        for slot, text in enumerate(self._texts):
            if text and text.id == text_id:
                self._texts[slot] = None
                self._slots = _run("end", self._slots, np.int32(slot))

    def reset(self) -> None:
        """Forgets all texts; the engine can be used again even if a step failed."""
        self._waiting.clear()
        self._part = None
        self._reset()

    @property
    def num_active(self) -> int:
        """Texts that are being read or written."""
        return sum(text is not None for text in self._texts) + (self._part is not None)

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    def step(self, max_tokens: int = 16) -> list[Output]:
        """Lets texts in, reads a part of a prompt, and writes up to `max_tokens` tokens of each text in the batch."""
        if not self.num_active:
            self._reset()
        if self._part:
            self._read_part(self._part)
        self._read_waiting()
        if self._waiting and self.num_active < self.num_slots:
            max_tokens = 1  # who has a slot does not wait for those who write
        return self._write(max_tokens) if any(self._texts) else []

    def generate(self, prompts: Sequence[np.ndarray], *, num_samples: int = 1, **arguments: Any) -> list[np.ndarray]:
        """Collects what `stream`, which has the same arguments, writes; see `generate` for what it gives."""
        new: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
        for i, tokens in self.stream(prompts, num_samples=num_samples, **arguments):
            new[i] += tokens.tolist()
        return [np.array(ids, np.int32) for ids in new]

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        sampling: Sampling = Sampling(),  # noqa: B008 - immutable
        num_samples: int = 1,
        seed: int = 0,
        sources: Sequence[np.ndarray] | None = None,
        tokens_at_once: int = _TOKENS_AT_ONCE,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Continues prompts, when nothing else is under way; see `generate` for what it takes and raises.

        Yields:
          (the text's number, up to `tokens_at_once` new ids) as they come; to leave the iteration ends the texts.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples {num_samples} must be at least 1")
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"sources: {len(sources)} for {len(prompts)} prompts")
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"seed {seed} must be from 0 to 2**32 - 1")
        texts = [
            Request(prompt, max_new_tokens, eos_ids, sampling, 0, source)
            for prompt, source in itertools.zip_longest(prompts, sources or [])
            for _ in range(num_samples)
        ]
        seeds = np.random.SeedSequence(seed)
        new: list[list[int]] = [[] for _ in texts]
        ids: dict[int, int] = {}
        left = dict(enumerate(texts))
        try:
            while left:
                drawn = seeds.spawn(1)[0].generate_state(len(texts))
                ids = {self.submit(text._replace(seed=int(drawn[i]))): i for i, text in left.items()}
                left = {}
                while self.num_active or self.num_waiting:
                    for output in self.step(tokens_at_once):
                        i = ids[output.id]
                        new[i] += output.tokens.tolist()
                        # A full context is no end: what is later in it is read again.
                        if output.finish_reason == "length" and len(new[i]) < max_new_tokens and not self.memory_len:
                            text = np.concatenate([texts[i].prompt, new[i]]).astype(np.int32)
                            kept = text[-max(1, self.cache_len // 2) :]
                            left[i] = texts[i]._replace(prompt=kept, max_new_tokens=max_new_tokens - len(new[i]))
                        yield i, output.tokens
        finally:
            for text_id in ids:
                self.cancel(text_id)

    def warm_up(self) -> None:
        """Compiles every program that a request may need."""
        nothing = np.zeros(self.model.config.vocab_size, np.float32)
        for cache_len in ladder(self.cache_len):  # a batch of one slot may get the others at any length
            self._reset()
            self._resize(1, cache_len)
            self._resize(self.num_slots, cache_len)
        for num_slots in self._batch_sizes:
            self._reset()
            for cache_len in ladder(self.cache_len):
                self._resize(num_slots, cache_len)
                for rows, longest in sorted({(1, _SHORT), (self._rows, _SHORT), (1, _PART)}):
                    tokens = np.zeros((rows, min(longest, self.cache_len)), np.int32)
                    for memory_len in ladder(self.memory_len) if self.memory_len else (None,):
                        source = None if memory_len is None else np.zeros((rows, memory_len), np.int32)
                        self._insert([], [], tokens, *self._prefill([1], tokens, source), source)
                longest = _PART
                while longest < self.cache_len and not self.memory_len:
                    longest *= 2
                    staging = self._staging(longest)
                    tokens = np.zeros((1, staging[0].num_slots), np.int32)
                    part = tokens if self.model.config.prefix_lm else tokens[:, :_PART]
                    self._insert([], [], tokens, *self._prefill([1], part, None, staging), None)
                self._decode(1, False, False)
                self._slots = _run("set_bias", self._slots, np.int32(_NOWHERE), nothing)
                self._slots = _run("end", self._slots, np.int32(0))
        self._reset()

    def _reset(self) -> None:
        """An empty batch."""
        self._shape = (1, ladder(self.cache_len)[0]) if self.grows else (self.num_slots, self.cache_len)
        self._slots = _run("init_slots", self.model, *self._shape, self.memory_len)
        self._texts, self._lengths = [None] * self._shape[0], [0] * self._shape[0]

    def _resize(self, num_slots: int, cache_len: int) -> None:
        """Makes the batch larger where it is smaller, one size after the other, so that there are few programs."""
        slots = [(size, 0) for size in self._batch_sizes if size <= num_slots]
        for shape in (*slots, *((0, length) for length in ladder(self.cache_len) if length <= cache_len)):
            shape = (max(shape[0], self._shape[0]), max(shape[1], self._shape[1]))
            if shape != self._shape:
                larger = _run("init_slots", self.model, *shape, self.memory_len)
                self._slots, self._shape = _run("grow", self._slots, larger), shape
        missing = self._shape[0] - len(self._texts)
        self._texts += [None] * missing
        self._lengths += [0] * missing

    def _read_waiting(self) -> None:
        """Lets in who waits, as slots are free: a long prompt, or some short ones."""
        free = self.num_slots - self.num_active
        group: list[_Text] = []
        while self._waiting and len(group) < min(free, self._rows):
            length = len(self._waiting[0].request.prompt)
            if length > self._whole and not group and self._part is None:
                self._read_part(_Part(self._waiting.popleft(), self._staging(length), 0))
                return
            if length > self._whole or (group and max(length, len(group[0].request.prompt)) > _SHORT):
                break
            group.append(self._waiting.popleft())
        if not group:
            return
        if self.grows and 2 * len(group) < self._rows:
            self._waiting.extendleft(reversed(group[1:]))
            del group[1:]
        rows = 1 if len(group) == 1 and self.grows else self._rows
        longest = max(len(text.request.prompt) for text in group)
        tokens = pad(
            [t.request.prompt for t in group], rows, min(_SHORT if longest <= _SHORT else _PART, self.cache_len)
        )
        source = None
        if self.memory_len:
            sources = [np.asarray(text.request.source) for text in group]
            source = pad(sources, rows, at_least(max(map(len, sources)), self.memory_len), fill=-1)
        self._join(group, tokens, *self._prefill([len(t.request.prompt) for t in group], tokens, source), source)

    def _read_part(self, part: _Part) -> None:
        """Reads the next part of a long prompt; the last one ends with the prompt, and so reads some tokens again."""
        prompt = part.text.request.prompt
        if self.model.config.prefix_lm:  # all of it sees all of it
            tokens = pad([prompt], 1, part.cache[0].num_slots)
            self._join([part.text], tokens, *self._prefill([len(prompt)], tokens, None, part.cache), None)
            return
        start = max(0, min(part.done, len(prompt) - _PART))
        tokens = pad([prompt[start : start + _PART]], 1, min(_PART, self.cache_len))
        logits, cache = self._prefill([min(len(prompt) - start, _PART)], tokens, None, part.cache, start)
        self._part = None
        if start + _PART < len(prompt):
            self._part = part._replace(cache=cache, done=start + _PART)
        else:
            self._join([part.text], pad([prompt], 1, cache[0].num_slots), logits, cache, None)

    def _staging(self, length: int) -> list:
        """A cache to read a long prompt into; its length is a power of two, or all there is."""
        longest = min(1 << (length - 1).bit_length(), self.cache_len) if self.grows else self.cache_len
        return _run("init_cache", self.model, 1, longest, 0)

    def _prefill(
        self,
        lengths: Sequence[int],
        tokens: np.ndarray,
        source: np.ndarray | None,
        cache: list | None = None,
        start: int = 0,
    ) -> tuple[jax.Array, list]:
        """Reads `tokens` [R, C], of which the first rows have `lengths`. `source` is -1 where it is padding."""
        last = [length - 1 for length in lengths] + [0] * (len(tokens) - len(lengths))
        memory = None if source is None else (np.maximum(source, 0), (source >= 0).astype(np.int32))
        arguments = (cache, tokens.astype(np.int32), np.int32(start), np.array(last, np.int32), memory)
        return _run("prefill", self.model, self.params, *arguments)

    def _join(
        self, group: Sequence[_Text], tokens: np.ndarray, logits: jax.Array, cache: list, source: np.ndarray | None
    ) -> None:
        """Gives each text of a group that was read a slot."""
        lengths = [len(text.request.prompt) for text in group]
        together = sum(text is not None for text in self._texts) + len(group)
        size = next(size for size in self._batch_sizes if size >= together)
        self._resize(size, at_least(max(lengths), self.cache_len))
        free = (slot for slot, text in enumerate(self._texts) if text is None)
        slots = [next(free) for _ in group]
        self._insert(group, slots, tokens, logits, cache, source)
        for slot, text in zip(slots, group, strict=True):
            self._texts[slot], self._lengths[slot] = text, len(text.request.prompt)
            if text.request.logit_bias:
                self._slots = _run("set_bias", self._slots, np.int32(slot), self._bias(text.request))

    def _insert(
        self,
        group: Sequence[_Text],
        slots: Sequence[int],
        tokens: np.ndarray,
        logits: jax.Array,
        cache: list,
        source: np.ndarray | None,
    ) -> None:
        def column(values: Sequence[Any], fill: Any, dtype: Any) -> np.ndarray:
            return np.array([*values, *[fill] * (len(tokens) - len(values))], dtype)

        numbers: dict[str, Any] = {
            name: column(
                [getattr(text.request.sampling, name) for text in group],
                neutral,
                np.float32 if isinstance(neutral, float) else np.int32,
            )
            for name, neutral in Sampling()._asdict().items()
        }
        eos_ids = [[*text.request.eos_ids, *[-1] * (NUM_EOS - len(text.request.eos_ids))] for text in group]
        entry = Entry(
            slot=column(slots, _NOWHERE, np.int32),
            length=column([len(text.request.prompt) for text in group], 1, np.int32),
            limit=column([text.limit for text in group], 1, np.int32),
            seed=column([text.request.seed for text in group], 0, np.uint32),
            eos_ids=column(eos_ids, [-1] * NUM_EOS, np.int32),
            sampling=Sampling(**numbers),
        )
        memory = None if source is None else (source >= 0).astype(np.int32)
        self._slots = _run("insert", self._slots, entry, tokens.astype(np.int32), logits, cache, memory)

    def _bias(self, request: Request) -> np.ndarray:
        """What is added to a text's next logits, [V]."""
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        for token, value in (request.logit_bias or {}).items():
            bias[token] = value
        return bias if request.constraint is None else np.where(request.constraint.allowed(), bias, -np.inf)

    def _decode(self, max_tokens: int, until_free: bool, logprobs: bool) -> decoding.Written:
        flags = (np.int32(max_tokens), np.bool_(until_free), np.bool_(logprobs))
        self._slots, written = _run("decode", self.model, self.params, self._slots, *flags, capacity=_TOKENS_AT_ONCE)
        return written

    def _write(self, max_tokens: int) -> list[Output]:
        """One dispatch of the whole batch."""
        texts = [(slot, text) for slot, text in enumerate(self._texts) if text]
        for slot, text in texts:
            if text.request.constraint:
                max_tokens = 1
                self._slots = _run("set_bias", self._slots, np.int32(slot), self._bias(text.request))
        longest = max(self._lengths[slot] for slot, _ in texts)
        self._resize(1, at_least(min(longest + 1, self.cache_len), self.cache_len))
        room = max(1, self._shape[1] - longest)  # for more, the batch grows the next time
        asked = any(text.request.logprobs for _, text in texts)
        written = self._decode(min(max_tokens, room, _TOKENS_AT_ONCE), bool(self._waiting), asked)
        tokens, logprobs, top = jax.device_get(
            (written.tokens, written.logprobs, (written.top_ids, written.top_logprobs) if asked else None)
        )
        return [self._output(slot, text, tokens, logprobs, top) for slot, text in texts]

    def _output(self, slot: int, text: _Text, tokens: np.ndarray, logprobs: np.ndarray, top: Any) -> Output:
        """What the text in `slot` has gained; frees the slot if that is its end."""
        request, column = text.request, tokens[:, slot]
        column = column[column >= 0]  # all of them before its end
        self._lengths[slot] += len(column)
        reason = "length" if self._lengths[slot] >= text.limit else None
        if column[-1] in request.eos_ids:
            reason, column = "stop", column[:-1]
        if request.constraint:
            for token in column:
                request.constraint.advance(int(token))
        if reason:
            self._texts[slot] = None
        n = len(column)
        output = Output(text.id, column, None, None, None, reason)
        if not request.logprobs:
            return output
        return output._replace(logprobs=logprobs[:n, slot], top_ids=top[0][:n, slot], top_logprobs=top[1][:n, slot])


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008 - immutable
    num_samples: int = 1,
    seed: int = 0,
    sources: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Continues prompts, up to 32 at once; to do so again and again, keep an `Engine`.

    When a decoder-only model's context is full, the later half of it is read again as a new prompt and generation goes on.

    Args:
      model, params: a decoder-only model or an encoder-decoder.
      prompts: token ids, at least one each; of an encoder-decoder, what the target begins with.
      max_new_tokens: the most tokens to write for each text.
      eos_ids: ids that end a text; none if empty.
      sampling: how to choose tokens.
      num_samples: independent continuations of each prompt.
      seed: of the random choices.
      sources: of an encoder-decoder, the source of each prompt, token ids.

    Returns:
      `num_samples` arrays of new ids for each prompt, one prompt's after another's, without the id that ended them.

    Raises:
      ValueError: a model that does not generate, an empty prompt, one longer than the context, ids outside the vocabulary,
        or numbers out of range.
    """
    num_slots = min(32, 1 << max(0, len(prompts) * max(1, num_samples) - 1).bit_length())
    return Engine(model, params, num_slots=num_slots).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        sampling=sampling,
        num_samples=num_samples,
        seed=seed,
        sources=sources,
    )


def check_ids(what: str, ids: np.ndarray, longest: int, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int32)
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the {what} has {len(ids)} tokens; the model's context holds 1 to {longest}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"the {what} holds token id {wrong}; the vocabulary's are 0 to {vocab_size - 1}")
    return ids


def ladder(longest: int) -> list[int]:
    """64, 256, 1024, ... and `longest`: the lengths that there are programs for."""
    lengths = [_SHORT]
    while lengths[-1] < longest:
        lengths.append(4 * lengths[-1])
    return [*lengths[:-1], longest]


def at_least(length: int, longest: int) -> int:
    return next(n for n in ladder(longest) if n >= length)


def pad(rows: Sequence[np.ndarray], num_rows: int, length: int, fill: int = 0) -> np.ndarray:
    padded = np.full((num_rows, length), fill, np.int32)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = ids
    return padded
