"""Traces of training steps, and where their time went."""

import collections
import pathlib
import re
from typing import Any

import jax


def start_trace(folder: str) -> None:
    """Starts an xprof trace without Python's own calls, which would slow down what is measured."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)


def top_operations(folder: str | pathlib.Path, hlo: str, count: int = 15) -> str:
    """A table of the operations that took longest in the latest trace of `folder`.

    Args:
      folder: that `start_trace` was given.
      hlo: the text of the compiled step, which says what in the model an operation is part of.
      count: how many operations.

    Returns:
      Lines of: share of all operations' time, milliseconds, times run, operation, part of the model. Times are added over
      devices and, on CPU, threads; an operation's does not include those it calls.
    """
    module = hlo.split()[1].rstrip(",")  # HloModule NAME, ...
    file = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for name, nanoseconds in _own_times(line, module):
                seconds[name] += nanoseconds / 1e9
                counts[name] += 1
    parts = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', hlo, re.MULTILINE))
    total = sum(seconds.values())
    rows = [f"{'share':>6} {'ms':>9} {'runs':>6}  operation ({1e3 * total:.2f} ms in all)"]
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]:
        share = seconds[name] / total
        rows.append(f"{share:6.1%} {1e3 * seconds[name]:9.2f} {counts[name]:6}  {name}  {parts.get(name, '')[-80:]}")
    return "\n".join(rows)


def _own_times(line: Any, module: str) -> list[tuple[str, float]]:
    """(operation of a compiled module, nanoseconds less those of operations within it) of a line of a trace."""
    events = []
    for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op") or (event.name if line.name == "XLA Ops" else None)
        if name and str(stats.get("hlo_module", module)).startswith(module):
            events.append((event.start_ns, -event.duration_ns, str(name)))
    times: list[tuple[str, float]] = []
    open_until: list[tuple[float, int]] = []  # the end and place of each operation around the current one
    for start, negative, name in sorted(events):
        while open_until and open_until[-1][0] <= start:
            open_until.pop()
        if open_until:
            outer, own = times[open_until[-1][1]]
            times[open_until[-1][1]] = outer, own + negative
        open_until.append((start - negative, len(times)))
        times.append((name, -negative))
    return times
