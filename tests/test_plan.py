"""The plan counts what a program does, whatever loops it is in; the arithmetic of rings is that of the book."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import cli, plan
from gptjax.distributed import hlo
from gptjax.distributed.chips import CHIPS, slice_shape
from gptjax.distributed.mesh import AXES, make_mesh
from gptjax.distributed.plan import Slices, _bytes_needed, _transfer, find_slices
from gptjax.distributed.sharding import tree_shardings
from gptjax.models import make_model
from gptjax.models.attention_ops import _INVISIBLE, Mask, _Options, _plain, _splash
from gptjax.training.throughput import num_params

TRIPS = 5
COLLECTIVES = {
    "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
    "all-gather": lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[: x.shape[0]],
    "reduce-scatter": lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (2, 1)),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
}


def mesh_of(**sizes):
    return make_mesh(sizes)


def looped(kind):
    """The text of a program that runs one collective `TRIPS` times over fsdp, 2 of 4 devices."""

    def body(_, x):
        return jnp.sin(COLLECTIVES[kind](x))

    def local(x):
        return jax.lax.fori_loop(0, TRIPS, body, x)

    mesh, spec = mesh_of(data=2, fsdp=2), P(("data", "fsdp"))
    function = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(function).lower(x).compile().as_text()


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_are_counted_once_a_trip(kind):
    cost = hlo.program_cost(looped(kind))
    (collective,) = cost.collectives
    assert collective.kind == kind and cost.collectives[collective] == TRIPS and cost.unknown_loops == 0
    assert collective.num_bytes == 64 // 4 * 8 * 4
    group = ((0, 1), (1, 0)) if kind == "collective-permute" else (0, 1)
    assert collective.group[:2] == group


@pytest.mark.parametrize(
    ("attribute", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'fsdp'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'tensor','data'}", (0, 1, 8, 9)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", (0, 2, 4, 6)),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_as_they_are_printed(attribute, group):
    assert hlo._group(f", channel_id=1, {attribute}, metadata={{}}") == group


# What the TPU compiler prints, shortened: a loop of 12 from a constant handed to it, one gather spread over two fusions,
# a kernel whose text has a line break, a prefetch without a cost.
TPU_PROGRAM = """HloModule jit_step, is_scheduled=true

%spread.1 (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,4]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}
%spread.2 (p.1: bf16[8,4]) -> bf16[32,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %g = bf16[32,4]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %m = bf16[32,4]{1,0} multiply(%g, %g)
}
%cond (c: (s32[], bf16[8,4], s32[])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[8,4]{1,0}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=2
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (b: (s32[], bf16[8,4], s32[])) -> (s32[], bf16[8,4], s32[]) {
  %b = (s32[], bf16[8,4]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%b), index=1
  %n.1 = s32[] get-tuple-element(%b), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i.1, %two)
  %start = bf16[32,4]{1,0} fusion(%x), kind=kCustom, calls=%spread.1
  %work = bf16[32,4]{1,0} fusion(%x), calls=%spread.2, backend_config={"window_config":{"estimated_cycles":"100"}}
  %q = bf16[2,4,256,64]{3,2,1,0} bitcast(%work)
  %k = bf16[2,2,256,64]{3,2,1,0} bitcast(%work)
  %splash_mha_fwd_residuals.3 = bf16[2,4,256,64]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call",x="a
b", backend_config={}
  %copy-start.5 = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(1)}, u32[]) copy-start(%x)
  ROOT %t = (s32[], bf16[8,4]{1,0}, s32[]) tuple(%next, %x, %n.1)
}
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %end = s32[] constant(24)
  %init = (s32[], bf16[8,4]{1,0}, /*index=2*/s32[]) tuple(%zero, %a, %end)
  %loop = (s32[], bf16[8,4]{1,0}, s32[]) while(%init), condition=%cond, body=%body
  %out = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %last = bf16[8,4]{1,0} add(%out, %a), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_tpu_program():
    cost = hlo.program_cost(TPU_PROGRAM)
    assert cost.cycles == 12 * 100 + 7
    assert cost.collectives == {hlo.Collective("all-gather", (0, 1, 2, 3), 64): 12}
    # Two products of [2, 4, 256, 128] with 256 keys, half of them seen.
    assert cost.kernel_flops == 12 * 2 * (2 * 2 * 4 * 256 * 128 * 256) / 2
    assert cost.uncosted == {"copy-start": 12} and cost.unknown_loops == 0


def slices_of(chip, shape, num_slices=1):
    places = tuple((*place, 0) for place in np.ndindex(*shape))
    return Slices((None,) * len(places) * num_slices, num_slices, CHIPS[chip], shape, places)


@pytest.mark.parametrize(
    ("kind", "layout", "group", "seconds"),
    [
        # b bytes on each of 16; a ring of 16 links of 9e10 bytes/s, both directions together.
        ("all-gather", (16, 16), range(16), 15 / 9e10),
        ("all-gather", (16, 16), range(0, 256, 16), 15 / 9e10),
        ("reduce-scatter", (16, 16), range(16), 15 / 16 / 9e10),
        ("all-reduce", (16, 16), range(16), 2 * 15 / 16 / 9e10),
        ("all-to-all", (16, 16), range(16), 16 / 4 / 9e10),
        ("collective-permute", (16, 16), [(0, 1), (15, 0)], 1 / 4.5e10),
        ("collective-permute", (16, 16), [(0, 3)], 3 / 4.5e10),
        # Both axes at once, and four in a row, which is no ring.
        ("all-gather", (16, 16), range(256), 255 / (2 * 9e10)),
        ("all-gather", (16, 16), range(4), 3 / 4.5e10),
        # Every fourth of a ring: four groups share its links.
        ("all-gather", (16, 16), range(0, 16, 4), 3 / (9e10 / 4)),
        # A slice of 4 x 4 closes nowhere.
        ("all-gather", (4, 4), range(4), 3 / 4.5e10),
    ],
)
def test_collectives_take_what_their_rings_allow(kind, layout, group, seconds):
    slices = slices_of("v5e", layout)
    grid = np.arange(len(slices.places)).reshape(-1, *[1] * (len(AXES) - 1))
    _, took = _transfer(hlo.Collective(kind, tuple(group), 1000), grid, slices)
    assert took == pytest.approx(1000 * seconds)


def test_between_slices_the_network_of_the_data_center_counts():
    collective = hlo.Collective("all-reduce", (), 1000, between_slices=True)
    sent, took = _transfer(
        collective, np.arange(16).reshape(1, 16, *[1] * (len(AXES) - 2)), slices_of("v5e", (4, 4), 4)
    )
    assert sent == 2 * 1000 * 3 / 4 and took == sent / CHIPS["v5e"].dcn


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (48.07G) exceeds available HBM (15.75G).",
            48.07,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm.", 17.2),
        ("INTERNAL: something else (3G) exceeds", None),
    ],
)
def test_out_of_memory_is_read(message, gib):
    assert _bytes_needed(message) == (gib and gib * 2**30)


@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:1x1", "v4:2x2x1", "v5p:4x4x8", "v5p:16x16x24", "tpu7x:4x8x8"])
def test_shapes_that_exist(name):
    assert "x".join(map(str, slice_shape(name)[1])) == name.split(":")[1]


@pytest.mark.parametrize(
    "name", ["v5e:3x5", "v5e:32x32", "v5e:4x4x4", "v5p:8x4x4", "v5p:2x2", "v5e", "v5e:axb", "v5p:0x0x0"]
)
def test_shapes_that_do_not_exist(name):
    with pytest.raises(ValueError, match=r"does not exist; of v5\w there are v5\w:\d+x\d+"):
        slice_shape(name)


def test_a_chip_that_does_not_exist_lists_all():
    with pytest.raises(ValueError, match=r"v4:.*v5e:.*v5p:.*v6e:.*tpu7x:.*cpu:N"):
        slice_shape("v9:4x4")


SPLIT = ("kernel", "embedding")
TINY = ["--config", "configs/default.py", "--config.model.embed_dim=32", "--config.model.num_layers=2"]
TINY += ["--config.data.tokenizer=byte", "--config.model.max_seq_len=32", "--config.train.batch_size=8"]


def run_plan(*arguments):
    return plan.main([*TINY, *arguments])


def test_plan_of_fake_devices(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert run_plan("--topology", "cpu:4", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "mesh fsdp 4" in printed and "no prediction of time" in printed and "all-gather" in printed
    report = json.loads(path.read_text())
    figures = report["metrics"]
    # A quarter of what fsdp splits, all of the rest: [D] norms and biases, [L, F], [L, H, K].
    config = cli.load_config("configs/default.py", [a.removeprefix("--config.").split("=") for a in TINY[2:]])
    _, _, shapes = plan.abstract_run(config)
    split = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(shapes.params) if path[-1].key in SPLIT)
    assert figures["bytes/weights"] == 4 * (num_params(shapes.params) - split) + split
    assert 2 * figures["bytes/weights"] <= figures["bytes/optimizer"] <= 2 * figures["bytes/weights"] + 16
    assert figures["bytes/needed"] >= figures["bytes/arguments"] > 3 * figures["bytes/weights"]


def test_search_prints_the_flags_of_the_best(capsys, monkeypatch):
    monkeypatch.setattr(plan, "MOST_COMPILED", 2)
    assert run_plan("--topology", "cpu:2", "--search") == 0
    printed = capsys.readouterr().out
    assert "ranked by memory" in printed and re.search(r"--config\.mesh\.data=\d --config\.mesh\.fsdp=\d", printed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--topology CHIP:SHAPE is required"),
        (("--topology", "v5e:3x5"), "does not exist; of v5e there are"),
        (("--topology", "cpu:0"), "cpu:N is one slice of N fake devices"),
        (("--topology", "cpu:2", "--num_slices", "0"), "num_slices 0 must be at least 1"),
        (("--topology", "cpu:4", "--config.mesh.data=3"), "the product must be the number of devices, 4"),
        (
            ("--topology", "cpu:4", "--config.train.batch_size=6"),
            "not divisible by the 4 devices of mesh data x fsdp x expert",
        ),
        (
            ("--topology", "cpu:4", "--config.mesh.tensor=4", "--config.model.num_heads=2"),
            "2 is not divisible by mesh.tensor",
        ),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(cli.UserError) as error:
        run_plan(*arguments)
    assert words in str(error.value)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the TPU compiler: pip install 'gptjax\[plan\]'"):
        find_slices("v5e:4x4")


def test_rows_stay_split_over_a_mesh_that_is_set(sizes):
    model = make_model("gpt", **sizes)
    tokens = jnp.zeros((8, 16), jnp.int32)
    params = model.init(jax.random.key(0), tokens)
    mesh = mesh_of(data=2, fsdp=2)
    params = jax.device_put(params, tree_shardings(params, mesh))
    with jax.set_mesh(mesh):
        logits = jax.jit(model.apply)(params, tokens)
    assert logits.sharding.shard_shape(logits.shape) == (2, 16, sizes["vocab_size"])


def test_the_kernel_of_a_tpu_runs_on_each_devices_rows_and_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (4, 128, heads, 64)) for k, heads in zip(keys, (4, 2, 2), strict=True))
    index = jnp.arange(128)[None]
    segments = jnp.repeat(jnp.array([[1, 2]]), 64, axis=1).repeat(4, axis=0)
    mask, options = Mask(index, index, segments, segments), _Options(0.125, None, 0.0, None, None)
    expected = _plain(query, key, value, mask, options)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        mixed = jax.jit(lambda q, k, v, s: _splash(q, k, v, Mask(index, index, s, s), options, interpret=True))(
            query, key, value, segments
        )
    np.testing.assert_allclose(mixed, expected, atol=2e-5)
    assert _INVISIBLE < 0
