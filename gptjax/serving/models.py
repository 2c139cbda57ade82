"""A model as the server knows it: from what a request asks for to pieces of text."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.chat import prompt_ids
from gptjax.data.objectives import decoder_start, infill_ids
from gptjax.data.tokenizers import Encoded
from gptjax.generation.constraints import Automaton, Vocabulary
from gptjax.generation.engine import Engine, Output, Request
from gptjax.generation.scoring import Scores
from gptjax.generation.text import TextStream
from gptjax.loading import Loaded
from gptjax.models import EncoderDecoder
from gptjax.pipelines import Pipeline, embeddings
from gptjax.pipelines.reading import feature_extraction
from gptjax.serving.worker import Busy, Worker

_CONTEXT = 4  # ids of a prompt's end that decide how the first new one is spelled


class TokenScore(NamedTuple):
    """A token, its log-probability in nats (None for the first of a text), and the likeliest in its place."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """What a text gained.

    Attributes:
      place: which text.
      text: new characters.
      num_tokens: that were written.
      scores: of tokens, where asked for.
      finish_reason: as of `Output`; else None.
    """

    place: int
    text: str
    num_tokens: int
    scores: list[TokenScore]
    finish_reason: str | None


class ServedModel:
    """A model under a name.

    Args:
      name: what requests call it.
      loaded: as `gptjax.load` gives it.
      engine: of a model that generates; None for one that embeds.
      eos_ids: ids that end a text, besides the tokenizer's end.
      max_waiting: texts that may wait for a slot.
    """

    def __init__(
        self, name: str, loaded: Loaded, engine: Engine | None, eos_ids: Sequence[int] = (), max_waiting: int = 256
    ) -> None:
        model, params, tokenizer = loaded
        self.name, self.tokenizer, self.created = name, tokenizer, int(time.time())
        self.is_encoder_decoder, self.is_prefix_lm = isinstance(model, EncoderDecoder), model.config.prefix_lm
        self.vocab_size = model.config.vocab_size
        self.max_len = engine.cache_len if engine else model.config.max_seq_len
        turn_end = tokenizer.special_id("<|im_end|>")
        self.eos_ids = sorted({tokenizer.eos_id, *eos_ids, *([] if turn_end is None else [turn_end])})
        self.worker = Worker(engine, max_waiting) if engine else None
        reads = params if engine is None else {}
        self._pipe = Pipeline("feature-extraction", feature_extraction, model, reads, tokenizer, {}, {})
        self._max_waiting, self._num_embedding, self._embedding = max_waiting, 0, asyncio.Lock()

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What tokens are made of, for constraints."""
        return Vocabulary(self.tokenizer.to_json(), self.vocab_size, self.eos_ids)

    def spell(self, token: int) -> tuple[str, bytes]:
        """A token as text and as bytes; where those are no text by themselves, the text is 'bytes:' and their escapes."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text, text.encode()
        written = self.vocabulary.bytes_of(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written), written

    def encode(self, text: str) -> np.ndarray:
        """A prompt's ids with what the tokenizer puts before a text; special tokens in it are text."""
        ids = self.tokenizer.encode_with_specials(text).ids
        return ids if len(ids) else np.array([self.tokenizer.eos_id], np.int32)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """The ids of a conversation by the model's template, up to where the assistant speaks."""
        return prompt_ids(self.tokenizer, messages)

    def encode_infill(self, prefix: str, suffix: str) -> np.ndarray:
        """The ids that ask for what is between two texts.

        Raises:
          ValueError: the tokenizer has no tokens for that.
        """
        return infill_ids(self.tokenizer, prefix, suffix)

    async def write(
        self, requests: Sequence[Request], *, stop: Sequence[str] = (), spelled_alone: bool, seconds: float
    ) -> AsyncIterator[Piece]:
        """Writes texts; leaving the iteration (`contextlib.aclosing`) ends them.

        Args:
          requests: of an encoder-decoder, `prompt` is what is read, the source.
          stop: texts that end a text.
          spelled_alone: whether a text begins anew, as an answer does, or goes on after its prompt.
          seconds: how long it may take.

        Raises:
          Busy: too many wait.
          TimeoutError: it took longer.
          ValueError: a request that the engine refuses.
        """
        assert self.worker
        streams = [
            TextStream(self.tokenizer.decode, stop, [] if spelled_alone else r.prompt[-_CONTEXT:].tolist())
            for r in requests
        ]
        if self.is_encoder_decoder:
            start = np.array([decoder_start(self.tokenizer)])
            requests = [request._replace(prompt=start, source=request.prompt) for request in requests]
        deadline, going_on = time.monotonic() + seconds, set(range(len(requests)))
        with self.worker.writing(requests) as texts:
            while going_on:
                place, output = await asyncio.wait_for(texts.results.get(), deadline - time.monotonic())
                if isinstance(output, Exception):
                    raise output
                if place not in going_on:
                    continue
                request = requests[place]
                if isinstance(request.constraint, Automaton) and request.constraint.error:
                    raise ValueError(f"the text cannot go on as response_format asks: {request.constraint.error}")
                piece = self._piece(place, output, streams[place], wants_scores=request.logprobs)
                if piece.finish_reason:
                    going_on.remove(place)
                    if not output.finish_reason:
                        texts.stop(place)
                yield piece

    def _piece(self, place: int, output: Output, stream: TextStream, *, wants_scores: bool) -> Piece:
        text, num_tokens = "", 0
        for token in output.tokens.tolist():
            text += stream.add(token)
            num_tokens += 1
            if stream.stopped:
                break
        reason = "stop" if stream.stopped else output.finish_reason
        if reason:
            text += stream.end()
        scores = _token_scores(output, output.tokens)[:num_tokens] if wants_scores else []
        return Piece(place, text, num_tokens, scores, reason)

    async def score(self, prompts: Sequence[np.ndarray], seconds: float) -> list[list[TokenScore]]:
        """Scores each token of texts given those before it; raises as `write`."""
        assert self.worker
        found: dict[int, Scores] = {}
        with self.worker.writing(prompts) as texts:
            async with asyncio.timeout(seconds):
                while len(found) < len(prompts):
                    place, scores = await texts.results.get()
                    if isinstance(scores, Exception):
                        raise scores
                    found[place] = scores
        return [
            [TokenScore(int(ids[0]), None, []), *_token_scores(found[place], ids[1:])]
            for place, ids in enumerate(prompts)
        ]

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> tuple[list[np.ndarray], int]:
        """A vector for each text, and how many tokens they have; ids are taken as they are.

        Raises:
          Busy: too many wait.
          ValueError: a text that does not fit.
        """

        def run() -> tuple[list[np.ndarray], int]:
            encoded = [self.tokenizer.encode_with_specials(t) if isinstance(t, str) else _as_encoded(t) for t in texts]
            return embeddings(self._pipe, encoded), sum(len(row.ids) for row in encoded)

        if self._num_embedding > self._max_waiting:
            raise Busy
        self._num_embedding += 1
        try:
            async with self._embedding:
                return await asyncio.to_thread(run)
        finally:
            self._num_embedding -= 1

    def close(self) -> None:
        """Ends the model's thread."""
        if self.worker:
            self.worker.close()


def _token_scores(scores: Any, tokens: np.ndarray) -> list[TokenScore]:
    return [
        TokenScore(int(token), float(logprob), [(int(i), float(x)) for i, x in zip(ids, top, strict=True)])
        for token, logprob, ids, top in zip(tokens, scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True)
    ]


def _as_encoded(ids: Sequence[int]) -> Encoded:
    row = np.array(ids, np.int32)
    return Encoded(row, np.zeros_like(row), np.zeros((len(row), 2), np.int32), np.zeros_like(row))
