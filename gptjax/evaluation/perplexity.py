"""Loss, perplexity, accuracy and bits per byte over a whole split."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gptjax.array_types import Batch, Metrics, Params


def evaluate(
    eval_step: Callable[[Params, Batch], Metrics],
    params: Params,
    batches: Iterator[dict[str, np.ndarray]],
    token_bytes: np.ndarray | None,
    put: Callable[[dict[str, np.ndarray]], Any],
) -> list[dict[str, float]]:
    """Averages over every target of `batches`, for one model, or for N that are stacked.

    Args:
      eval_step: from `training.step.make_eval_step`, jitted, its sums scalars or, of N models, [N]; what it sums up besides
        is averaged too.
      params: of the model or models.
      batches: host batches [B, T]; rows without targets count for nothing.
      token_bytes: [V], the UTF-8 bytes each token stands for, if the targets are text read in order; None if they are not.
      put: places a batch on the devices.

    Returns:
      For each model `eval/loss` (nats a token), `eval/perplexity`, `eval/accuracy` (the share of targets that the likeliest
      token hits), `eval/tokens` (how many targets there are), and, unless bytes are unknown, `eval/bits_per_byte`: all nats
      over the bytes of the targets, which does not depend on the tokenizer. What a model is given (a prefix, a source)
      counts for nothing in it.

    Raises:
      ValueError: if no batch has a target.
    """
    sums = []
    num_bytes = 0.0
    for batch in batches:
        sums.append(eval_step(params, put(batch)))
        if token_bytes is not None:
            num_bytes += float(np.sum(token_bytes[batch["targets"]] * batch["loss_weights"], dtype=np.float64))
    columns = [{name: np.atleast_1d(value) for name, value in s.items()} for s in sums]
    num_models = len(columns[0]["tokens"]) if columns else 1
    return [_averages([{n: x[i] for n, x in s.items()} for s in columns], num_bytes) for i in range(num_models)]


def _averages(sums: list[dict[str, float]], num_bytes: float) -> dict[str, float]:
    nats, correct, tokens = (sum(float(s[name]) for s in sums) for name in ("loss_sum", "correct", "tokens"))
    if not tokens:
        raise ValueError("there is nothing to evaluate: no batch has a target")
    loss = nats / tokens
    results = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/accuracy": correct / tokens,
        "eval/tokens": tokens,
    }
    others = sums[0].keys() - {"loss_sum", "correct", "tokens"}
    results |= {f"eval/{name}": sum(float(s[name]) for s in sums) / tokens for name in sorted(others)}
    if num_bytes > 0:  # NaN for a tokenizer that does not determine them
        results["eval/bits_per_byte"] = nats / math.log(2) / num_bytes
    return results


def describe(results: Mapping[str, float], unit: str = "token") -> str:
    """The results of `evaluate` as a part of a sentence; `unit` is what the loss is an average over."""
    formats = {
        "eval/loss": "loss {:.4f} nats a " + unit,
        "eval/perplexity": "perplexity {:.2f}",
        "eval/accuracy": "{:.2%} of " + unit + "s right",
        "eval/bits_per_byte": "{:.4f} bits a byte",
    }
    return ", ".join(text.format(results[name]) for name, text in formats.items() if name in results)
