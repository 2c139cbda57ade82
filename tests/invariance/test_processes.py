"""One run, whatever the number of processes, and whichever of them is stopped or dies."""

import signal

import pytest

from gptjax.platform import launched_with_others
from tests.invariance.checks import ADAMW
from tests.invariance.processes import distance, started
from tests.runs import finish, last_step, wait_for_step, whole_checkpoints, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    write_corpus(path)
    return path


def test_stopped_on_two_killed_on_two_finished_on_one_is_the_run_of_one(folder):
    alone, workdir = folder / "alone", folder / "many"
    with started(folder, alone, 1) as processes:
        assert finish(processes)[0][0] == 0
    with started(folder, workdir, 2) as processes:
        wait_for_step(workdir, 6, processes)
        processes[1].send_signal(signal.SIGTERM)
        ended = finish(processes, 60)
    assert [code for code, _ in ended] == [143, 143], ended
    stopped = last_step(workdir)
    assert int(whole_checkpoints(workdir)[-1].name) == stopped < 48
    with started(folder, workdir, 2) as processes:
        wait_for_step(workdir, stopped + 6, processes)
        processes[1].kill()
        (code, error), _ = finish(processes, 120)
    assert code == 1 and "error: lost another process of this run" in error and "Traceback" not in error, error
    assert int(whole_checkpoints(workdir)[-1].name) > stopped
    with started(folder, workdir, 1, devices=2) as processes:
        code, error = finish(processes)[0]
    assert code == 0, error
    assert distance(alone, workdir) <= ADAMW


def test_processes_that_disagree_are_refused_by_the_name_of_the_field(folder):
    workdir = folder / "disagree"
    with started(folder, workdir, 2, extra=[[], ["--config.optimizer.beta2=0.5"]]) as processes:
        ended = finish(processes, 120)
    for code, error in ended:
        assert code == 2 and "config.optimizer.beta2 is 0.99 in process 0, 0.5 in process 1" in error, ended
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_processes", "2"], "--num_processes and --process_id need --coordinator HOST:PORT"),
        (["--coordinator", "here"], "--coordinator 'here' must be HOST:PORT, or auto"),
        (["--coordinator", "a:1"], "--coordinator a:1 needs --num_processes and --process_id"),
        (["--coordinator", "a:1", "--num_processes", "2", "--process_id", "2"], "--process_id 2 must be at least 0"),
    ],
)
def test_bad_flags_are_one_line(folder, flags, words):
    with started(folder, folder / "flags", 1, extra=[flags]) as processes:
        code, error = finish(processes)[0]
    assert code == 2 and words in error and len(error.splitlines()) == 1, error


def test_launchers_are_recognised():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert launched_with_others(slurm | {"SLURM_NTASKS": "2"})
    assert not launched_with_others(slurm | {"SLURM_NTASKS": "1"})
    assert not launched_with_others({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})  # in an allocation, not in a step
    assert launched_with_others({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"})
    assert launched_with_others({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"})
    assert not launched_with_others({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert not launched_with_others({})
