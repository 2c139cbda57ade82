"""The implementations of attention: each is the same function, and 'plain' is the one in the papers."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models import attention_ops, make_model
from gptjax.models.attention_ops import IMPLEMENTATIONS, Mask, attend, choose
from gptjax.models.dropout import keep_mask
from gptjax.models.positions import alibi_bias, relative_bias

H, G, K = 4, 2, 4
SCALE = 0.4
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])
PREFIX = np.array([[1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0], [1] * 4 + [0] * 9], bool)
# What differs from causal attention of 13 queries over 13 keys.
CASES = {
    "causal": {},
    "even": {"lengths": (8, 8), "segments": (np.array([[1] * 5 + [2] * 3, [1] * 8]),) * 2},
    "bidirectional": {"causal": False},
    "segments": {"segments": (SEGMENTS, SEGMENTS)},
    "cross": {"lengths": (6, 11), "causal": False, "segments": (np.ones((2, 6), int), np.tri(11)[[7, 10]].astype(int))},
    "window": {"window": 3, "segments": (SEGMENTS, SEGMENTS)},
    "traced_window": {"window": jnp.int32(4), "causal": False},
    "no_traced_window": {"window": jnp.int32(0)},
    "prefix": {"prefix": PREFIX, "window": 2, "segments": (SEGMENTS, SEGMENTS)},
    "alibi": {"bias": "alibi", "segments": (SEGMENTS, SEGMENTS)},
    "relative": {"bias": "relative", "causal": False},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True, "segments": (SEGMENTS, SEGMENTS)},
    "dropout_of_nothing": {"dropout": 0.0},
    "dropout": {"dropout": 0.25, "causal": False, "segments": (SEGMENTS, SEGMENTS)},
    "causal_dropout": {"dropout": 0.25, "lengths": (8, 8)},
    "all": dict(
        bias="relative",
        softcap=1.5,
        sinks=True,
        window=jnp.int32(5),
        prefix=PREFIX,
        segments=(SEGMENTS, SEGMENTS),
    ),
}
NEEDS = {
    "traced_window": ["window_pattern"],
    "no_traced_window": ["window_pattern"],
    "prefix": ["prefix_lm"],
    "alibi": ["position"],
    "relative": ["position"],
    "softcap": ["attention_softcap"],
    "sinks": ["attention_sinks"],
    "dropout_of_nothing": ["attention_dropout"],
    "dropout": ["attention_dropout"],
    "causal_dropout": ["attention_dropout"],
    "all": ["position", "attention_softcap", "attention_sinks"],
}


def arguments_of(lengths=(13, 13), sinks=False, bias=None, groups=G, **_):
    rng = np.random.default_rng(0)
    shapes = {
        "query": (2, lengths[0], H, K),
        "key": (2, lengths[1], groups, K),
        "value": (2, lengths[1], groups, K),
        "sinks": (H,) if sinks else None,
        "table": (6, H) if bias == "relative" else None,
    }
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items() if shape}
    return arrays, rng.normal(size=shapes["query"]).astype(np.float32)


def mask_of(lengths=(13, 13), segments=(None, None), prefix=None, causal=True, window=0, **_):
    index, key_index = (np.arange(n)[None] for n in lengths)
    return Mask(index, index if lengths[0] == lengths[1] else key_index, *segments, prefix, causal, window)


def run(implementation, arrays, bias=None, softcap=0.0, dropout=None, **case):
    biases = {"alibi": alibi_bias(H)}
    if "table" in arrays:
        biases["relative"] = relative_bias(arrays["table"], bidirectional=True, max_distance=8)
    return attend(
        *(arrays[name] for name in ("query", "key", "value")),
        mask_of(**case),
        implementation=implementation,
        scale=SCALE,
        bias=biases.get(bias),
        softcap=softcap,
        sinks=arrays.get("sinks"),
        dropout=None if dropout is None else (jnp.float32(dropout), jax.random.key(0)),
    )


@functools.cache
def value_and_gradients(implementation, case):
    arrays, weights = arguments_of(**CASES[case])

    @jax.jit
    def derive(arrays):
        def weighted(arrays):
            y = run(implementation, arrays, **CASES[case])
            return jnp.sum(y * weights), y

        return jax.grad(weighted, has_aux=True)(arrays)

    return jax.tree.map(np.asarray, derive(arrays))


def assert_same(ours, theirs):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * max(1, np.abs(y).max())), ours, theirs
    )


@pytest.mark.parametrize("case", CASES)
def test_plain_is_the_formula(case):
    """dropout(softmax(softcap(scale query key^T) + bias)) value, one query at a time in float64."""
    c = CASES[case]
    arrays, _ = arguments_of(**c)
    mixed = value_and_gradients("plain", case)[1]
    mask = mask_of(**c)
    query, key, value = (arrays[name].astype(np.float64) for name in ("query", "key", "value"))
    if c.get("bias") == "relative":
        bias = relative_bias(arrays["table"], bidirectional=True, max_distance=8)
    else:
        bias = alibi_bias(H) if c.get("bias") else None
    bias = np.zeros((1, H, query.shape[1], key.shape[1])) if bias is None else np.asarray(bias(mask[0], mask[1]))
    rate = c.get("dropout", 0.0)
    kept = np.asarray(keep_mask(jax.random.key(0), rate, (2, G, H // G, query.shape[1], key.shape[1])))
    kept = kept.reshape(2, H, query.shape[1], key.shape[1])
    for b, t, h in np.ndindex(2, query.shape[1], H):
        seen = []
        for s in range(key.shape[1]):
            near = not mask.window or abs(t - s) < mask.window
            sees = near and (s <= t or not mask.causal)
            sees = sees or (mask.prefix is not None and mask.prefix[b, s])
            if mask.query_segments is not None:
                sees = sees and mask.query_segments[b, t] == mask.key_segments[b, s]
            if sees:
                seen.append(s)
        scores = key[b, seen, h // (H // G)] @ query[b, t, h] * SCALE
        if cap := c.get("softcap"):
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores + bias[0, h, t, seen])
        total = weights.sum() + (np.exp(arrays["sinks"][h]) if "sinks" in arrays else 0)
        weights = weights / total * kept[b, h, t, seen] / (1 - rate)
        np.testing.assert_allclose(mixed[b, t, h], weights @ value[b, seen, h // (H // G)], atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", "jax", "blockwise"])
def test_every_implementation_is_plain(implementation, case, monkeypatch):
    """Values and gradients wherever it can express the case; elsewhere it says what it cannot."""
    monkeypatch.setattr(attention_ops, "_BLOCK", 4)  # divides neither 13 nor 11
    if missing := IMPLEMENTATIONS[implementation].missing(dict.fromkeys(NEEDS.get(case, ()), True)):
        with pytest.raises(ValueError, match=f"model.attention '{implementation}' cannot express model.{missing}"):
            run(implementation, arguments_of(**CASES[case])[0], **CASES[case])
        return
    if implementation == "blockwise" and CASES[case].get("dropout"):
        pytest.skip("each block draws a mask of its own")
    assert_same(value_and_gradients(implementation, case), value_and_gradients("plain", case))


@pytest.mark.parametrize("implementation", ["plain", "xla", "jax", "blockwise"])
def test_grouped_heads_are_repeated_heads(implementation):
    grouped, _ = arguments_of(lengths=(8, 8))
    repeated = {name: x if name == "query" else np.repeat(x, H // G, 2) for name, x in grouped.items()}
    ours, theirs = (jax.jit(lambda x: run(implementation, x, lengths=(8, 8)))(x) for x in (grouped, repeated))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_row_that_sees_nothing_hurts_nobody(monkeypatch):
    """Padding of a target over a source without any: finite, and without influence on what others get."""
    monkeypatch.setattr(attention_ops, "_BLOCK", 4)
    case = {"lengths": (8, 6), "causal": False, "segments": (np.array([[0] * 4 + [1] * 4] * 2), np.ones((2, 6), int))}
    arrays, weights = arguments_of(**case)

    def gradients(implementation, weights):
        loss = jax.grad(lambda x: jnp.sum(run(implementation, x, **case) * weights))
        return jax.jit(loss)(arrays)

    for implementation in ("plain", "xla", "jax", "blockwise"):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients(implementation, 1e30 * weights)))
    weights = weights * np.array([0, 1])[None, :, None, None].repeat(4, 1)
    assert_same(gradients("blockwise", weights), gradients("plain", weights))


@pytest.mark.parametrize("implementation", ["plain", "xla", "blockwise"])
def test_dropout_of_weights_keeps_their_mean(implementation, monkeypatch):
    monkeypatch.setattr(attention_ops, "_BLOCK", 8)
    index = jnp.arange(16)[None]

    @jax.jit
    def run(ones, key):
        mask, dropout = Mask(index, index, causal=False), (jnp.float32(0.25), key)
        return attend(ones, ones, ones, mask, implementation=implementation, scale=1.0, dropout=dropout)

    # Not as a constant of the program: XLA:CPU folds it wrongly (jaxlib 0.12.0.1).
    mixed = run(np.ones((64, 16, H, K), np.float32), jax.random.key(0))
    # A mean of 16 weights of 1/16, each kept with probability 3/4 and divided by it.
    assert abs(mixed.mean() - 1) < 0.01
    np.testing.assert_allclose(np.asarray(mixed[..., 0]).std(), (0.25 / 0.75 / 16) ** 0.5, rtol=0.05)


def shapes_within(jaxpr):
    """The shape of every value that a program makes, however deep."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from shapes_within(inner)


@pytest.mark.parametrize(
    "change",
    [
        {"position": "alibi", "num_kv_heads": 1},
        {"position": "relative"},
        {
            "position": "rotary",
            "attention_sinks": True,
            "attention_softcap": 5.0,
            "window": 100,
            "window_pattern": "WG",
        },
        {"attention_dropout": True},
    ],
    ids=str,
)
def test_8192_tokens_make_no_square_array(change):
    """Forward and backward of the whole model, as 'auto' runs it."""
    sizes = dict(vocab_size=11, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, embed_dim=8, mlp_dim=8)
    length = 8192

    def program(attention):
        model = make_model("gpt", **(sizes | change), attention=attention, max_seq_len=length)
        tokens = jnp.zeros((1, length), jnp.int32)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :1])["params"])

        def loss(params):
            key = {"dropout": jax.random.key(0)}
            y = model.apply({"params": params}, tokens, segment_ids=tokens + 1, dropout_rate=jnp.float32(0.1), rngs=key)
            return jnp.sum(y)

        return jax.make_jaxpr(jax.grad(loss))(params).jaxpr

    largest = max(int(np.prod(shape)) for shape in shapes_within(program("auto")))
    assert largest < length**2 / 8
    assert any(shape[-2:] == (length, length) for shape in shapes_within(program("plain")))  # so the search finds them


def test_auto_takes_the_fastest_that_can():
    def chosen(platform, length=256, dtype=jnp.bfloat16, head_dim=64, **needs):
        nothing = dict.fromkeys(IMPLEMENTATIONS["plain"]._fields, False)
        return choose(nothing | needs, platform, (length, length), head_dim, dtype)

    assert chosen("cpu") == "xla"
    assert chosen("cpu", attention_softcap=True) == "plain"
    assert chosen("cpu", 4096) == chosen("tpu", 4096 + 1) == "blockwise"
    assert chosen("gpu") == chosen("gpu", 8192, position=True) == "jax"
    assert chosen("gpu", dtype=jnp.float32) == chosen("gpu", head_dim=256) == "xla"
    assert chosen("gpu", attention_sinks=True) == "plain"
    for name in IMPLEMENTATIONS["plain"]._fields:  # whatever is asked, somebody can
        assert chosen("cpu", **{name: True}) in ("plain", "xla") and chosen("cpu", 8192, **{name: True}) == "blockwise"


def test_auto_takes_splash_on_one_tpu(monkeypatch):
    needs = dict.fromkeys(IMPLEMENTATIONS["plain"]._fields, False)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(needs, "tpu", (256, 256), 64, jnp.bfloat16) == "splash"
    assert choose(needs, "tpu", (200, 200), 64, jnp.bfloat16) == "xla"
    assert choose(needs | {"attention_sinks": True}, "tpu", (256, 256), 64, jnp.bfloat16) == "plain"
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert choose(needs, "tpu", (256, 256), 64, jnp.bfloat16) == "xla"


@pytest.mark.parametrize(
    ("platform", "devices", "length", "words"),
    [
        ("cpu", 1, 128, "'splash' needs a TPU, and this is a cpu"),
        ("tpu", 4, 128, "'splash' needs jax.set_mesh with 4 devices"),
        ("tpu", 1, 13, "'splash' needs lengths that are multiples of 128, not 13 and 13"),
    ],
)
def test_splash_says_what_it_needs(platform, devices, length, words, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    case = {"lengths": (length, length)}
    with pytest.raises(ValueError, match=words):
        run("splash", arguments_of(**case)[0], **case)


@pytest.mark.parametrize(
    ("implementation", "change", "field"),
    [
        ("xla", {"position": "alibi"}, "position"),
        ("jax", {"attention_softcap": 5.0}, "attention_softcap"),
        ("jax", {"attention_sinks": True}, "attention_sinks"),
        ("jax", {"attention_dropout": True}, "attention_dropout"),
        ("splash", {"prefix_lm": True}, "prefix_lm"),
        ("splash", {"window": 2, "window_pattern": "WG"}, "window_pattern"),
    ],
)
def test_a_config_that_cannot_be_expressed_is_refused(sizes, implementation, change, field):
    with pytest.raises(ValueError, match=f"model.attention '{implementation}' cannot express model.{field}"):
        make_model("gpt", **sizes, **change, attention=implementation)


@pytest.mark.parametrize("case", [{}, {"window": 50}, {"causal": False, "softcap": 1.5, "keys": 128}], ids=str)
def test_splash_is_plain(case):
    """In interpret mode: the kernel's own arithmetic, on this machine."""
    case = dict(case)
    lengths = (256, case.pop("keys", 256))
    case["segments"] = tuple(np.repeat([[1, 2]], n // 2, axis=1) for n in lengths)
    rng = np.random.default_rng(0)
    shapes = ((1, 256, 2, 8), (1, lengths[1], 1, 8), (1, lengths[1], 1, 8))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    weights = rng.normal(size=arrays[0].shape).astype(np.float32)
    softcap = case.pop("softcap", 0.0)
    mask = mask_of(lengths, **case)
    options = attention_ops._Options(0.3, None, softcap, None, None)

    def derive(function):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(function(*x, mask, options) * weights)))(arrays)

    splash = functools.partial(attention_ops._splash, interpret=True)
    (ours, gradients), (theirs, expected) = derive(splash), derive(attention_ops._plain)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


AHEAD_OF_TIME = """
import gptjax, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from gptjax.models import make_model
jax.config.update("jax_enable_compilation_cache", False)
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
jax.default_backend, jax.device_count = lambda: "tpu", lambda: 1
sizes = dict(vocab_size=64, num_heads=4, num_kv_heads=2, head_dim=64, embed_dim=128, mlp_dim=128)
for change in ({}, {"position": "rotary", "window": 100, "attention_softcap": 9.0, "scan_layers": True, "remat": "full"}):
    model = make_model("gpt", **sizes, **change, num_layers=2, max_seq_len=512, dtype="bfloat16")
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
    tokens = on_device(jax.ShapeDtypeStruct((2, 512), jnp.int32))
    loss = lambda p, t: jnp.sum(model.apply({"params": p}, t, segment_ids=t).astype(jnp.float32))
    compiled = jax.jit(jax.grad(loss)).lower(jax.tree.map(on_device, params), tokens).compile()
    print("kernels", compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'gptjax[plan]'")
def test_splash_compiles_for_tpu():
    """A training step's gradient with attention 'auto', compiled for a v5e that is not there."""
    # The last three: libtpu looks for no real TPU, and minds no other process that has it open.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(line.split()[1]) >= 3 for line in done.stdout.splitlines()] == [True, True]
