"""Many processes that are one run: starting them together, agreeing, and noticing that one is gone.

Every process runs the same program on its own devices; arrays span all of them. What only one may do, writing files above
all, the first process does. All of them must see the workdir.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.distributed.sharding import BATCH

# A process not heard of for so long is dead. A heartbeat may be half as old when a process stops, so a minute's pause is
# not. The others then end: with our line where a collective fails first, or at once by JAX's own hand ("another task
# died"), which is how they end when the first process, the coordinator, is gone.
DEAD_AFTER_SECONDS = 150
_WAIT_SECONDS = 3600  # for a message of a process that is alive
_LEAVE_SECONDS = 30  # for slow ones to leave too
_numbers = itertools.count()  # of messages; the same in all processes, as they make the same calls


class ProcessLost(Exception):
    """Another process of the run failed, ended or cannot be reached."""


def is_loss(error: BaseException) -> bool:
    """Whether an error of a computation comes from a process that is gone, not from this one."""
    return isinstance(error, ProcessLost) or any(
        word in str(error) for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination", "ABORTED")
    )


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run; before JAX has touched a device.

    Args:
      coordinator: HOST:PORT of the first process, or None for JAX to find out from the launcher: SLURM, Open MPI, a TPU
        slice, Kubernetes.
      num_processes, process_id: with HOST:PORT, how many there are, and which this is, from 0.

    Raises:
      ValueError: arguments that do not fit together.
      ProcessLost: the others did not come.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator {coordinator!r} must be HOST:PORT, or auto")
        if num_processes is None or process_id is None:
            raise ValueError(f"--coordinator {coordinator} needs --num_processes and --process_id")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id {process_id} must be at least 0 and below --num_processes {num_processes}")
    elif num_processes is not None or process_id is not None:
        raise ValueError("--num_processes and --process_id need --coordinator HOST:PORT")
    # Its SIGTERM handler would swallow the signal wherever the training loop does not listen for it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=DEAD_AFTER_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(f"cannot join the other processes: {_first_line(error)}") from error


def leave(code: int, *, lost: bool = False) -> None:
    """Before an exit with an error: returns if all processes leave, and otherwise ends this one, there and then.

    At a regular exit JAX would wait for the others, which may be waiting for this one, for minutes.
    """
    if not lost:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().wait_at_barrier("gptjax/leave", _LEAVE_SECONDS * 1000)
            return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that writes; so is the only one."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process and returns its result, anything JSON can hold, in all of them.

    Raises:
      ValueError: what `function` raised, in all processes.
      ProcessLost: it raised something else, or the first process is gone.
    """
    if jax.process_count() == 1:
        return function()
    key = f"gptjax/{next(_numbers)}"
    if is_first():
        try:
            reply = {"result": function()}
        except ValueError as error:
            reply = {"refused": str(error)}
        except Exception as error:
            _send(key, {"failed": f"{type(error).__name__}: {error}"})
            raise
        _send(key, reply)
    reply = _receive(key)
    if "failed" in reply:
        raise ProcessLost(f"the first process failed: {reply['failed']}")
    if "refused" in reply:
        raise ValueError(reply["refused"])
    return reply["result"]


def check_equal(fields: Mapping[str, Any]) -> None:
    """Makes sure that all processes were given the same.

    Raises:
      ValueError: in all processes; names the first fields that differ, and in which process.
    """
    if jax.process_count() == 1:
        return
    key = f"gptjax/fields/{next(_numbers)}"
    _send(f"{key}/{jax.process_index()}", dict(fields))

    def compare() -> None:
        ours = _receive(f"{key}/0")
        for process in range(1, jax.process_count()):
            theirs = _receive(f"{key}/{process}")
            differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
            if differing:
                where = f"in process 0, {{!r}} in process {process}"
                shown = "; ".join(f"{n} is {ours.get(n)!r} {where.format(theirs.get(n))}" for n in differing)
                raise ValueError(f"the processes disagree: {shown}")

    from_first(compare)


def make_vote(mesh: Mesh) -> Callable[[bool, jax.Array], bool]:
    """Builds `vote(wish, after) -> bool`: whether any process wished, the same answer in all of them.

    With several processes the answer is that to the call before, so that nobody waits: the votes travel behind the step
    that made the scalar `after`, in the same order everywhere.
    """
    if jax.process_count() == 1:
        return lambda wish, after: wish
    everywhere = NamedSharding(mesh, P(mesh.axis_names))
    count = jax.jit(lambda votes, after: jnp.sum(votes), keep_unused=True)
    before: list[jax.Array] = []

    def vote(wish: bool, after: jax.Array) -> bool:
        votes = np.full(mesh.size, wish, np.int32)
        on_devices = jax.make_array_from_callback(votes.shape, everywhere, lambda index: votes[index])
        answer = bool(before.pop()) if before else False
        before.append(count(on_devices, after))
        return answer

    return vote


def data_share(mesh: Mesh, num_rows: int) -> tuple[int, int]:
    """Which share of each global batch this process reads: (number, of how many).

    Processes whose devices hold the same rows, as where `tensor` spans processes, read the same.

    Raises:
      ValueError: shares that overlap without being the same.
    """
    held: Any = NamedSharding(mesh, P(BATCH[0])).devices_indices_map((num_rows,)).items()

    def rows(process: int) -> tuple[int, ...]:
        slices = {index[0].indices(num_rows) for device, index in held if device.process_index == process}
        return tuple(sorted({row for bounds in slices for row in range(*bounds)}))

    shares = sorted({rows(process) for process in range(jax.process_count())})
    if sum(map(len, shares)) != num_rows or len({len(share) for share in shares}) != 1:
        raise ValueError(
            f"the mesh spreads the {num_rows} rows of a batch unevenly over {jax.process_count()} processes; "
            "mesh.data x mesh.fsdp must be a multiple of them, or divide them"
        )
    return shares.index(rows(jax.process_index())), len(shares)


def to_global(batch: Mapping[str, np.ndarray], sharding: NamedSharding, num_shares: int) -> dict[str, jax.Array]:
    """This process's share of a batch [B / num_shares, ...] as a part of global arrays [B, ...] on the devices."""
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * num_shares, *x.shape[1:]))
        for name, x in batch.items()
    }


def to_host(tree: Any) -> Any:
    """Global arrays as whole arrays of every process; with a single process, as they are."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def _client() -> Any:
    from jax._src.distributed import global_state  # no public way to talk to the coordinator

    return global_state.client


def _send(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))


def _receive(key: str) -> Any:
    try:
        return json.loads(_client().blocking_key_value_get(key, _WAIT_SECONDS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessLost(_first_line(error)) from error


def _first_line(error: Any) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
