"""Plan a run without its hardware: python -m experiments.plan --config configs/NAME.py --topology v5e:16x16

Compiles the very training step ahead of time, with the TPU compiler (pip install 'gptjax[plan]'), and prints whether it
fits, what each device holds, what it sends, and a prediction of the step's time. The mesh and the batch are the config's.
With --search it tries other meshes, remat policies and accumulation steps for the same batch, and ranks them.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import build, cli, describe

MOST_COMPILED = 12  # of a search's candidates, the likeliest


class Case(NamedTuple):
    """One way of running a config: the sizes of the mesh axes, and two fields of the config."""

    sizes: dict[str, int]
    remat: str
    accumulation_steps: int

    @property
    def flags(self) -> str:
        """What to add to the command that trains."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.sizes.items()]
        rest = [f"--config.model.remat={self.remat}", f"--config.train.accumulation_steps={self.accumulation_steps}"]
        return " ".join(mesh + rest)


class Outcome(NamedTuple):
    """A case, its `distributed.plan.Plan`, and bytes a device of the state by kind."""

    case: Case
    plan: Any
    state_bytes: dict[str, int]


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code."""
    parser = cli.Parser(__doc__, config=True)
    parser.add_argument("--topology", help="v4, v5e, v5p, v6e or tpu7x and a shape, as v5e:4x4; or cpu:N (required)")
    parser.add_argument("--num_slices", type=int, default=1, help="slices; mesh.data goes over them")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and accumulation steps")
    arguments = parser.parse(argv)
    if arguments.topology is None:
        parser.error("--topology CHIP:SHAPE is required")
    config = arguments.config
    build.check(config)
    import jax

    jax.config.update("jax_platforms", "cpu")  # whatever is here, it is not planned for
    from gptjax.distributed.plan import find_slices

    with cli.user_errors():
        config, _, _ = build.initial_model(config)
        slices = find_slices(arguments.topology, arguments.num_slices)
        case = configured(config, slices)
        cases = search(config, slices) if arguments.search else [case]
        if not cases:
            raise cli.UserError(
                f"no way to divide config.train.batch_size={config.train.batch_size} fits {arguments.topology}; a larger "
                "slice may, or a smaller batch, or one that more devices divide"
            )
        outcomes = []
        for number, tried in enumerate(cases):
            if arguments.search:
                print(f"{number + 1} of {len(cases)}: {tried.flags}", file=sys.stderr)
            outcomes.append(compile_case(config, slices, tried))
    ranked = sorted(
        outcomes, key=lambda o: (not o.plan.fits, o.plan.bracket[1] if o.plan.bracket else o.plan.bytes_needed)
    )
    if arguments.search:
        print("\n".join(table(config, slices, ranked)) + "\n")
    print("\n".join(report(config, slices, ranked[0], arguments.topology)))
    if arguments.json:
        from gptjax.workdir import environment

        about = environment() | {
            "topology": arguments.topology,
            "num_slices": slices.num_slices,
            "flags": ranked[0].case.flags,
        }
        cli.write_report(arguments.json, about, [config.seed], figures(config, slices, ranked[0]))
    return 0


def configured(config: ConfigDict, slices: Any) -> Case:
    """The config's own case; -1 replaced by what it stands for."""
    from gptjax.distributed.mesh import AXES

    sizes = dict(slices.mesh({axis: config.mesh[axis] for axis in AXES}).shape)
    rows, ways = config.train.batch_size // config.train.accumulation_steps, row_ways(sizes)
    if rows % ways:
        raise cli.UserError(
            f"config.train.batch_size={config.train.batch_size} over config.train.accumulation_steps="
            f"{config.train.accumulation_steps} gives {rows} rows, "
            f"not divisible by the {ways} devices of mesh data x fsdp x expert"
        )
    return Case(sizes, config.model.remat, config.train.accumulation_steps)


def row_ways(sizes: dict[str, int]) -> int:
    """Ways in which rows are split."""
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def with_case(config: ConfigDict, case: Case) -> ConfigDict:
    """The config of a case."""
    config = config.copy_and_resolve_references()
    config.model.remat, config.train.accumulation_steps = case.remat, case.accumulation_steps
    return config


def compile_case(config: ConfigDict, slices: Any, case: Case) -> Outcome:
    """Compiles the training step of a case, as `experiments.train` does, and predicts."""
    import jax

    from gptjax import platform
    from gptjax.distributed.plan import plan
    from gptjax.distributed.sharding import batch_sharding, tree_shardings
    from gptjax.training.step import make_train_step

    config = with_case(config, case)
    model, settings, shapes = abstract_run(config)
    mesh = slices.mesh(case.sizes)
    shardings = tree_shardings(shapes, mesh)

    def place(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    batch = {
        name: place(x, batch_sharding(mesh))
        for name, x in describe.abstract_batch(config, config.train.batch_size).items()
    }
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(model, settings, build.loss(config)),
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=platform.compiler_options(config.model.dtype, "tpu" if slices.chip else "cpu"),
        )
        lowered = step.lower(jax.tree.map(place, shapes, shardings), batch)
        result = plan(lowered, slices, case.sizes)

    def bytes_of(field: str) -> int:
        parts = jax.tree.map(
            lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
            getattr(shapes, field),
            getattr(shardings, field),
        )
        return sum(jax.tree.leaves(parts))

    kinds = {"weights": "model_params", "optimizer": "opt_state", "moving average": "ema"}
    return Outcome(case, result, {kind: bytes_of(field) for kind, field in kinds.items()})


def abstract_run(config: ConfigDict) -> tuple[Any, Any, Any]:
    """The model, the step's settings, and the shapes of the state."""
    import jax

    from gptjax.models import make_model

    model = make_model(**build.model_sizes(config, describe.vocab_size(config)))
    settings = build.step_settings(config)
    numbers = (jax.numpy.uint32(0), jax.numpy.float32(1), build.hyperparameters(config))
    shapes = jax.eval_shape(build.initial_state(config, model), *numbers, {})
    return model, settings, shapes


def search(config: ConfigDict, slices: Any) -> list[Case]:
    """Cases worth compiling, the likeliest first: those whose arithmetic of memory fits, by that of time."""
    from gptjax.distributed.mesh import AXES
    from gptjax.distributed.sharding import tree_shardings
    from gptjax.training.throughput import flops_per_token, num_params

    model, settings, shapes = abstract_run(config)
    c, chip = model.config, slices.chip
    devices, params, length = len(slices.devices), num_params(shapes.model_params), build.seq_len(config)
    copies = 4 + bool(settings.ema_decay)  # weights, gradients, two moments
    flops = flops_per_token(model, shapes.params, length, shapes.frozen) * config.train.batch_size * length
    found: dict[tuple[int, int, str], tuple[float, Case]] = {}
    for tensor in (
        t for t in (1, 2, 4, 8) if not any(n % t for n in (devices, c.num_heads, c.num_kv_heads, c.mlp_dim))
    ):
        ways = devices // tensor
        for fsdp in (n for n in range(1, ways // slices.num_slices + 1) if ways // slices.num_slices % n == 0):
            sizes = dict.fromkeys(AXES, 1) | {"data": ways // fsdp, "fsdp": fsdp, "tensor": tensor}
            try:
                tree_shardings(shapes, slices.mesh(sizes))
            except ValueError:  # a parameter that these do not divide
                continue
            for steps in (1, 2, 4, 8, 16, 32):
                rows, rest = divmod(config.train.batch_size, steps * ways)
                if rest or not rows:
                    continue
                tokens = rows * length  # of a micro-batch, a device
                for remat, kept in kept_numbers(c, tensor).items():
                    memory = 4 * copies * params / (fsdp * tensor) + tokens * 2 * (kept + 2 * c.vocab_size / tensor)
                    # More accumulation than memory asks for only takes longer.
                    if (fsdp, tensor, remat) in found or (chip is not None and memory > chip.hbm_bytes):
                        continue
                    case = Case(sizes, remat, steps)
                    found[fsdp, tensor, remat] = guess(case, chip, flops, params, tokens, c) if chip else memory, case
    return [case for _, case in sorted(found.values(), key=lambda likely: likely[0])[:MOST_COMPILED]]


def kept_numbers(c: Any, tensor: int) -> dict[str, float]:
    """Numbers a token that the forward pass keeps, by remat policy; a lower bound."""
    inputs = c.num_layers * c.embed_dim
    products = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.mlp_dim * (2 if "glu" in c.activation else 1)
    dots = inputs + c.num_layers * (products / tensor + 2 * c.embed_dim)
    return {"none": 1.5 * dots, "dots": dots, "full": inputs}


def guess(case: Case, chip: Any, flops: float, params: int, tokens: float, c: Any) -> float:
    """Seconds of a step by arithmetic: products at the peak, and each axis's traffic at one ring."""
    data, fsdp, tensor = (case.sizes[axis] for axis in ("data", "fsdp", "tensor"))
    compute = flops / (data * fsdp * tensor) / chip.flops * {"none": 1.0, "dots": 1.05, "full": 4 / 3}[case.remat]
    # Each micro-batch adds to the gradients; the update reads and writes the state.
    compute += (12 * case.accumulation_steps + 28) * params / (tensor * fsdp) / chip.hbm_bandwidth
    moved = 0.0
    if fsdp > 1:  # weights gathered forward and backward, gradients scattered
        moved += 2 * params / tensor * (2 * case.accumulation_steps + 2)
    if data > 1:
        moved += 2 * 4 * params / (tensor * fsdp)
    if tensor > 1:  # four all-reduces of the residual stream a layer
        moved += case.accumulation_steps * c.num_layers * 4 * 2 * 2 * tokens * c.embed_dim
    return compute + moved / chip.ici


def figures(config: ConfigDict, slices: Any, outcome: Outcome) -> dict[str, float]:
    """The figures of a plan by name."""
    case, plan = outcome.case, outcome.plan
    model, _, shapes = abstract_run(with_case(config, case))
    from gptjax.training.throughput import flops_per_token

    numbers: dict[str, float] = {
        "fits": int(plan.fits),
        "bytes/needed": plan.bytes_needed,
        "bytes/arguments": plan.bytes_arguments,
        "bytes/temporaries": plan.bytes_temporaries,
        **{f"bytes/{kind}": size for kind, size in outcome.state_bytes.items()},
        "compile/seconds": plan.compile_seconds,
        "compile/cpu_seconds": plan.compile_cpu_seconds,
        "uncosted": sum(plan.uncosted.values()),
        **{f"mesh/{axis}": size for axis, size in case.sizes.items()},
    }
    if plan.bytes_usable is not None:
        numbers["bytes/usable"] = plan.bytes_usable
    for (kind, axes), t in plan.transfers.items():
        numbers |= {f"collectives/{kind}/{axes}/count": t.count, f"collectives/{kind}/{axes}/bytes": t.num_bytes}
    if plan.bracket and plan.fits:
        low, high = plan.bracket
        tokens = config.train.batch_size * describe.target_len(config)
        per_token = flops_per_token(model, shapes.params, build.seq_len(config), shapes.frozen)
        peak = slices.chip.flops * len(slices.devices)
        numbers |= {
            "predicted/compute_seconds": plan.compute_seconds,
            "predicted/kernel_seconds": plan.kernel_seconds,
            "predicted/communication_seconds": plan.communication_seconds,
            "predicted/step_seconds_low": low,
            "predicted/step_seconds_high": high,
            "predicted/tokens_per_second_low": tokens / high,
            "predicted/tokens_per_second_high": tokens / low,
            "predicted/mfu_low": tokens * per_token / high / peak,
            "predicted/mfu_high": tokens * per_token / low / peak,
        }
    return numbers


def report(config: ConfigDict, slices: Any, outcome: Outcome, topology: str) -> Iterator[str]:
    """The lines of the printed plan."""
    case, plan = outcome.case, outcome.plan
    n = figures(config, slices, outcome)
    slices_text = f"{slices.num_slices} slices of {topology}" if slices.num_slices > 1 else topology
    mesh = " x ".join(f"{axis} {size}" for axis, size in case.sizes.items() if size > 1) or "one device"
    rows = config.train.batch_size // case.accumulation_steps // row_ways(case.sizes)
    yield f"{slices_text}: {len(slices.devices)} devices, mesh {mesh}"
    yield (
        f"batch {config.train.batch_size} rows of {describe.target_len(config):,} tokens: {rows} a device at once, "
        f"{case.accumulation_steps} accumulated; remat {case.remat}"
    )
    yield from ("", "memory of a device")
    if not plan.fits:
        yield f"  DOES NOT FIT: needs {size_text(plan.bytes_needed)} of {size_text(plan.bytes_usable)}"
    for kind, size in outcome.state_bytes.items():
        if size:
            yield line(kind, size_text(size))
    if plan.fits:
        yield line("arguments", size_text(plan.bytes_arguments), "all of these and the batch")
        yield line("temporaries", size_text(plan.bytes_temporaries), "gradients, activations, gathered weights")
        usable = "" if plan.bytes_usable is None else f"of {size_text(plan.bytes_usable)} usable: fits"
        yield line("peak", size_text(plan.bytes_needed), usable)
    if not plan.fits:
        yield f"the compiler refused it after {plan.compile_seconds:.0f} s"
        return
    yield from ("", f"compiled in {plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} s of processor time)")
    yield from ("", "collectives of a step, bytes that a device sends")
    for (kind, axes), t in sorted(plan.transfers.items(), key=lambda item: -item[1].num_bytes):
        took = f"{t.seconds * 1e3:10.3f} ms" if plan.bracket else ""
        yield f"  {kind:<20} {axes:<14} {t.count:>7,} {size_text(t.num_bytes):>12} {took}".rstrip()
    if not plan.bracket:
        yield from ("", "no prediction of time: the CPU compiler estimates no cycles")
        return
    low, high = plan.bracket
    yield from ("", "predicted step, not measured")
    note = f"of which {plan.kernel_seconds * 1e3:.3g} ms attention kernels, by their products"
    yield line("compute", f"{plan.compute_seconds * 1e3:.4g} ms", note if plan.kernel_seconds else "")
    yield line("communication", f"{plan.communication_seconds * 1e3:.4g} ms")
    yield line("step", f"{low * 1e3:.4g} to {high * 1e3:.4g} ms", "all overlapped, or nothing")
    speed = (n["predicted/tokens_per_second_low"], n["predicted/tokens_per_second_high"])
    yield line("tokens/s", f"{speed[0]:,.0f} to {speed[1]:,.0f}")
    convention = "6 N + 12 L H K T FLOPs a token, masked pairs and no remat counted"
    yield line("MFU", f"{n['predicted/mfu_low']:.1%} to {n['predicted/mfu_high']:.1%}", convention)
    without = ", ".join(f"{count:,} {opcode}" for opcode, count in plan.uncosted.most_common(4))
    yield line("without a cost", f"{sum(plan.uncosted.values()):,}", f"instructions: {without}")
    if plan.unknown_loops:
        yield line("loops counted once", f"{plan.unknown_loops}", "their length could not be read")


def table(config: ConfigDict, slices: Any, ranked: list[Outcome]) -> Iterator[str]:
    """The ranking of a search, and the flags of the best."""
    yield f"{'data':>5} {'fsdp':>5} {'tensor':>6} {'remat':>6} {'accum':>5} {'memory':>12} {'predicted step':>22}    MFU"
    for outcome in ranked:
        case, plan = outcome.case, outcome.plan
        data, fsdp, tensor = (case.sizes[axis] for axis in ("data", "fsdp", "tensor"))
        took, mfu = "", ""
        if plan.fits and plan.bracket:
            took = f"{plan.bracket[0] * 1e3:.4g} to {plan.bracket[1] * 1e3:.4g} ms"
            mfu = f"{figures(config, slices, outcome)['predicted/mfu_low']:.1%}"
        elif not plan.fits:
            took = "does not fit"
        yield (
            f"{data:>5} {fsdp:>5} {tensor:>6} {case.remat:>6} {case.accumulation_steps:>5} "
            f"{size_text(plan.bytes_needed):>12} {took:>22} {mfu:>6}"
        )
    by = "by the larger end of the prediction" if slices.chip else "by memory, for want of a prediction"
    yield f"ranked {by}; the best: {ranked[0].case.flags}"


def line(name: str, figure: str, note: str = "") -> str:
    """A line of the report."""
    return f"  {name:<20} {figure:>22}  {note}".rstrip()


def size_text(num_bytes: float) -> str:
    """Bytes in a unit that suits."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"


if __name__ == "__main__":
    cli.run(main)
