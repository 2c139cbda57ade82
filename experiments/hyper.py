"""What a sweep file is written with: lists of runs, each a dict of config fields and their values."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

Run = dict[str, Any]


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included; evenly on a logarithmic scale if `log`, whole ones if both ends are."""

    low: float
    high: float
    log: bool = False

    def at(self, share: float) -> float:
        """The number at a share of the way."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(self.high, int(Range(float(self.low), self.high + 1.0, self.log).at(share)))
        if self.log:
            return float(np.exp(np.log(self.low) + share * (np.log(self.high) - np.log(self.low))))
        return self.low + share * (self.high - self.low)


def sweep(name: str, values: Range | Iterable[Any]) -> list[Run]:
    """A run for each value of a field, as in `sweep("config.optimizer.learning_rate", [1e-3, 3e-3])`.

    With a `Range`, one run whose value is searched.
    """
    return [{name: values}] if isinstance(values, Range) else [{name: value} for value in values]


def product(sweeps: Sequence[list[Run]]) -> list[Run]:
    """Every combination; the last sweep changes fastest."""
    return [_merge(runs) for runs in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[list[Run]]) -> list[Run]:
    """The first runs of all sweeps together, the second ones, and so on.

    Raises:
      ValueError: sweeps of different lengths.
    """
    lengths = [len(runs) for runs in sweeps]
    if len(set(lengths)) > 1:
        raise ValueError(f"zipit: the sweeps have {', '.join(map(str, lengths))} runs, which must be equal")
    return [_merge(runs) for runs in zip(*sweeps, strict=True)]


def chainit(sweeps: Sequence[list[Run]]) -> list[Run]:
    """One sweep after the other."""
    return list(itertools.chain(*sweeps))


def discrete(*values: Any) -> tuple[Any, ...]:
    """Values to choose from, for `sample`."""
    return values


def sample(num_runs: int, ranges: dict[str, Range | Sequence[Any]], seed: int = 0) -> list[Run]:
    """Random search (Bergstra & Bengio, 2012): each field drawn from its range or values, independently."""
    rng = np.random.default_rng(seed)

    def draw(values: Range | Sequence[Any]) -> Any:
        share = float(rng.random())
        return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]

    return [{name: draw(values) for name, values in ranges.items()} for _ in range(num_runs)]


def _merge(runs: Iterable[Run]) -> Run:
    merged: Run = {}
    for run in runs:
        for name in run:
            if name in merged:
                raise ValueError(f"{name} is set twice in one run")
        merged |= run
    return merged
