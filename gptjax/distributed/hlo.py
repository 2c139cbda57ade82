"""Reading a compiled program: its estimated cycles, its collectives, and what has no cost, with loops counted in full.

The text form of XLA's programs has no promise of stability; `plan` pins the compiler by the extra of that name.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that take no time of their own: names, control flow (its body is counted), ends of what was started.
_FREE = re.compile(
    r"parameter|constant|get-tuple-element|tuple|bitcast|after-all|partition-id|replica-id|opt-barrier|optimization-barrier"
    r"|.*-done|recv|while|conditional|call|async-start|async-update|call-update"
)
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "SliceId", "Sharding")
# Matrix products of a flash-attention kernel, for which the compiler has no estimate.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: device numbers, in the order of the mesh, of the first group; of a permutation, its (source, target) pairs.
      num_bytes: of its operands on one device.
      between_slices: over the data-center network.
    """

    kind: str
    group: tuple
    num_bytes: int
    between_slices: bool = False


@dataclasses.dataclass
class Cost:
    """What running a computation takes.

    Attributes:
      cycles: estimated by the compiler.
      kernel_flops: of attention kernels, rows of fewer than 128 numbers counted as 128, half of [T, S] seen.
      collectives: how often each runs.
      uncosted: how often instructions without a cost run, by opcode, or the name of a fusion or call.
      unknown_loops: loops whose trip count could not be read; counted as one trip.
    """

    cycles: float = 0
    kernel_flops: float = 0
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    uncosted: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds `other`, run so many times."""
        self.cycles += times * other.cycles
        self.kernel_flops += times * other.kernel_flops
        for collective, count in other.collectives.items():
            self.collectives[collective] += times * count
        for opcode, count in other.uncosted.items():
            self.uncosted[opcode] += times * count
        self.unknown_loops += other.unknown_loops


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool


def program_cost(text: str) -> Cost:
    """The cost of a program on one device, from `compiled.as_text()`."""
    computations, entry = _parse(text)
    costs: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name not in costs:
            costs[name] = _cost(computations[name])
        return costs[name]

    def _cost(instructions: dict[str, _Instruction]) -> Cost:
        total = Cost()
        seen: set[str] = set()
        for i in instructions.values():
            if i.opcode == "while":
                trips = _trip_count(i, instructions, computations)
                total.unknown_loops += trips is None
                total.add(cost(_called(i, "body")[0]), 1 if trips is None else trips)
            elif i.opcode == "conditional":
                branches = _called(i, "branch_computations") or _called(i, "(?:true|false)_computation")
                total.add(max((cost(name) for name in branches), key=lambda c: c.cycles))
            elif i.opcode in ("call", "async-start"):
                for name in _called(i, "to_apply|calls|called_computation"):
                    total.add(cost(name))
            elif found := _collective(i, instructions):
                _count_once(total, found, i, seen)
            elif i.opcode == "fusion":
                # A collective spread over several fusions is there in each, under one channel.
                inside = computations[_called(i, "calls")[0]]
                for j in inside.values():
                    if found := _collective(j, inside):
                        _count_once(total, found, j, seen)
                if not all(_is_free(j) or _collective(j, inside) for j in inside.values()):
                    _count_cycles(total, i)
            elif products := _kernel_products(i):
                total.kernel_flops += products * _attention_flops(i, instructions)
            else:
                _count_cycles(total, i)
        return total

    return cost(entry)


def _count_cycles(total: Cost, i: _Instruction) -> None:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    if cycles:
        total.cycles += int(cycles[1])
    elif not _is_free(i):
        total.uncosted[i.name.split(".")[0] if i.opcode in ("fusion", "custom-call") else i.opcode] += 1


def _count_once(total: Cost, collective: Collective, i: _Instruction, seen: set[str]) -> None:
    channel = re.search(r"channel_id=(\d+)", i.attributes)
    if channel is None or channel[1] not in seen:
        total.collectives[collective] += 1
    if channel:
        seen.add(channel[1])


def _is_free(i: _Instruction) -> bool:
    if i.opcode == "custom-call":
        return any(f'custom_call_target="{name}"' in i.attributes for name in _FREE_CALLS)
    return bool(_FREE.fullmatch(i.opcode)) or shape_bytes(i.shape) <= 64  # or it works on a few numbers


def _kernel_products(i: _Instruction) -> int:
    return next((n for name, n in _KERNEL_PRODUCTS.items() if i.opcode == "custom-call" and name in i.name), 0)


def _attention_flops(i: _Instruction, instructions: dict[str, _Instruction]) -> float:
    """One product of queries [.., H, T, K] with keys [.., G, S, K] under a causal mask."""
    arrays = [_arrays(instructions[name].shape) for name in i.operands if name in instructions]
    shapes = [shape for array in arrays for kind, shape in array if "f" in kind and len(shape) >= 3]
    query, key = shapes[0], shapes[1]
    return 2 * math.prod(query[:-1]) * key[-2] * max(128, query[-1]) / 2


def _collective(i: _Instruction, instructions: dict[str, _Instruction]) -> Collective | None:
    kind = i.opcode.removesuffix("-start")
    num_bytes = sum(shape_bytes(instructions[name].shape) for name in i.operands if name in instructions)
    if i.opcode == "send" and (transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)):
        return Collective(transfer[1].lower().replace("_", "-"), (), num_bytes, between_slices=True)
    if kind not in COLLECTIVES:
        return None
    return Collective(kind, _group(i.attributes), num_bytes)


def _group(attributes: str) -> tuple:
    """The first group of a collective; it stands for all of them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])]
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in explicit[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims = (tuple(int(n) for n in iota[k].split(",")) for k in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        return tuple(np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups)[0].tolist())
    # A mesh by name, row by row, with the axes that a group spans; an axis may be taken in part, as 'a':(2)4.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        index: list[slice | int] = [0] * len(axes)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2]):
            step = axes[name] // (int(before) * int(size)) if before else 1
            index[list(axes).index(name)] = slice(0, step * int(size) if before else None, step)
        return tuple(np.ravel(np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))[tuple(index)]).tolist())
    return ()


def _trip_count(
    loop: _Instruction, instructions: dict[str, _Instruction], computations: dict[str, dict[str, _Instruction]]
) -> int | None:
    """How often a loop runs that counts up by a constant to a constant; None if it cannot be read."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    start = instructions.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None

    def value(i: _Instruction | None, inside: dict[str, _Instruction]) -> int | None:
        """A constant, also one that is handed to the loop."""
        while i is not None and i.opcode in ("copy", "bitcast", "convert"):
            i = inside.get(i.operands[0])
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.operands[0]) if re.fullmatch(r"-?\d+", i.operands[0]) else None
        if i.opcode == "get-tuple-element" and inside is not instructions:
            return value(instructions.get(start.operands[_index(i)]), instructions)
        return None

    condition = computations[_called(loop, "condition")[0]]
    test = next(i for i in condition.values() if i.is_root)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = condition.get(test.operands[0])
    limit = value(condition.get(test.operands[1]), condition)
    if counter is None or counter.opcode != "get-tuple-element" or limit is None:
        return None
    first = value(instructions.get(start.operands[_index(counter)]), instructions) or 0
    body = computations[_called(loop, "body")[0]]
    result = next(i for i in body.values() if i.is_root)
    added = body.get(result.operands[_index(counter)]) if result.opcode == "tuple" else None
    step = None
    if added is not None and added.opcode == "add":
        step = next((n for n in (value(body.get(name), body) for name in added.operands[::-1]) if n), None)
    return max(0, -(-(limit - first) // (step or 1)))


def _index(i: _Instruction) -> int:
    match = re.search(r"index=(\d+)", i.attributes)
    assert match is not None
    return int(match[1])


def _called(i: _Instruction, attribute: str) -> list[str]:
    """Names of computations in an attribute."""
    found = re.findall(rf"(?:{attribute})=(\{{[^}}]*\}}|%?[\w.\-]+)", i.attributes)
    return [name for part in found for name in re.findall(r"[\w.\-]+", part)]


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """The computations of a program by name, and the name of its first."""
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (instruction := _parse_instruction(line)):
            current[instruction.name] = instruction
    return computations, entry


def _logical_lines(text: str) -> Iterator[str]:
    """Lines of the program; a kernel's text may have broken one into several."""
    pending = ""
    for line in text.split("\n"):
        if re.match(r"\s+(ROOT )?%?[\w.\-]+ = |\}|(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            if pending:
                yield pending
            pending = line.rstrip()
        else:
            pending += line
    yield pending


def _parse_instruction(line: str) -> _Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    end = _closing(line, match.end()) if line[match.end()] == "(" else line.index(" ", match.end())
    shape = line[match.end() : end]
    opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
    if opcode is None:
        return None
    close = _closing(line, end + opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", line[end + opcode.end() : close - 1])
    # Older printers put each operand's shape before its name.
    operands = re.findall(r"%([\w.\-]+)", inside) or [part.strip() for part in inside.split(",")]
    return _Instruction(match[2], shape, opcode[1], operands, line[close:], bool(match[1]))


def _closing(line: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += (line[position] == "(") - (line[position] == ")")
        if depth == 0:
            return position + 1
    return len(line)


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, sizes) of each array in a shape."""
    found = re.findall(r"(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]", shape)
    return [(kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in found]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as 'bf16[8,128]{1,0}' or a tuple of them."""
    total = 0.0
    for kind, sizes in _arrays(shape):
        bits = re.search(r"\d+", kind)
        total += math.prod(sizes) * (int(bits[0]) / 8 if bits else kind == "pred")
    return math.ceil(total)
