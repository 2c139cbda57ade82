"""What a trained model makes of a few examples, for samples.txt."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from gptjax.data.objectives import texts_per_row
from gptjax.data.pipeline import PackedData, eval_batches


def sample(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    """Up to `eval.num_samples` texts: continuations of the prompt, outputs beside targets, or masked texts filled in."""
    if not config.eval.num_samples:
        return []
    by_objective = {"sft": _answers, "dpo": _answers, "classification": _choices, "question_answering": _choices}
    by_family = {"gpt": _continuations, "encoder_decoder": _outputs, "bert": _fillings}
    return (by_objective | by_family)[
        config.data.objective if config.data.objective in by_objective else config.model.family
    ](config, model, params, data)


def _continuations(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling

    e, tokenizer = config.eval, data.tokenizer
    prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(e.sample_prompt)])[-config.model.max_seq_len :]
    new = generate(
        model,
        params,
        [prompt],
        max_new_tokens=e.sample_tokens,
        eos_ids=[tokenizer.eos_id],
        sampling=Sampling(temperature=0.8, top_k=50),
        num_samples=e.num_samples,
        seed=config.seed,
    )
    return [e.sample_prompt + tokenizer.decode(ids) for ids in new]


def _outputs(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    """Greedy outputs for validation sources."""
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling

    pairs = list(itertools.islice(_validation_pairs(config, data), config.eval.num_samples))
    outputs = generate(
        model,
        params,
        [inputs[:1] for _, inputs, _ in pairs],
        max_new_tokens=config.eval.sample_tokens,
        eos_ids=[data.tokenizer.eos_id],
        sampling=Sampling(temperature=0.0),
        sources=[source for source, _, _ in pairs],
    )
    return [
        f"source: {_text(data, source)}\noutput: {_text(data, output)}\ntarget: {_text(data, target)}"
        for (source, _, target), output in zip(pairs, outputs, strict=True)
    ]


def _validation_pairs(config: ConfigDict, data: PackedData) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields source tokens, the decoder's inputs and targets of each document in the first validation rows."""
    (batch,) = eval_batches(data, batch_size=config.eval.num_samples, max_batches=1)
    for row in range(len(batch["inputs"])):
        for number in range(1, 1 + batch["segment_ids"][row].max()):
            here = batch["segment_ids"][row] == number
            source = batch["encoder_tokens"][row][batch["encoder_segment_ids"][row] == number]
            yield source, batch["inputs"][row][here], batch["targets"][row][here]


def _answers(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    """Greedy answers to validation prompts; of preferences, beside the chosen ones."""
    from gptjax.generation.engine import generate
    from gptjax.generation.sampling import Sampling

    (batch,) = eval_batches(data, batch_size=config.eval.num_samples, max_batches=1)
    pairs = []
    for row, number in (
        (row, number) for row, ids in enumerate(batch["segment_ids"]) for number in range(1, 1 + max(ids))
    ):
        here = batch["segment_ids"][row] == number
        if config.data.objective == "sft" or number % 2:
            answer = batch["targets"][row][here & (batch["loss_weights"][row] > 0)]
            start = int(np.argmax(batch["loss_weights"][row][here] > 0))
            pairs.append((batch["inputs"][row][here][: start + 1], answer))
    pairs = pairs[: config.eval.num_samples]
    outputs = generate(
        model,
        params,
        [prompt for prompt, _ in pairs],
        max_new_tokens=config.eval.sample_tokens,
        eos_ids=[data.tokenizer.eos_id],
        sampling=Sampling(temperature=0.0),
    )
    return [
        f"prompt: {_text(data, prompt)}\noutput: {_text(data, output)}\ntarget: {_text(data, answer)}"
        for (prompt, answer), output in zip(pairs, outputs, strict=True)
    ]


def _choices(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    """Validation texts with the label, or the answer, that the model gives and the right one."""
    import jax

    from gptjax.training.step import apply_model

    (batch,) = eval_batches(data, batch_size=config.eval.num_samples, max_batches=1)
    choices = jax.jit(lambda params, batch: apply_model(model, params, batch)[0].argmax(-1))(params, batch)

    def said(row: int, choice: np.ndarray) -> str:
        if len(choice) == 1:
            return str(choice[0])
        return _text(data, batch["inputs"][row][choice[0] : choice[1] + 1])

    num_texts = texts_per_row(config.data.objective, data.seq_len) or 1
    asked = [np.asarray(x).reshape(len(x), num_texts, -1) for x in (choices, batch["targets"])]
    texts = [
        f"text:   {_text(data, batch['inputs'][row][batch['segment_ids'][row] == text + 1])}\n"
        f"output: {said(row, asked[0][row, text])}\ntarget: {said(row, asked[1][row, text])}"
        for row, segments in enumerate(batch["segment_ids"])
        for text in range(segments.max())
    ]
    return texts[: config.eval.num_samples]


def _fillings(config: ConfigDict, model: Any, params: Any, data: PackedData) -> list[str]:
    """The first tokens of validation rows: as the model reads them, with its choices, and as they were."""
    import jax

    from gptjax.training.step import apply_model

    (batch,) = eval_batches(data, batch_size=config.eval.num_samples, max_batches=1)
    choices = jax.jit(lambda params, batch: apply_model(model, params, batch)[0].argmax(-1))(params, batch)
    filled = np.where(batch["loss_weights"] > 0, np.asarray(choices), batch["targets"])
    texts = []
    for read, said, was, segments in zip(batch["inputs"], filled, batch["targets"], batch["segment_ids"], strict=True):
        shown = np.flatnonzero(segments)[: config.eval.sample_tokens]
        if len(shown):
            texts.append(
                f"masked: {_text(data, read[shown])}\nfilled: {_text(data, said[shown])}\ntext:   {_text(data, was[shown])}"
            )
    return texts


def _text(data: PackedData, ids: np.ndarray) -> str:
    """The text of `ids` with masks and sentinels, but without ends of documents."""
    return data.tokenizer.decode(ids[ids != data.tokenizer.eos_id], skip_special_tokens=False)
