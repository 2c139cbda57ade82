"""The one-line tasks: `pipeline(task, model)` gives a function of texts that returns what Transformers' of that name does.

Question answering, translation and text-to-text, which Transformers 5 dropped, return what its last version 4 did.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from gptjax import loading
from gptjax.models import BERT, GPT, EncoderDecoder, Model
from gptjax.pipelines.base import Pipeline, eos_ids, file_defaults, local_path, source_facts
from gptjax.pipelines.generating import text2text_generation, text_generation, translation
from gptjax.pipelines.reading import (
    embeddings,
    feature_extraction,
    fill_mask,
    question_answering,
    text_classification,
)

__all__ = ["TASKS", "Pipeline", "embeddings", "eos_ids", "pipeline", "source_facts"]

# What a model's files may ask for and generation does not do, with the values that ask for nothing.
_UNSUPPORTED = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
    "bad_words_ids": None,
}


class Task(NamedTuple):
    """What a task runs and needs.

    Attributes:
      function: of a pipeline, inputs and arguments.
      families: models that can do it.
      head: the `model.head` that it needs, None for any.
      generates: whether it writes text.
    """

    function: Callable[..., Any]
    families: tuple[type[Model], ...]
    head: str | None = None
    generates: bool = False


TASKS = {
    "text-generation": Task(text_generation, (GPT,), "language_model", True),
    "text2text-generation": Task(text2text_generation, (EncoderDecoder,), "language_model", True),
    "translation": Task(translation, (EncoderDecoder,), "language_model", True),
    "text-classification": Task(text_classification, (BERT, GPT), "sequence_classification"),
    "question-answering": Task(question_answering, (BERT, GPT), "span"),
    "fill-mask": Task(fill_mask, (BERT,), "masked_lm"),
    "feature-extraction": Task(feature_extraction, (BERT, GPT, EncoderDecoder)),
}


def pipeline(task: str, model: Any, **arguments: Any) -> Pipeline:
    """Makes a one-line task.

    >>> generator = pipeline("text-generation", model="gpt2")  # doctest: +SKIP
    >>> generator("The quick brown fox jumps over the ", max_length=50, num_return_sequences=3)  # doctest: +SKIP

    Args:
      task: a name in `TASKS`, or 'translation_XX_to_YY'.
      model: a workdir, a Hugging Face folder, a GGUF file or a hub name, as `gptjax.load` takes it, or what that returned.
      arguments: of every call.

    Raises:
      ValueError: an unknown task, a source that cannot be loaded, or a model without the head that the task needs.
    """
    needs = _task(task)
    facts: dict[str, Any] = {}
    if isinstance(model, str | os.PathLike):
        path = local_path(model)
        facts, model = source_facts(path), loading.load(path)
    module, params, tokenizer = model
    family, head = type(module).__name__, module.config.head
    if not isinstance(module, needs.families) or (needs.head and head != needs.head):
        families = " or ".join(kind.__name__ for kind in needs.families)
        with_head = f" with model.head {needs.head!r}" if needs.head else ""
        raise ValueError(f"task {task!r} needs a {families}{with_head}; this is a {family} with model.head {head!r}")
    if needs.generates:
        for name, neutral in _UNSUPPORTED.items():
            wanted = file_defaults(task, facts).get(name, neutral)
            if wanted != neutral:
                warnings.warn(f"the model's files ask for {name}={wanted}, which gptjax does not do", stacklevel=2)
    return Pipeline(task, needs.function, module, params, tokenizer, facts, arguments)


def _task(name: str) -> Task:
    known = "translation" if name.startswith("translation_") else name
    if known not in TASKS:
        raise ValueError(f"task {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[known]
