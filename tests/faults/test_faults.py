"""The short form of `python -m benchmarks.faults`: most faults once."""

import random

import pytest

from benchmarks import faults

# The pause takes a minute; tests/test_train.py has the other two.
LONG = ("SIGSTOP for a minute", "SIGTERM", "flipped bit in a checkpoint")
NEEDS_MOUNT = ("full disk", "read-only folder")


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return faults.Victim(tmp_path_factory.mktemp("faults"), random.Random(0))


@pytest.mark.parametrize("name", [name for name in faults.FAULTS if name not in LONG])
def test_the_run_continues_bit_for_bit_or_says_why_not(victim, name):
    if name in NEEDS_MOUNT and not faults.can_mount():
        pytest.skip("this machine allows no mounts in a namespace of one's own")
    faults.FAULTS[name](victim)
