"""What `describe` says is what a run then has."""

import json

import jax
import numpy as np
import pytest

from experiments import build, cli, describe
from gptjax.data.objectives import make_objective, special_tokens
from gptjax.data.tokenizers import build_tokenizer
from gptjax.generation.decoding import init_cache
from gptjax.models import init_params, make_model
from gptjax.training.throughput import num_params
from tests import runs

TINY = [("model.num_layers", "2"), ("model.max_seq_len", "32"), ("train.batch_size", "4"), ("data.vocab_size", "300")]
FAMILIES = {
    "causal": [],
    "prefix": [("model.prefix_lm", "true")],
    "fim": [],
    "masked": [("model.family", "bert"), ("model.head", "masked_lm"), ("model.pooler", "true")],
    "span": [("model.family", "encoder_decoder"), ("model.num_encoder_layers", "1"), ("model.position", "relative")],
    "seq2seq": [("model.family", "encoder_decoder"), ("model.num_encoder_layers", "1")],
}


def load(objective, *overrides):
    return cli.load_config(
        "configs/default.py", [*TINY, *FAMILIES[objective], ("data.objective", objective), *overrides]
    )


@pytest.mark.parametrize("objective", ["causal", "masked", "span"])
def test_figures_are_those_of_the_arrays(objective):
    config = load(objective)
    metrics = describe.describe(config)
    model = make_model(**build.model_sizes(config, 300))
    params = init_params(model, jax.random.key(0))
    parts = {n: v for n, v in metrics.items() if n.startswith("params/") and n not in ("params/total", "params/active")}
    assert metrics["params/total"] == metrics["params/active"] == sum(parts.values()) == num_params(params)
    assert metrics.get("params/head", 0) == num_params(params.get("head", {}))
    assert metrics["bytes/weights"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert metrics["bytes/optimizer"] == pytest.approx(2 * metrics["bytes/weights"], rel=0.001)
    if objective != "masked":
        memory_len = 32 if model.config.num_encoder_layers else 0
        cache = init_cache(model, 1, 32, memory_len)
        assert metrics["bytes/kv_cache"] == sum(x.nbytes for x in jax.tree.leaves(cache))
    else:
        assert "bytes/kv_cache" not in metrics


@pytest.mark.parametrize("objective", FAMILIES)
def test_batch_is_that_of_the_pipeline(objective):
    """Names, shapes and types, so that activations are those of the step."""
    config = load(objective)
    tokenizer = build_tokenizer(
        "byte", documents=lambda: iter([]), vocab_size=0, special_tokens=special_tokens(objective)
    )
    row = np.zeros((7 if objective == "seq2seq" else 4, 32), np.int32)
    example = make_objective(build.objective(config.data), tokenizer, 32)(row, np.random.default_rng(0))
    batch = describe.abstract_batch(config, 5)
    assert {k: ((5, *v.shape), v.dtype) for k, v in example.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }


def test_activations_follow_the_rows_and_what_is_kept():
    def activations(*overrides):
        return describe.describe(load("causal", *overrides))["bytes/activations"]

    whole = activations()
    assert activations(("model.scan_layers", "true")) == whole
    assert activations(("train.accumulation_steps", "2")) == pytest.approx(whole / 2, rel=0.01)
    assert activations(("model.remat", "full")) < activations(("model.remat", "dots")) < whole
    # The logits, what enters each of the 2 blocks, and the last block's output are kept whatever is computed again.
    least = 4 * 4 * 32 * (300 + 3 * 256)
    assert least < activations(("model.remat", "full")) < 1.5 * least


def test_a_mixture_says_what_one_token_uses():
    overrides = [("model.num_experts", "4"), ("model.activation", "swiglu")]
    metrics = describe.describe(load("causal", *overrides))
    one_expert = describe.describe(
        load("causal", ("model.num_experts", "1"), ("model.experts_per_token", "1"), *overrides[1:])
    )
    expert = one_expert["params/MLP"]
    assert metrics["params/MLP"] == 4 * expert
    assert metrics["params/total"] - metrics["params/active"] == 2 * expert


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "figures.json"
    result = runs.call(runs.command("describe", "--config", "configs/gpt2_small.py", "--json", str(path)))
    assert result.returncode == 0, result.stderr
    assert "total                         124,439,808" in result.stdout
    assert "without the head              124,439,808" in result.stdout
    assert json.loads(path.read_text())["metrics"]["params/total"] == 124_439_808


def test_a_mistake_is_one_line():
    command = runs.command("describe", "--config", "configs/default.py", "--config.model.activation=gelo")
    result = runs.call(command)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: model.activation 'gelo' is not one of gelu, gelu_exact, relu, relu2, swiglu, geglu"
    )
