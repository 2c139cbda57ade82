"""Scores are those of the whole forward pass, in programs that are known before."""

import jax
import numpy as np
import pytest

from gptjax.generation.engine import Engine
from gptjax.generation.scoring import num_compiles, score, warm_up
from tests.generation.test_engine import V, make


@pytest.mark.parametrize("kind", ["learned positions", "rotary with windows"])
def test_scores_are_those_of_the_model(kind):
    model, params, next_logits = make(kind)
    engine = Engine(model, params, num_slots=1, weights="float32")
    warm_up(engine)
    before = num_compiles()
    rng = np.random.default_rng(0)
    for length in (1, 2, 64, 65, 257, 300):
        tokens = rng.integers(0, V, length)
        *_, scores = score(engine, tokens)
        assert len(scores.logprobs) == len(scores.top_ids) == length - 1
        for i in {0, 1, 62, 64, 200, 255, 256, length - 2} & set(range(length - 1)):
            logprobs = np.asarray(jax.nn.log_softmax(next_logits(tokens[: i + 1])))
            np.testing.assert_allclose(scores.logprobs[i], logprobs[tokens[i + 1]], atol=2e-4)
            np.testing.assert_allclose(scores.top_logprobs[i], logprobs[scores.top_ids[i]], atol=2e-4)
            np.testing.assert_allclose(scores.top_logprobs[i][0], logprobs.max(), atol=2e-4)
    assert num_compiles() == before
