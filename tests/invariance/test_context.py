"""A sequence split over devices: what each of them holds and sends. That the numbers are the same is test_invariance's."""

import re

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from gptjax.distributed.mesh import make_mesh
from gptjax.distributed.sharding import batch_sharding, tree_shardings
from gptjax.models import make_model
from gptjax.models.attention_ops import _exchange
from gptjax.training.state import init_state
from gptjax.training.step import StepSettings, make_train_step
from tests.invariance.checks import COMPILE_FAST, HYPER

LENGTH = 8192


def test_each_device_works_on_both_ends_of_the_row():
    mesh = make_mesh({"context": 4})
    row = np.arange(16)[None]

    def there_and_back(x):
        moved = _exchange(x, 4)
        return moved, _exchange(moved, 4, back=True)

    with jax.set_mesh(mesh):
        spec = P(None, "context")
        moved, back = jax.shard_map(there_and_back, in_specs=spec, out_specs=(spec, spec))(row)
    np.testing.assert_array_equal(back, row)
    for device, held in enumerate(np.asarray(moved).reshape(4, 4)):
        ends = [*range(2 * device, 2 * device + 2), *range(14 - 2 * device, 16 - 2 * device)]
        assert sorted(held) == ends
        # With a causal mask, query i looks at i + 1 keys.
        assert sum(held + 1) == 34


def test_no_device_holds_a_whole_row_but_for_keys_and_values():
    sizes = dict(num_heads=8, num_kv_heads=1, head_dim=16, embed_dim=128, mlp_dim=256, vocab_size=512)
    model = make_model("gpt", **sizes, num_layers=1, max_seq_len=LENGTH, position="rotary", use_bias=False)
    mesh = make_mesh({"context": 4})
    settings = StepSettings("adamw", "constant", 1, 1, 1.0, 0.0, 0.0, 0.0, False)
    shapes = jax.eval_shape(
        lambda seed: init_state(model, "adamw", HYPER, seed, np.float32(1), ema=False), np.uint32(0)
    )
    shardings = tree_shardings(shapes, mesh)
    names = ("inputs", "targets", "segment_ids", "positions")
    batch = dict.fromkeys(names, np.zeros((1, LENGTH), np.int32)) | {"loss_weights": np.zeros((1, LENGTH), np.float32)}
    step = jax.jit(
        make_train_step(model, settings),
        in_shardings=(shardings, dict.fromkeys(batch, batch_sharding(mesh))),
        out_shardings=(shardings, None),
        compiler_options=COMPILE_FAST,
    )
    with jax.set_mesh(mesh):
        program = step.lower(shapes, batch).compile().as_text()
    shapes_held = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", program)}
    whole = {shape for shape in shapes_held if LENGTH in shape}
    assert whole == {(1, LENGTH, 1, 16)}
    # Nor scores of more than a block of queries and one of keys, 512 each.
    assert max(np.prod(shape) for shape in shapes_held) <= max(8 * 512 * 512, 512 * LENGTH // 4)
    gathered = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather", program)
    assert sorted(set(gathered)) == [f"f32[1,{LENGTH},1,16]", f"s32[1,{LENGTH}]"]
