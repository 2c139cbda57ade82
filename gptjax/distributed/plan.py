"""What a program would need and take on a slice of TPUs that is not here: compiled by their compiler, then read.

Times are predictions. They rest on the compiler's own estimates and on published bandwidths, and nothing here has been
checked against a TPU; the memory is what the compiler allots.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from gptjax.distributed.chips import Chip, slice_shape
from gptjax.distributed.hlo import Collective, program_cost
from gptjax.distributed.mesh import AXES, make_mesh

# Otherwise libtpu asks the network which TPU this machine is, and refuses to be loaded twice.
_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """The devices of one or more slices.

    Attributes:
      devices: of all slices, slice by slice.
      num_slices: how many.
      chip: its figures; None for fake CPU devices.
      shape: of one slice, in chips.
      places: of each device of the first slice, its chip in the torus and its core.
    """

    devices: tuple[Any, ...]
    num_slices: int
    chip: Chip | None
    shape: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """A mesh over all devices: axis `data` goes over the slices first, everything else stays within one.

        Raises:
          ValueError: sizes whose product is not the number of devices, or `data` not divisible by the slices.
        """
        one = self.devices[: len(self.devices) // self.num_slices]
        if self.num_slices == 1:
            return make_mesh(sizes, one)
        ways = sizes["data"]
        if ways == -1:
            ways = len(self.devices) // max(1, math.prod(size for axis, size in sizes.items() if axis != "data"))
        if ways % self.num_slices:
            raise ValueError(f"mesh.data={ways} is not divisible by the {self.num_slices} slices")
        # The slices are alike, so one is laid out by JAX and the others as it is.
        numbers = self.within_slice(sizes)
        grids = [np.array(self.devices, object)[numbers + n * len(one)] for n in range(self.num_slices)]
        return Mesh(np.concatenate(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def within_slice(self, sizes: Mapping[str, int]) -> np.ndarray:
        """The numbers of one slice's devices, as its part of the mesh has them."""
        if self.chip is None or self.num_slices == 1:
            devices, data = self.devices, sizes["data"]
        else:
            # A slice alone, since JAX finds no coordinates on the devices of several.
            devices = tuple(_describe(self.chip, self.shape, 1).devices)
            data = sizes["data"] if sizes["data"] == -1 else sizes["data"] // self.num_slices
        number = {device: n for n, device in enumerate(devices)}
        mesh = make_mesh({**sizes, "data": data}, devices)
        return np.vectorize(number.__getitem__)(mesh.devices)


def find_slices(topology: str, num_slices: int = 1) -> Slices:
    """The devices of a topology such as 'v5e:16x16', or 'cpu:8' for fake CPU devices.

    Call it before JAX makes a backend.

    Raises:
      ValueError: no such topology (those that there are listed), or libtpu is not installed.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices {num_slices} must be at least 1")
    if topology.startswith("cpu:"):
        if not re.fullmatch(r"cpu:[1-9]\d*", topology) or num_slices > 1:
            raise ValueError(f"topology {topology!r} with {num_slices} slices: cpu:N is one slice of N fake devices")
        count = int(topology.removeprefix("cpu:"))
        with contextlib.suppress(RuntimeError):  # there is a backend already
            jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices("cpu")[:count]
        if len(devices) < count:
            raise ValueError(f"topology {topology!r}: JAX is already running, with {len(devices)} CPU devices")
        return Slices(tuple(devices), 1, None, (count,), tuple((n, 0) for n in range(count)))
    chip, shape = slice_shape(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {topology!r} needs the TPU compiler: pip install 'gptjax[plan]'")
    described = _describe(chip, shape, 1)
    places = tuple((*d.coords[: chip.torus], d.core_on_chip) for d in described.devices)
    devices = described.devices if num_slices == 1 else _describe(chip, shape, num_slices).devices
    return Slices(tuple(devices), num_slices, chip, shape, places)


def _describe(chip: Chip, shape: tuple[int, ...], num_slices: int) -> Any:
    from jax.experimental import topologies

    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    arguments: dict[str, Any] = {} if num_slices == 1 else {"num_slices": num_slices}
    if chip.kind == "TPU v4":
        arguments["chip_config_name"] = "megacore"  # one device a chip, as users have it
    if math.prod(shape) == 1:
        arguments["chips_per_host_bounds"] = (1, 1, 1)
    name = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4"}.get(chip.kind, "tpu7x")
    text = "x".join(map(str, shape))
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{text}", **arguments)


@dataclasses.dataclass
class Transfer:
    """Collectives of one kind over the same mesh axes.

    Attributes:
      count: of them in one run of the program.
      num_bytes: that a device sends.
      seconds: predicted.
    """

    count: int = 0
    num_bytes: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one compiled program needs and is predicted to take.

    Attributes:
      bytes_needed, bytes_usable: of memory, a device; the latter None on CPU.
      bytes_arguments, bytes_temporaries: the compiler's figures, 0 where it does not fit. Their sum may exceed
        `bytes_needed`, the peak.
      compile_seconds, compile_cpu_seconds: wall clock, and of all threads together.
      compute_seconds: predicted; None on CPU, whose compiler estimates nothing.
      kernel_seconds: the part of it for attention kernels, their products at `Chip.flops`.
      transfers: by (kind, mesh axes or 'slices').
      uncosted: how often instructions without a cost run, by opcode or name.
      unknown_loops: loops of unknown length, counted once.
    """

    bytes_needed: float
    bytes_usable: float | None
    bytes_arguments: float = 0.0
    bytes_temporaries: float = 0.0
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0
    compute_seconds: float | None = None
    kernel_seconds: float = 0.0
    transfers: Mapping[tuple[str, str], Transfer] = dataclasses.field(default_factory=dict)
    uncosted: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    @property
    def fits(self) -> bool:
        """Whether it fits in memory; True on CPU."""
        return self.bytes_usable is None or self.bytes_needed <= self.bytes_usable

    @property
    def communication_seconds(self) -> float:
        """All collectives one after another."""
        return sum(t.seconds for t in self.transfers.values())

    @property
    def bracket(self) -> tuple[float, float] | None:
        """Predicted seconds: all communication hidden behind computation, or behind the other way round; and none."""
        if self.compute_seconds is None:
            return None
        return max(self.compute_seconds, self.communication_seconds), self.compute_seconds + self.communication_seconds


def plan(lowered: Any, slices: Slices, sizes: Mapping[str, int]) -> Plan:
    """Compiles a lowered program and predicts.

    Args:
      lowered: of `jax.jit`, with arguments sharded over `slices.mesh(sizes)`.
      slices: where it would run.
      sizes: of the mesh axes, none of them -1.
    """
    usable = None if slices.chip is None else float(slices.chip.hbm_bytes)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with _no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _bytes_needed(str(error))
        if needed is None:
            raise
        return Plan(needed, usable, compile_seconds=time.perf_counter() - start)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    m = compiled.memory_analysis()
    needed = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    if (
        slices.chip is not None
    ):  # whose compiler's sum of temporaries counts some memory twice; the peak is what it checks
        needed = m.peak_memory_in_bytes
    return Plan(
        needed,
        usable,
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        seconds,
        cpu_seconds,
        **predict(compiled.as_text(), slices, sizes),
    )


def predict(text: str, slices: Slices, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a `Plan` about time, from a compiled program's text; the arguments are those of `plan`."""
    cost, chip = program_cost(text), slices.chip
    transfers: dict[tuple[str, str], Transfer] = {}
    layout = slices.within_slice(sizes)
    for collective, count in cost.collectives.items():
        sent, took = _transfer(collective, layout, slices)
        transfer = transfers.setdefault((collective.kind, _axes(collective, layout)), Transfer())
        transfer.count += count
        transfer.num_bytes += count * sent
        transfer.seconds += count * took
    kernels = 0.0 if chip is None else cost.kernel_flops / chip.flops
    return {
        "compute_seconds": None if chip is None else cost.cycles / chip.clock + kernels,
        "kernel_seconds": kernels,
        "transfers": transfers,
        "uncosted": cost.uncosted,
        "unknown_loops": cost.unknown_loops,
    }


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    # A program out of the cache says nothing about the time to compile it, and one for a TPU cannot be read here.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which has made up its mind at the first program
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _bytes_needed(message: str) -> float | None:
    """What the compiler says it would take, if that is why it gave up."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else math.inf


def _axes(collective: Collective, layout: np.ndarray) -> str:
    """The mesh axes along which the members of a group differ."""
    if collective.between_slices:
        return "slices"
    members = list(dict.fromkeys(np.ravel(np.array(collective.group, int)).tolist()))
    if not members:
        return "+".join(name for name, size in zip(AXES, layout.shape, strict=True) if size > 1)
    places = [np.unravel_index(member, layout.shape) for member in members]
    return "+".join(name for name, along in zip(AXES, zip(*places, strict=True), strict=True) if len(set(along)) > 1)


def _transfer(collective: Collective, layout: np.ndarray, slices: Slices) -> tuple[float, float]:
    """(bytes that a device sends, predicted seconds) of one collective.

    The algorithms are those of rings, an axis of the torus each, used side by side (Austin et al., 2025, How to Scale Your
    Model, chapter 3). With n members and b bytes on each, a device sends b (n - 1) for a gather, b (n - 1) / n for a
    scatter, both for an all-reduce; an all-to-all is bound by the middle of its longest ring, b n / 4; a permutation by
    its longest way.
    """
    b, chip = collective.num_bytes, slices.chip
    if collective.between_slices:
        n = slices.num_slices
        sent = b * {"all-gather": n - 1, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}.get(
            collective.kind, 1.0
        )
        return sent, sent / chip.dcn if chip else 0.0
    if collective.kind == "collective-permute":
        pairs = [pair for pair in collective.group if pair[0] != pair[1]]
        if chip is None or not pairs:
            return float(b if pairs else 0), 0.0
        return float(b), b * max(_hops(pair, layout, slices) for pair in pairs) / (chip.ici / 2)
    members = collective.group or tuple(range(layout.size))
    n = len(members)
    sent = b * {"all-gather": n - 1, "reduce-scatter": (n - 1) / n, "all-reduce": 2 * (n - 1) / n}.get(
        collective.kind, (n - 1) / n
    )
    if chip is None or n == 1:
        return sent, 0.0
    share, longest = _rings(members, layout, slices)
    took = b * longest / 4 if collective.kind == "all-to-all" else sent
    return sent, took / (chip.ici * share)


def _places(members: Any, layout: np.ndarray, slices: Slices) -> list[tuple[int, ...]]:
    order = np.ravel(layout)
    return [slices.places[order[member]] for member in members]


def _rings(members: tuple[int, ...], layout: np.ndarray, slices: Slices) -> tuple[float, int]:
    """How many whole rings the members have to themselves, and the length of the longest.

    An axis that does not close to a ring counts half; one whose links other groups share, its share.
    """
    assert slices.chip is not None
    share, longest = 0.0, 1
    for axis, along in enumerate(zip(*_places(members, layout, slices), strict=True)):
        if axis == slices.chip.torus or len(set(along)) == 1:
            continue
        size, count, span = slices.shape[axis], len(set(along)), max(along) - min(along) + 1
        closed = slices.chip.wraps(size, slices.shape) and (count == size or span > size // 2)
        share += count / size if closed else 0.5 * count / span
        longest = max(longest, count)
    return share or 1.0, longest  # two cores of one chip have a link of their own


def _hops(pair: tuple[int, int], layout: np.ndarray, slices: Slices) -> int:
    assert slices.chip is not None
    total = 0
    source, target = _places(pair, layout, slices)
    for axis, size in enumerate(slices.shape):
        distance = abs(source[axis] - target[axis])
        total += min(distance, size - distance) if slices.chip.wraps(size, slices.shape) else distance
    return max(1, total)
