"""Loss, perplexity and bits per byte over a whole split."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gptjax.array_types import Batch, Metrics, Params


def evaluate(
    eval_step: Callable[[Params, Batch], Metrics],
    params: Params,
    batches: Iterator[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    put: Callable[[dict[str, np.ndarray]], Any],
) -> dict[str, float]:
    """Averages over every target of `batches`.

    Args:
      eval_step: from `training.step.make_eval_step`, jitted.
      params: of the model.
      batches: host batches [B, T]; rows without targets count for nothing.
      token_bytes: [V], the UTF-8 bytes each token stands for.
      put: places a batch on the devices.

    Returns:
      `eval/loss` (nats a token), `eval/perplexity`, and `eval/bits_per_byte`, which does not depend on the tokenizer.
    """
    sums = []
    num_bytes = 0.0
    for batch in batches:
        sums.append(eval_step(params, put(batch)))
        num_bytes += float(np.sum(token_bytes[batch["targets"]] * batch["loss_weights"], dtype=np.float64))
    nats = sum(float(s["loss_sum"]) for s in sums)
    tokens = sum(float(s["tokens"]) for s in sums)
    loss = nats / tokens
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(loss) if loss < 700 else math.inf,
        "eval/bits_per_byte": nats / math.log(2) / max(num_bytes, 1.0),
    }
