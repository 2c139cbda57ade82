"""The short form of `python -m benchmarks.faults`: most faults once."""

import random

import pytest

from benchmarks import faults

# Pauses take a minute, a hang three. Every run is stopped by SIGTERM before it is hit, tests/test_train.py has SIGKILL, and
# tests/invariance what befalls one of two.
LONG = (
    "SIGKILL",
    "SIGSTOP for a minute",
    "SIGTERM",
    "SIGKILL of one of two",
    "SIGKILL of both",
    "SIGTERM to one of two",
    "one of two stops for a minute",
    "one of two hangs",
)
NEEDS_MOUNT = ("full disk", "read-only folder")


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return faults.Victim(tmp_path_factory.mktemp("faults"), random.Random(0))


@pytest.mark.parametrize("name", [name for name in faults.FAULTS if name not in LONG])
def test_the_run_continues_bit_for_bit_or_says_why_not(victim, name):
    if name in NEEDS_MOUNT and not faults.can_mount():
        pytest.skip("this machine allows no mounts in a namespace of one's own")
    _, fault = faults.FAULTS[name]
    victim.hit(fault)
