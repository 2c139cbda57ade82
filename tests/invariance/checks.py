"""Computations that must be equal, and how far apart they are.

Tolerances, in float32: the loss and gradient of one step to 1e-5, the gradient relative to each tensor's largest entry;
the losses of 20 steps to 1e-5 with SGD and to 1e-4 with AdamW. Parameters are not compared after steps of Adam, which
turns the rounding of a zero gradient (a key's bias has one) into whole steps. Muon, whose iterations amplify rounding,
takes one step in float64, whose parameters agree to 1e-10. Dropout is off when the micro-batch changes,
and on across meshes, where its mask belongs to the row and not to the device.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.distributed.mesh import AXES, make_mesh
from gptjax.distributed.sharding import batch_sharding, path_of, tree_shardings
from gptjax.models import init_params, make_model
from gptjax.models.attention_ops import IMPLEMENTATIONS
from gptjax.models.config import DTYPES
from gptjax.training import state as training_state
from gptjax.training.optimizers import Hyperparameters
from gptjax.training.state import TrainState
from gptjax.training.step import StepSettings, make_train_step

ONE_STEP, SGD, ADAMW, MUON = 1e-5, 1e-5, 1e-4, 1e-10
NUM_STEPS = 20
# Of the loss, and of the gradient, in bfloat16 beside float32.
BFLOAT16_LOSS, BFLOAT16_GRADIENT = 1e-2, 1e-1
# What a model may be changed in without changing what it computes, but for rounding.
FREE_FIELDS = ("scan_layers", "remat", "attention", "dtype")
# Most of the time here is LLVM's.
COMPILE_FAST: dict[str, bool | str | int] = {"xla_backend_optimization_level": 0}
ROWS, LENGTH = 8, 16
SIZES = dict(vocab_size=64, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, embed_dim=32, mlp_dim=64)
LLAMA = dict(position="rotary", norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False)
# Together they use every field of a model that changes what is computed.
MODELS: dict[str, dict[str, Any]] = {
    "gpt": dict(family="gpt"),
    "llama": dict(
        **(dict(family="gpt", num_kv_heads=4, qk_norm=True, attention_softcap=5.0, logit_softcap=8.0) | LLAMA),
        **dict(window=5, window_pattern="WG"),
    ),
    "alibi": dict(
        **dict(family="gpt", position="alibi", attention_sinks=True, value_embeddings=True, residual_scales=True),
        **dict(embed_norm=True, prefix_lm=True),
    ),
    "bert": dict(family="bert", head="masked_lm", norm_position="post", token_types=2, activation="gelu_exact"),
    "t5": dict(
        **dict(family="encoder_decoder", num_encoder_layers=2, position="relative", norm="rmsnorm", activation="relu"),
        **dict(use_bias=False, scale_logits=True),
    ),
    # Dropless, and without its losses, which are means over a micro-batch: see ExpertMLP.
    "moe": dict(family="gpt", num_experts=4, balance_loss=0.0, router_z_loss=0.0, **LLAMA),
}
HYPER = Hyperparameters(*(np.float32(x) for x in (0.05, 2, 0.1, 0.1, 0.9, 0.99, 0.95, 0.2)))


class Case(NamedTuple):
    """One way to compute what `Case(model)` computes.

    Attributes:
      model: a name in `MODELS`.
      changes: its other fields, as pairs.
      accumulation: micro-batches.
      mesh: sizes of `mesh.AXES`; empty for one device.
      padded: each document in a row of its own.
      dropout: on.
      optimizer: 'sgd', or a name in `optimizers.OPTIMIZERS`.
    """

    model: str = "gpt"
    changes: tuple[tuple[str, Any], ...] = ()
    accumulation: int = 1
    mesh: tuple[int, ...] = ()
    padded: bool = False
    dropout: bool = False
    optimizer: str = "sgd"

    def __str__(self) -> str:
        fields = {**dict(self.changes), **self._asdict()}
        fields["mesh"] = "x".join(map(str, self.mesh))
        default = Case()._asdict() | {"changes": self.changes, "mesh": ""}
        return " ".join([self.model, *(f"{k}={v}" for k, v in fields.items() if k != "model" and default.get(k) != v)])

    @property
    def reference(self) -> "Case":
        """The same, plainly: one device, one micro-batch, packed, scanned, no remat, plain attention."""
        values = tuple((k, v) for k, v in self.changes if k not in FREE_FIELDS)
        return Case(self.model, values, dropout=self.dropout, optimizer=self.optimizer)


class Result(NamedTuple):
    """Losses of all steps, and of the first step its targets, and the gradient and its norm by path, or with Muon and
    AdamW the new parameters and that norm."""

    losses: np.ndarray
    tokens: float
    tensors: dict[str, np.ndarray]


def batch_of(model: str, *, padded: bool = False) -> dict[str, np.ndarray]:
    """Packed rows of random documents, of which the first rows, so the first shard, hold far fewer targets."""
    rng = np.random.default_rng(0)
    packed = functools.partial(_packed, rng, MODELS[model]["family"] == "encoder_decoder")
    batch = packed()
    if model == "bert":
        batch["token_types"] = (rng.random((ROWS, LENGTH)) < 0.5).astype(np.int32)
        batch["loss_weights"] *= rng.random((ROWS, LENGTH)) < 0.5
    if model == "alibi":
        batch["prefix"] = (batch["segment_ids"] > 0) & (batch["positions"] < 3)
    return _unpacked(batch) if padded else batch


def _packed(rng: np.random.Generator, has_encoder: bool) -> dict[str, np.ndarray]:
    shape = (ROWS, LENGTH)

    documents = [0, 1, 2, *rng.integers(2, 5, ROWS - 3)]
    paddings = [LENGTH, LENGTH - 3, 9, *rng.integers(0, 5, ROWS - 3)]

    def segments() -> tuple[np.ndarray, np.ndarray]:
        segment_ids = np.zeros(shape, np.int32)
        for row, number, padding in zip(segment_ids, documents, paddings, strict=True):
            cuts = np.sort(rng.choice(np.arange(1, LENGTH - padding), max(number - 1, 0), replace=False))
            row[: LENGTH - padding] = 1 + np.searchsorted(cuts, np.arange(LENGTH - padding), side="right")
        starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
        place = np.arange(LENGTH, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
        return segment_ids, np.where(segment_ids > 0, positions, 0).astype(np.int32)

    def tokens() -> np.ndarray:
        return rng.integers(0, SIZES["vocab_size"], shape, np.int32)

    segment_ids, positions = segments()
    batch = {"inputs": tokens(), "targets": tokens(), "segment_ids": segment_ids, "positions": positions}
    batch["loss_weights"] = (segment_ids > 0).astype(np.float32)
    if has_encoder:
        encoder_segment_ids, encoder_positions = segments()
        batch["encoder_tokens"] = tokens()
        batch |= {"encoder_segment_ids": encoder_segment_ids, "encoder_positions": encoder_positions}
    return batch


def _unpacked(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each document in a row of its own, padded; of texts in pairs, both texts."""
    rows = []
    for row in range(ROWS):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            new = {name: np.zeros_like(x[0]) for name, x in batch.items()}
            for name, x in batch.items():
                ids = batch["encoder_segment_ids" if name.startswith("encoder") else "segment_ids"][row]
                new[name][: (ids == segment).sum()] = x[row][ids == segment]
            rows.append(new)
    return {name: np.stack([row[name] for row in rows]) for name in batch}


@contextlib.contextmanager
def sgd() -> Iterator[None]:
    """Plain gradient descent in place of the optimizer; it keeps the last gradient as its state."""

    def make_optimizer(name: str, rate: Any, hyper: Any, *_: Any) -> optax.GradientTransformation:
        return optax.chain(optax.trace(decay=0.0), optax.scale(-rate))

    with (
        mock.patch("gptjax.training.step.make_optimizer", make_optimizer),
        mock.patch("gptjax.training.state.make_optimizer", make_optimizer),
    ):
        yield


def model_of(name: str, **changes: Any) -> Any:
    """A model of `MODELS` with some fields changed."""
    fields = SIZES | {"max_seq_len": LENGTH, "attention": "plain", "scan_layers": True} | MODELS[name] | changes
    return make_model(**fields)


@functools.cache
def initial_state(name: str, optimizer: str) -> TrainState:
    """A state whose gradients are well above rounding, and in which no bias is zero."""
    model, rng = model_of(name), np.random.default_rng(1)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = path_of(path).endswith("norm/scale")
        return (mean + 0.1 * rng.standard_normal(shape.shape)).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    with sgd() if optimizer == "sgd" else contextlib.nullcontext():
        opt_state = training_state.make_optimizer(optimizer, 0.0, HYPER).init(params)
    zero = np.float32(0)
    hyper = HYPER if optimizer == "sgd" else HYPER._replace(learning_rate=np.float32(2e-3))
    return TrainState(np.int32(0), params, opt_state, None, hyper, np.array([0, 7], np.uint32), zero, zero)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Everything that says float32 computes in float64."""
    with (
        jax.enable_x64(True),
        mock.patch.object(jnp, "float32", jnp.float64),
        mock.patch.dict(DTYPES, float32=jnp.float64),
    ):
        yield


@functools.cache
def compute(case: Case, num_steps: int = NUM_STEPS) -> Result:
    """Trains for `num_steps` on one batch, every step with the same compiled program."""
    model = model_of(case.model, **dict(case.changes))
    settings = StepSettings(
        optimizer=case.optimizer,
        schedule="constant",
        num_train_steps=NUM_STEPS,
        accumulation_steps=case.accumulation,
        clip_norm=0.0 if case.optimizer == "sgd" else 1.0,
        z_loss=1e-3,
        ema_decay=0.0,
        skip_spikes=0.0,
        use_dropout=case.dropout,
    )

    batch, state = batch_of(case.model, padded=case.padded), initial_state(case.model, case.optimizer)
    step_fn = functools.partial(jax.jit, make_train_step(model, settings), compiler_options=COMPILE_FAST)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("gptjax.models.attention_ops._BLOCK", 4))
        if case.optimizer == "muon":
            stack.enter_context(double_precision())
            batch, state = jax.tree.map(_to_float64, (batch, state))
        if case.optimizer == "sgd":
            stack.enter_context(sgd())
        if case.mesh:
            sizes = dict(zip(AXES, case.mesh, strict=True))
            mesh = make_mesh(sizes, jax.devices()[: math.prod(case.mesh)])
            stack.enter_context(jax.set_mesh(mesh))
            shardings = tree_shardings(state, mesh)
            state = jax.device_put(state, shardings)
            batch = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
            step_fn = functools.partial(step_fn, out_shardings=(shardings, None))
        train_step = step_fn()
        losses, tokens, tensors = [], 0.0, {}
        for n in range(num_steps):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
            if n == 0:
                tokens = float(metrics["tokens"])
                tree = state.opt_state[0].trace if case.optimizer == "sgd" else state.params
                leaves = jax.tree_util.tree_leaves_with_path(tree)
                tensors = {path_of(path): np.asarray(leaf) for path, leaf in leaves}
                tensors["grad_norm"] = np.asarray(metrics["grad_norm"])
        if case.mesh:
            leaves = jax.tree_util.tree_leaves_with_path(state.params)
            kernel = next(leaf for path, leaf in leaves if path_of(path).endswith("query/kernel"))
            assert kernel.addressable_shards[0].data.size * sizes["fsdp"] * sizes["tensor"] == kernel.size
    return Result(np.array(losses), tokens, tensors)


def _to_float64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)


class Distance(NamedTuple):
    """How far a case is from its reference, relative: the first loss, the farthest tensor and its path, all losses."""

    loss: float
    tensor: float
    where: str
    losses: float

    def __str__(self) -> str:
        return f"loss {self.loss:.0e}, losses {self.losses:.0e}, tensors {self.tensor:.0e} ({self.where})"


def distance(case: Case) -> Distance:
    """Compares a case with its reference."""
    num_steps = 1 if case.optimizer == "muon" else NUM_STEPS
    result, reference = compute(case, num_steps), compute(case.reference, num_steps)
    losses = np.abs(result.losses / reference.losses - 1)
    assert result.tensors.keys() == reference.tensors.keys() and result.tokens == reference.tokens
    tensors = {path: _relative(result.tensors[path], x, path) for path, x in reference.tensors.items()}
    where = max(tensors, key=lambda path: tensors[path])
    return Distance(losses[0], tensors[where], where, losses.max())


def _relative(x: np.ndarray, reference: np.ndarray, path: str) -> float:
    scale = np.abs(reference).max()
    if path.endswith("key/bias"):  # zero but for rounding, so it has no scale of its own
        scale = max(scale, 1.0)
    return float(np.abs(x - reference).max() / scale) if scale else float(np.abs(x).max())


def met(case: Case, d: Distance) -> bool:
    """Whether a distance is within the tolerances."""
    if ("dtype", "bfloat16") in case.changes:
        return d.losses <= BFLOAT16_LOSS and d.tensor <= BFLOAT16_GRADIENT
    if case.optimizer == "muon":
        return max(d.loss, d.tensor) <= MUON
    if case.optimizer == "adamw":
        return d.loss <= ONE_STEP and d.losses <= ADAMW
    return max(d.loss, d.tensor) <= ONE_STEP and d.losses <= SGD


def factorisations(num_devices: int) -> list[tuple[int, ...]]:
    """Every mesh of so many devices."""
    sizes = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    return [shape for shape in itertools.product(sizes, repeat=len(AXES)) if math.prod(shape) == num_devices]


def meshes(model: str, num_devices: int) -> list[tuple[int, ...]]:
    """Those that the model's heads and experts divide; `expert` is only for a mixture."""
    heads, experts = (SIZES | MODELS[model])["num_kv_heads"], MODELS[model].get("num_experts", 1)
    named = [(shape, dict(zip(AXES, shape, strict=True))) for shape in factorisations(num_devices)]
    return [shape for shape, sizes in named if heads % sizes["tensor"] == 0 and experts % sizes["expert"] == 0]


def attentions(model: str) -> list[str]:
    """The implementations that can express the model, and run here."""
    needs = model_of(model).config.attention_needs
    return [name for name, able in IMPLEMENTATIONS.items() if name != "splash" and not able.missing(needs)]
