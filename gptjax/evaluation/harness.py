"""A model for EleutherAI's lm-eval, in process; needs the extra `harness`.

>>> lm_eval.simple_evaluate(HarnessLM("runs/x"), tasks=["lambada_openai"])  # doctest: +SKIP
"""

import itertools
import json
import os
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from gptjax.data.chat import encode_rendered, render, with_template
from gptjax.data.objectives import document_start
from gptjax.evaluation.likelihood import (
    Request,
    Score,
    encode_request,
    log_likelihoods,
    windows,
)
from gptjax.evaluation.tasks import cut_at
from gptjax.generation.engine import generate
from gptjax.generation.sampling import Sampling
from gptjax.loading import load

_CHAT = "\ue001"  # begins what the chat template wrote, whose special tokens are meant


class HarnessLM(LM):
    """Answers lm-eval's requests: prompts too long for the model's context lose their beginning.

    Args:
      source: of a decoder-only language model, as `gptjax.load` takes it.

    Raises:
      ValueError: it cannot be loaded, or is another kind of model (at the first request).
    """

    def __init__(self, source: str | os.PathLike) -> None:
        super().__init__()
        self.source = os.fspath(source)
        self.loaded = load(self.source)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches of requests go by."""
        return self.source

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(nats, whether all tokens are the likeliest) of continuations given contexts."""
        scores = self._score([self._request(*instance.args) for instance in requests])
        return [(float(score.log_probs.sum(dtype=np.float64)), bool(score.hits.all())) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of whole texts, in windows that share one token."""
        tokenizer, length = self.loaded.tokenizer, self.loaded.model.config.max_seq_len
        start = document_start(tokenizer)
        parts = [list(windows(tokenizer.encode(i.args[0]), start, length, length)) for i in requests]
        scores = iter(self._score([part for text in parts for part in text if len(part.continuation)]))
        counts = [sum(len(part.continuation) > 0 for part in text) for text in parts]
        return [sum(float(next(scores).log_probs.sum(dtype=np.float64)) for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts up to the first of `until`; requests of the same settings are written together."""
        model, params, tokenizer = self.loaded
        texts: list[str] = [""] * len(requests)
        settings = [json.dumps(instance.args[1], sort_keys=True) for instance in requests]
        order = sorted(range(len(requests)), key=settings.__getitem__)
        for setting, group in itertools.groupby(order, settings.__getitem__):
            options, members = json.loads(setting), list(group)
            until = options.pop("until", [])
            new_tokens = options.pop("max_gen_toks", 256)
            do_sample = options.pop("do_sample", options.get("temperature", 0) > 0)
            known = {name: options.pop(name) for name in Sampling._fields if name in options}
            if options:
                raise ValueError(f"generation options {sorted(options)} are not known")
            room = max(1, model.config.max_seq_len - new_tokens)
            written = generate(
                model,
                params,
                [self._context(requests[i].args[0])[-room:] for i in members],
                max_new_tokens=new_tokens,
                eos_ids=[tokenizer.eos_id],
                sampling=Sampling(**(known if do_sample else {"temperature": 0.0})),
            )
            for i, ids in zip(members, written, strict=True):
                texts[i] = cut_at(tokenizer.decode(ids), [until] if isinstance(until, str) else until)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """What the tokenizer's chat template makes of a conversation, marked as such."""
        return _CHAT + render(self.loaded.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for lm-eval's report."""
        return with_template(self.loaded.tokenizer).chat_template or "" if chat_template else ""

    def _score(self, requests: list[Request]) -> list[Score]:
        return log_likelihoods(self.loaded.model, self.loaded.params, requests)

    def _request(self, context: str, continuation: str) -> Request:
        if context.startswith(_CHAT):
            return Request(self._context(context), self.loaded.tokenizer.encode(continuation))
        return encode_request(self.loaded.tokenizer, context, continuation)

    def _context(self, text: str) -> np.ndarray:
        tokenizer = self.loaded.tokenizer
        if text.startswith(_CHAT):
            return encode_rendered(tokenizer, text.removeprefix(_CHAT))
        ids = tokenizer.encode_with_specials(text).ids
        return ids if len(ids) else document_start(tokenizer)
