"""The short form of `python -m benchmarks.faults`: most faults once."""

import random

import pytest

from benchmarks import faults

# Pauses take a minute, a hang three; tests/test_train.py and, of two processes, tests/invariance have the others.
LONG = (
    "SIGSTOP for a minute",
    "SIGTERM",
    "flipped bit in a checkpoint",
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
