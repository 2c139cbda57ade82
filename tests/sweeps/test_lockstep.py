"""Runs in lockstep compute what each computes alone, on one device and spread over four."""

import functools

import jax
import numpy as np
import pytest

from gptjax.distributed.mesh import AXES
from gptjax.distributed.sharding import batch_sharding, tree_shardings
from gptjax.models import make_model
from gptjax.training.checkpoints import Checkpoints
from gptjax.training.lockstep import common_steps, in_turn, make_mesh_of_runs, side_by_side, with_runs
from gptjax.training.optimizers import Hyperparameters
from gptjax.training.state import init_state
from gptjax.training.step import StepSettings, make_train_step
from tests.invariance.checks import COMPILE_FAST, double_precision

NUM_RUNS, ROWS = 12, 4
SETTINGS = StepSettings("adamw", "cosine", 20, 2, 1.0, 1e-4, 0.9, 3.0, use_dropout=True)


@pytest.fixture
def sizes(sizes):
    return sizes | {"num_layers": 1}


def hyperparameters(run):
    """3 learning rates x 4 seeds; warm-up, decay, betas and dropout, often 0, differ too."""
    rate, dropout = 10.0 ** -(2 + run // 4), (0.0, 0.1)[run % 2]
    numbers = (rate, 5 + run, 0.1, 0.01 * run, 0.9 - 0.01 * run, 0.95, 0.9, dropout)
    return Hyperparameters(*map(np.float32, numbers))


def batches_of(seed, sizes, num_steps):
    rng = np.random.default_rng(seed)
    shape = (num_steps, ROWS, sizes["max_seq_len"] + 1)
    tokens = rng.choice(sizes["vocab_size"], shape, p=rng.dirichlet(np.ones(sizes["vocab_size"]))).astype(np.int32)
    ones = np.ones((ROWS, sizes["max_seq_len"]), np.int32)
    rest = {"segment_ids": ones, "positions": ones.cumsum(1) - 1, "loss_weights": ones.astype(np.float32)}
    return [{"inputs": rows[:, :-1], "targets": rows[:, 1:]} | rest for rows in tokens]


def alone(run, sizes, num_steps):
    """Losses of a run by itself; without dropout nothing of it is compiled."""
    model, hyper = make_model("gpt", **sizes), hyperparameters(run)
    init = jax.jit(functools.partial(init_state, model, "adamw", ema=True))
    state = init(hyper, np.uint32(run % 4), np.float32(1 + run / 12))
    step = _compiled(model, bool(hyper.dropout))
    losses = []
    for batch in batches_of(run % 4, sizes, num_steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.params


@functools.cache
def _compiled(model, use_dropout):
    return jax.jit(make_train_step(model, SETTINGS._replace(use_dropout=use_dropout)), compiler_options=COMPILE_FAST)


def together(sizes, num_steps, axes, over_runs=in_turn):
    model, runs = make_model("gpt", **sizes), range(NUM_RUNS)
    mesh = make_mesh_of_runs(axes, NUM_RUNS)
    hyper = jax.tree.map(lambda *x: np.stack(x), *map(hyperparameters, runs))
    seeds = np.array([run % 4 for run in runs], np.uint32)
    scales = np.array([1 + run / 12 for run in runs], np.float32)
    init = functools.partial(init_state, model, "adamw", ema=True)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, hyperparameters(0), np.uint32(0), np.float32(1))
        lie = jax.tree.map(with_runs, tree_shardings(shapes, mesh))
        states = jax.jit(over_runs(init), out_shardings=lie)(hyper, seeds, scales)
        step = over_runs(make_train_step(model, SETTINGS))
        step = jax.jit(step, donate_argnums=0, out_shardings=(lie, None), compiler_options=COMPILE_FAST)
        losses = []
        for batches in zip(*(batches_of(run % 4, sizes, num_steps) for run in runs), strict=True):
            stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
            states, metrics = step(states, jax.device_put(stacked, with_runs(batch_sharding(mesh))))
            losses.append(np.asarray(metrics["loss"]))
    return np.stack(losses), states.params, mesh


@pytest.mark.parametrize("over_runs", [in_turn, side_by_side])
@pytest.mark.parametrize(("axes", "ways", "runs"), [({"data": -1}, 4, range(12)), ({"fsdp": 2}, 2, (0, 11))])
def test_losses_are_those_of_each_run_alone(sizes, axes, ways, runs, over_runs):
    losses, _, mesh = together(sizes, 20, dict.fromkeys(AXES, 1) | axes, over_runs)
    assert mesh.shape["runs"] == ways and mesh.size == 4
    for run in runs:
        np.testing.assert_allclose(losses[:, run], alone(run, sizes, 20)[0], rtol=1e-5, err_msg=str(run))


def test_a_step_in_float64(sizes):
    with double_precision():
        losses, params, _ = together(sizes, 1, dict.fromkeys(AXES, 1) | {"data": -1})
        assert losses.dtype == np.float64
        for run in (0, 5, 11):
            solo, solo_params = alone(run, sizes, 1)
            np.testing.assert_allclose(losses[0, run], solo[0], rtol=1e-10)
            for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(solo_params), strict=True):
                assert theirs.dtype == np.float64
                np.testing.assert_allclose(ours[run], theirs, rtol=1e-10, atol=1e-12)


class Kept(Checkpoints):
    """Of given steps, without files."""

    def __init__(self, *steps):
        self.path, self._kept = "runs/one", list(steps)

    def steps(self):
        return self._kept

    def whole_steps(self):
        return [step for step in self._kept if step > 0]


def test_runs_go_on_from_the_latest_step_that_most_have():
    assert common_steps([Kept(), Kept()]) == [(0, [0, 1])]
    assert common_steps([Kept(100, 200, 250), Kept(150, 200), Kept(100, 200)]) == [(200, [0, 1, 2])]
    assert common_steps([Kept(100, 250), Kept(100, 250), Kept(100, 200)]) == [(100, [0, 1, 2])]
    assert common_steps([Kept(500), Kept(), Kept(100, 120), Kept(100, 120)]) == [(120, [2, 3]), (500, [0]), (0, [1])]
    with pytest.raises(ValueError, match="every checkpoint in runs/one is damaged"):
        common_steps([Kept(-1), Kept(1)])
