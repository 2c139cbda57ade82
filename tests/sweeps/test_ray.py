"""Sweeps as Ray jobs: on a head of their own, and on a cluster of two nodes, both on this machine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT, assert_same_run, environment, run
from tests.sweeps.test_sweep import TWO_BY_TWO, folder, sweep_command  # noqa: F401 - the fixture

pytest.importorskip("ray", reason="the extra `ray` is not installed")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def cluster(variables):
    """A head and a second node, of one core each: (address of the dashboard, address of the head)."""
    port, dashboard = free_port(), free_port()
    common = [*RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    head = [*common, "--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    processes = []
    try:
        for flags in (head, [*common, f"--address=127.0.0.1:{port}"]):
            processes.append(
                subprocess.Popen(flags, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            )
            deadline = time.monotonic() + 60
            while len(alive(f"http://127.0.0.1:{dashboard}", variables)) < len(processes):
                assert processes[-1].poll() is None and time.monotonic() < deadline
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)


def alive(address, variables):
    """The nodes of a cluster."""
    listing = [*RAY, "list", "nodes", "--address", address, "--filter", "state=ALIVE"]
    found = subprocess.run(listing, env=variables, capture_output=True, text=True)
    return re.findall(r"^\s*\d+\s+(\S+)", found.stdout, re.MULTILINE)


def test_a_sweep_on_a_head_of_its_own(folder):  # noqa: F811
    arguments = sweep_command(folder, TWO_BY_TWO, "--launcher", "ray")
    variables = {name: value for name, value in environment(RAY_AUTH_MODE="disabled").items() if name != "RAY_ADDRESS"}
    result = subprocess.run(arguments, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 4 and result.stderr.count("Ray job") == 4


def test_a_sweep_submitted_to_two_nodes(folder):  # noqa: F811
    """A job that submits jobs; they end as processes on this machine do, and the second node has its share."""
    variables = environment(RAY_AUTH_MODE="disabled", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")
    arguments = sweep_command(folder, TWO_BY_TWO, "--launcher", "ray")
    with cluster(variables) as address:
        submit = [*RAY, "job", "submit", "--address", address, "--", "env", "-C", str(ROOT), *arguments]
        result = subprocess.run(submit, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("finished  24") == 4
        jobs = [*RAY, "job", "list", "--address", address]
        listed = subprocess.run(jobs, env=variables, capture_output=True, text=True).stdout
        assert len(set(re.findall(r"driver_node_id='(\w+)'", listed))) == 2
    local = sweep_command(folder, TWO_BY_TWO.replace("3e-3", "1e-3").replace("1e-3, ", ""))
    local[local.index("--sweepdir") + 1] = str(folder / "local")
    assert run(local).returncode == 0
    assert_same_run(folder / "local" / "seed=1", folder / "runs" / "learning_rate=0.001,seed=1", least=20)


def test_no_cluster_there(folder):  # noqa: F811
    result = run(sweep_command(folder, TWO_BY_TWO, "--launcher", "ray"), RAY_ADDRESS=f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 2 and "no Ray cluster answers" in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(folder / "runs") == []
