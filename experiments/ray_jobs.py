"""Runs of a sweep as Ray jobs: on the cluster that RAY_ADDRESS names, or on a head started here (extra `ray`).

A job is the command that a run is anywhere, in the folder that the sweep was typed in, so all nodes must see that folder,
the sweep's and this Python. A sweep that was killed and is typed again finds its jobs, which went on without it.
"""

import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.cli import UserError

try:
    import ray
    from ray.job_submission import JobStatus, JobSubmissionClient
except ModuleNotFoundError as error:
    raise UserError("--launcher ray needs Ray: pip install 'gptjax[ray]'") from error

_SECONDS = 1.0  # between two questions about a job


class Jobs:
    """A cluster's jobs.

    Args:
      resources: that each run takes, such as CPU, GPU, TPU.
      labels: of the nodes that runs may be on.
    """

    def __init__(self, resources: Mapping[str, float], labels: Mapping[str, str]):
        address = None  # of RAY_ADDRESS
        if "RAY_ADDRESS" not in os.environ:
            address = "http://" + ray.init("local", include_dashboard=True, log_to_driver=False).dashboard_url
        try:
            self._client = JobSubmissionClient(address)
            self._known = {job.metadata["workdir"]: job for job in self._client.list_jobs() if _is_ours(job)}
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster answers: {error}") from error
        others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        self._needs: dict[str, Any] = {
            "entrypoint_num_cpus": resources.get("CPU", 1),
            "entrypoint_num_gpus": resources.get("GPU"),
            "entrypoint_resources": others or None,
            "entrypoint_label_selector": dict(labels) or None,
        }

    def start(self, command: Sequence[str], workdir: pathlib.Path) -> "Job":
        """Submits a run, or takes up its job if that has not ended."""
        running = self._known.pop(str(workdir), None)
        if running is not None:
            return Job(self._client, running.submission_id)
        workdir.mkdir(exist_ok=True)
        log = shlex.quote(str(workdir / "log.txt"))
        job_id = self._client.submit_job(
            entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)} >> {log} 2>&1",
            metadata={"workdir": str(workdir)},
            # A run that is stopped gets SIGTERM, and SIGKILL so many seconds later.
            runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}},
            **self._needs,
        )
        print(f"{workdir.name}: Ray job {job_id}", file=sys.stderr, flush=True)
        return Job(self._client, job_id)


class Job:
    """A job, as `launch.Job`."""

    def __init__(self, client: Any, job_id: str):
        self._client, self._id = client, job_id
        self._asked = 0.0
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs; one that Ray lost has crashed."""
        if time.monotonic() - self._asked > _SECONDS:
            self._asked = time.monotonic()
            info = self._client.get_job_info(self._id)
            if info.status.is_terminal():
                stopped = 143 if info.status == JobStatus.STOPPED else 1
                self._code = 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or stopped
        return self._code

    def terminate(self) -> None:
        """Tells it to save its state and stop."""
        self._client.stop_job(self._id)


def _is_ours(job: Any) -> bool:
    return "workdir" in (job.metadata or {}) and not job.status.is_terminal()
