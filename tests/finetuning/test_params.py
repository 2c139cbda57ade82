"""What is trained and what is not: masks, freezing, adapters, preferences; equal computations are equal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.data.objectives import of_the_whole
from gptjax.data.packing import pack_whole
from gptjax.distributed.sharding import path_of
from gptjax.finetuning import lora, preference
from gptjax.finetuning.start import frozen, put_in, start_from
from gptjax.interop import peft
from gptjax.models import init_params, make_model
from gptjax.training.losses import cross_entropy
from gptjax.training.optimizers import Hyperparameters
from gptjax.training.state import init_state
from gptjax.training.step import StepSettings, apply_model, loss_sum, make_train_step

HYPER = Hyperparameters(*(np.float32(x) for x in (1e-2, 0, 1.0, 0.1, 0.9, 0.99, 0.95, 0.0)))
SETTINGS = StepSettings("adamw", "constant", 20, 1, 1.0, 0.0, 0.0, 0.0, False)
ALL = "attention|mlp"


@pytest.fixture
def sizes(sizes):
    return sizes | {"num_layers": 2}


def leaves(tree):
    return {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def model_of(sizes, family="gpt", **changes):
    encoder = {"num_encoder_layers": 2} if family == "encoder_decoder" else {}
    own = {"head": "none", "token_types": 2, "pooler": True} if family == "bert" else {}
    return make_model(family, **sizes | own | encoder | changes)


def examples(sizes, lengths, seed=0):
    """[3, n] each: inputs, next tokens, and which of them count."""
    rng = np.random.default_rng(seed)
    drawn = []
    for n in lengths:
        ids, mask = rng.integers(1, sizes["vocab_size"], n + 1), rng.random(n) < 0.5
        mask[-1] = True
        drawn.append(np.stack([ids[:-1], ids[1:], mask]))
    return drawn


def batch_of(rows):
    inputs, targets, segment_ids, positions, weights = np.stack(rows).swapaxes(0, 1)
    names = {"inputs": inputs, "targets": targets, "segment_ids": segment_ids, "positions": positions}
    return names | {"loss_weights": weights.astype(np.float32)}


def state_of(model, settings=SETTINGS, seed=0, change=lambda params, key: params, **more):
    return jax.jit(
        lambda seed: init_state(
            model, settings.optimizer, HYPER, seed, 5.0, ema=False, change=change, is_frozen=frozen(settings.factors)
        )
    )(np.uint32(seed))


def with_adapters(params, projections=ALL, dropout=0.0):
    """Adapters that change something, unlike fresh ones."""
    key = jax.random.key(0)
    added = lora.add(params, key, projections=projections, rank=3, alpha=6.0, dropout=dropout)
    keys = iter(jax.random.split(key, 100))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0.1 * jax.random.normal(next(keys), x.shape) if path[-1].key == "lora_b" else x, added
    )


def test_no_gradient_outside_the_mask(sizes):
    """The logits of a token that does not count get none; of one that does, some."""
    model = model_of(sizes)
    batch = batch_of(list(pack_whole([[e] for e in examples(sizes, (5, 7, 9, 3))], seq_len=16)))
    logits = jax.jit(lambda params: apply_model(model, params, batch)[0])(init_params(model, jax.random.key(0)))
    grads = jax.grad(lambda x: cross_entropy(x, batch["targets"], batch["loss_weights"])[0])(logits)
    counts = np.abs(grads).max(axis=-1) > 0
    np.testing.assert_array_equal(counts, batch["loss_weights"] > 0)
    # Nor do targets outside it matter, whatever they are.
    other = batch | {"targets": np.where(batch["loss_weights"] > 0, batch["targets"], 7)}
    params = init_params(model, jax.random.key(0), 5.0)
    gradient = jax.jit(jax.grad(lambda params, batch: loss_sum(model, params, batch)[0]))
    jax.tree.map(np.testing.assert_array_equal, gradient(params, batch), gradient(params, other))


def test_packed_equals_a_row_each(sizes):
    model = model_of(sizes, position="rotary")
    groups = [[e] for e in examples(sizes, (5, 7, 9, 3, 4))]
    assert_packed_is_alone(model, *(batch_of(list(pack_whole(groups, seq_len=16, most=most))) for most in (None, 1)))


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "span"])
def test_packed_texts_are_asked_what_a_row_each_is(sizes, pooling):
    """Labels by every pooling, and spans; no text sees another, and rows may have room for more."""
    own = {"head": "span"} if pooling == "span" else {"head": "sequence_classification", "pooling": pooling}
    model = model_of(sizes, "bert", **own, pooler=pooling == "first")
    groups, asked = [[e.astype(np.int32)] for e in examples(sizes, (5, 7, 9, 3, 4))], 2 if pooling == "span" else 1
    for ((_, targets, _),) in groups:
        targets[:asked] = [1, 2][:asked]
    batches = []
    for most in (6, 1):
        rows = pack_whole(groups, seq_len=16, most=most)
        read = [of_the_whole(row, np.random.default_rng(0), shape=(most, asked)) for row in rows]
        batches.append({name: np.stack([example[name] for example in read]) for name in read[0]})
        assert batches[-1]["loss_weights"].sum() == 5 * asked
    assert_packed_is_alone(model, *batches)


def assert_packed_is_alone(model, packed, alone):
    assert len(packed["inputs"]) < len(alone["inputs"]) == 5
    params = init_params(model, jax.random.key(0), 5.0)
    derive = jax.jit(jax.value_and_grad(lambda params, batch: loss_sum(model, params, batch)[0]))
    (loss, grads), (loss_alone, grads_alone) = derive(params, packed), derive(params, alone)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, grads_alone)


@pytest.mark.parametrize("family", ["gpt", "bert", "encoder_decoder"])
def test_merged_equals_unmerged(sizes, family):
    model = model_of(sizes, family, tie_embeddings=False, **({"activation": "swiglu"} if family == "gpt" else {}))
    params = init_params(model, jax.random.key(0), 5.0)
    projections = ALL if family == "gpt" else "attention|mlp|pooler"
    adapted = with_adapters(params, projections=projections)
    kernels = [path for path in leaves(params) if path.endswith("kernel") and "scores" not in path]
    assert sum(path.endswith("lora_a") for path in leaves(adapted)) == len(kernels)
    tokens = np.arange(1, 25).reshape(2, 12)
    inputs = {"encoder_tokens": tokens[:, ::-1]} if family == "encoder_decoder" else {}
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens, **inputs))
    merged = lora.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(apply(adapted), apply(merged), atol=1e-5 * float(np.abs(apply(merged)).max()))
    assert np.abs(apply(adapted) - apply(params)).max() > 1e-3
    scanned = type(model)(model.config.__class__(**{**model.config.__dict__, "scan_layers": True, "remat": "full"}))
    rolled = jax.jit(lambda params: scanned.apply({"params": params}, tokens, **inputs))(adapted)
    np.testing.assert_allclose(rolled, apply(adapted), atol=1e-4)


def test_fresh_adapters_change_nothing_and_dropout_only_trains(sizes):
    model = model_of(sizes)
    params = init_params(model, jax.random.key(0), 5.0)
    fresh = lora.add(params, jax.random.key(1), projections=ALL, rank=2, alpha=4.0, dropout=0.5)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(fresh), params)
    batch = batch_of(list(pack_whole([[e] for e in examples(sizes, (5, 7))], seq_len=16)))
    adapted = with_adapters(params, dropout=0.5)
    noise = (jnp.float32(0), jax.random.key(3))
    logits = jax.jit(lambda params, batch, noise: apply_model(model, params, batch, noise)[0])
    plain, noisy = (logits(adapted, batch, d) for d in (None, noise))
    assert np.abs(plain - noisy).max() > 1e-3
    np.testing.assert_allclose(*(logits(params, batch, d) for d in (None, noise)), atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_alone_are_trained(sizes, optimizer):
    model = model_of(sizes)
    factors = ((lora.NEVER_TRAINED, 0.0), (lora.TRAINED, 1.0), ("", 0.0))
    settings = SETTINGS._replace(optimizer=optimizer, factors=factors)
    state = state_of(
        model, settings, change=lambda p, key: lora.add(p, key, projections=ALL, rank=2, alpha=4.0, dropout=0.0)
    )
    assert {path.rsplit("/")[-1] for path in leaves(state.params)} == {"lora_a", "lora_b"}
    moments = {path.rsplit("/")[-1] for path, x in leaves(state.opt_state).items() if x.ndim > 1}
    assert moments == {"lora_a", "lora_b"}
    batch = batch_of(list(pack_whole([[e] for e in examples(sizes, (5, 7, 9, 3))], seq_len=16)))
    step = jax.jit(make_train_step(model, settings))
    new, metrics = step(state, batch)
    for _ in range(9):
        new, later = step(new, batch)
    assert later["loss"] < metrics["loss"] - 0.01
    jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)
    assert all((x != y).any() for x, y in zip(*(jax.tree.leaves(s.params) for s in (new, state)), strict=True))


def test_factors_freeze_bits_and_scale_updates(sizes):
    model = model_of(sizes, head="sequence_classification", pooling="last")
    factors = (("^head/", 2.0), ("blocks/attention/", 0.0), ("embedding", 0.0))
    settings = SETTINGS._replace(factors=factors, clip_norm=0.0)
    batch = batch_of(list(pack_whole([[e] for e in examples(sizes, (5, 7, 9, 3))], seq_len=16, most=1)))
    batch |= {"targets": np.array([[0], [1], [1], [0]]), "loss_weights": np.ones((4, 1), np.float32)}
    runs = {}
    for name, s in (("factors", settings), ("none", settings._replace(factors=()))):
        state = state_of(model, s)
        runs[name] = (
            leaves(state.model_params),
            leaves(jax.jit(make_train_step(model, s))(state, batch)[0].model_params),
        )
    for path, before in runs["factors"][0].items():
        moved, plain = (after[path] - start[path] for start, after in runs.values())
        if "attention/" in path or "embedding" in path:
            np.testing.assert_array_equal(runs["factors"][1][path], before)
        elif path.startswith("head/"):
            np.testing.assert_allclose(moved, 2 * plain, rtol=1e-3, atol=1e-8)
        else:
            np.testing.assert_allclose(moved, plain, rtol=1e-3, atol=1e-8)


def test_starting_from_another_model_names_what_is_new(sizes):
    base = model_of(sizes, "bert", head="masked_lm")
    model = model_of(sizes, "bert", head="sequence_classification", num_labels=3)
    given = init_params(base, jax.random.key(0))
    taken, new, left = start_from(model, given)
    assert new == ["head/labels/bias", "head/labels/kernel"]
    assert left == sorted(path for path in leaves(given) if path.startswith("head/"))
    drawn = init_params(model, jax.random.key(1))
    mixed = leaves(put_in(drawn, taken))
    for path, x in mixed.items():
        np.testing.assert_array_equal(x, leaves(drawn if path in new else given)[path])
    # A head of other labels is new too.
    _, new, left = start_from(model_of(sizes, "bert", head="sequence_classification", num_labels=2), drawn)
    assert new == left == ["head/labels/bias", "head/labels/kernel"]


def test_preference_loss_is_the_paper_s(sizes):
    """Against equation 7 written out, pair by pair; and the gradient is zero outside the answers."""
    model = model_of(sizes)
    params, before = (init_params(model, jax.random.key(seed), 5.0) for seed in (0, 1))
    drawn = examples(sizes, (4, 3, 6, 5, 3, 7))
    groups = [drawn[i : i + 2] for i in (0, 2, 4)]
    batch = batch_of(list(pack_whole(groups, seq_len=16)))
    score = jax.jit(lambda params, batch: preference.target_log_probabilities(model, params, batch))
    batch["reference"] = np.asarray(score(before, batch))
    loss = preference.preference_loss(0.5)
    assert loss.num_targets(batch) == 3
    lowered, sums = jax.jit(lambda params: loss.sums(model, params, batch))(params)
    expected = []
    for pair in groups:
        gains = []
        for e in pair:
            alone = batch_of(list(pack_whole([[e]], seq_len=16)))
            difference = (score(params, alone) - score(before, alone)) * alone["loss_weights"]
            gains.append(float(difference.sum()))
        expected.append(0.5 * (gains[0] - gains[1]))
    np.testing.assert_allclose(lowered, np.log1p(np.exp(-np.array(expected))).sum(), rtol=1e-4)
    np.testing.assert_allclose(sums["margin"], sum(expected), rtol=1e-4, atol=1e-4)
    assert sums["accuracy"] == (np.array(expected) > 0).sum()
    # At the start nothing has been gained: log 2 a pair.
    at_start = batch | {"reference": np.asarray(score(params, batch))}
    lowered = jax.jit(lambda params: loss.sums(model, params, at_start)[0])(params)
    np.testing.assert_allclose(lowered, 3 * np.log(2), rtol=1e-6)
    other = batch | {"targets": np.where(batch["loss_weights"] > 0, batch["targets"], 7)}
    other["reference"] = batch["reference"]
    grads = [jax.jit(jax.grad(lambda p, b: loss.sums(model, p, b)[0]))(params, b) for b in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, *grads)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_peft_files_come_back(sizes, tmp_path, kind):
    llama = dict(position="rotary", norm="rmsnorm", activation="swiglu", use_bias=False)
    bert = dict(head="sequence_classification", norm_position="post", embed_norm=True, activation="gelu_exact")
    bert |= dict(num_kv_heads=sizes["num_heads"], num_labels=3)
    model = model_of(sizes, **llama) if kind == "llama" else model_of(sizes, "bert", **bert)
    base = init_params(model, jax.random.key(0))
    adapted = with_adapters(base, projections="attention/(query|out)|mlp/down")
    peft.write(tmp_path, model, adapted, base="base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, "base")
    assert config["modules_to_save"] == (None if kind == "llama" else ["classifier"])
    again = leaves(lora.put(base, peft.read(tmp_path, model)))
    assert again.keys() == leaves(adapted).keys()
    for path, x in leaves(adapted).items():
        np.testing.assert_allclose(again[path], x, rtol=1e-6, err_msg=path)
    for change, message in (({"use_dora": True}, "use_dora True is not supported"), ({"r": 4}, "not the shapes")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            peft.read(tmp_path, model)


def test_adapters_that_cannot_be(sizes, tmp_path):
    model = model_of(sizes)
    params = init_params(model, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"lora.projections 'q_proj' must find some of, and only: .*blocks/attention/query"
    ):
        with_adapters(params, projections="q_proj")
    gpt2 = model_of(sizes | {"num_kv_heads": sizes["num_heads"]})
    with pytest.raises(ValueError, match="PEFT has no adapter for blocks/attention/query"):
        peft.write(tmp_path, gpt2, with_adapters(init_params(gpt2, jax.random.key(0)), projections="query"), base="")
