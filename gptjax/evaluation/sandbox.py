"""Runs generated Python where it can do no harm: Linux namespaces, an unprivileged user, no network, and limits.

This file also is the program that makes the sandbox, started afresh so that no thread of ours is in it; it imports the
standard library alone. A process in new namespaces becomes the first of a new process tree, with a root that holds the
interpreter read-only, an empty /tmp, /dev/null, /dev/zero, /dev/urandom and a /proc of its own. Its child drops to an
unprivileged user without capabilities, in a user namespace in which no other can be made, and becomes the program. When
the program ends or its time is up the first process ends, and with it the kernel ends all that are left.
"""

import ctypes
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      wall_seconds: then everything is killed.
      cpu_seconds: of each process.
      memory_bytes: of address space of each process, and of files in /tmp.
      processes: at once, threads among them.
      file_bytes: of each file, and of the output, stdout and stderr together.
      files: open in a process.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 512 << 20
    processes: int = 8
    file_bytes: int = 4 << 20
    files: int = 32


class Ran(NamedTuple):
    """How a program ended.

    Attributes:
      status: its exit code, minus the signal that killed it, or None if it ran out of time.
      output: stdout and stderr, as much as was allowed.
    """

    status: int | None
    output: str


def run(program: str, limits: Limits = Limits()) -> Ran:  # noqa: B008 - immutable
    """Runs a Python program in a sandbox of its own; never outside one.

    Args:
      program: its source; it is given no input, arguments or environment.
      limits: what it may use.

    Raises:
      ValueError: this host cannot isolate a program; says why.
    """
    if sys.platform != "linux":
        raise ValueError(f"generated code is not run: the sandbox needs Linux, and this is {sys.platform}")
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
        source.write(program.encode(errors="surrogatepass"))
        source.seek(0)
        report, reports = os.pipe()
        arguments = [sys.executable, "-I", "-S", __file__, json.dumps([*limits, reports, os.getpid()])]
        try:
            process = subprocess.Popen(
                arguments,
                stdin=source,
                stdout=output,
                stderr=output,
                pass_fds=[reports],
                start_new_session=True,
                env={},
            )
        finally:
            os.close(reports)
        with os.fdopen(report) as lines:
            try:
                process.wait(limits.wall_seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            said = lines.readline().strip()  # the first to fail says why; whoever could write is dead
        output.seek(0)
        printed = output.read(limits.file_bytes).decode(errors="replace")
    if said.startswith("error: ") or (not said and process.returncode >= 0):
        reason = said.removeprefix("error: ") or " ".join(printed.split())[-200:]
        raise ValueError(f"generated code is not run: this host cannot isolate it: {reason}")
    return Ran(int(said) if said else None, printed)


# The rest runs in the sandbox's own processes. Constants from <sys/mount.h>, <linux/mount.h> and <linux/prctl.h>.
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_MS_REMOUNT_READ_ONLY = 32 | 1
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY_NOSUID = 442, 0x8000, 1 | 2
_PDEATHSIG, _SET_DUMPABLE, _NO_NEW_PRIVS, _MNT_DETACH = 1, 4, 38, 2
_NOBODY = 65534


def _call(name: str, *arguments: Any) -> None:
    """Calls a function of the C library."""
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [os.fsencode(a) if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*encoded) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def _main() -> None:
    """Makes the sandbox, and reports how the program ended, or why there is no sandbox."""
    *values, reports, parent = json.loads(sys.argv[1])
    limits = Limits(*values)
    os.set_inheritable(reports, False)  # not the program's
    interpreter = os.path.realpath(sys.executable)
    try:
        _die_with(parent)
        is_root = os.geteuid() == 0
        if not is_root:  # in a user namespace of its own anyone may mount
            ids = os.geteuid(), os.getegid()
            os.unshare(os.CLONE_NEWUSER)
            _map_ids((0, 0), ids)
        os.unshare(os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS)
        parent, first = os.getpid(), os.fork()
        if not first:
            _die_with(0)
            _make_root(sys.stdin.buffer.read(), limits)
            program = os.fork()
            if not program:
                _become_unprivileged(is_root)
                _limit(limits)
                os.execv(interpreter, [interpreter, "-I", "-B", "/program.py"])
            # The first process of a tree gets no signals from within, so the program cannot end it.
            os.write(reports, f"{os.waitstatus_to_exitcode(_wait_for(program))}\n".encode())
        else:
            os.waitpid(first, 0)
    except BaseException as error:
        os.write(reports, f"error: {' '.join(str(error).split()) or type(error).__name__}\n".encode())
    finally:
        os._exit(0)


def _wait_for(child: int) -> int:
    """The status of `child`; whatever else its end left to us is reaped."""
    while True:
        ended, status = os.wait()
        if ended == child:
            return status


def _die_with(parent: int) -> None:
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise RuntimeError("the process that wanted the program ended")


def _map_ids(inside: tuple[int, int], outside: tuple[int, int]) -> None:
    pathlib.Path("/proc/self/setgroups").write_text("deny")
    for name, one, other in zip(("uid_map", "gid_map"), inside, outside, strict=True):
        pathlib.Path(f"/proc/self/{name}").write_text(f"{one} {other} 1")


def _make_root(program: bytes, limits: Limits) -> None:
    """Makes a root file system of what Python needs, and makes it the only one."""
    _call("mount", None, "/", None, _MS_REC | _MS_PRIVATE, None)
    root = "/tmp"  # of this mount namespace alone; a folder there is on any system
    interpreter = os.path.realpath(sys.base_prefix)
    folders = ["/usr", "/bin", "/lib", "/lib64", interpreter]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom"]
    # Sources are opened before the root hides those that lie below it.
    sources = {path: os.open(path, os.O_PATH) for path in folders + devices if os.path.exists(path)}
    links = {path: os.readlink(path) for path in folders if os.path.islink(path)}
    _call("mount", "sandbox", root, "tmpfs", _MS_NOSUID, "mode=755,size=1m")
    for path, source in sources.items():
        target = root + path
        if path in links:
            os.symlink(links[path], target)
            continue
        if path == interpreter and any(path.startswith(f"{other}/") for other in folders if other not in links):
            continue
        os.makedirs(os.path.dirname(target) if path in devices else target, exist_ok=True)
        if path in devices:
            pathlib.Path(target).touch()
        _call("mount", f"/proc/self/fd/{source}", target, None, _MS_BIND | _MS_REC, None)
        # mount_setattr reaches the mounts below, too; struct mount_attr is four numbers of 64 bits
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID)
        _call("syscall", _MOUNT_SETATTR, -1, target, _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    for name in ("tmp", "proc"):
        os.mkdir(f"{root}/{name}")
    pathlib.Path(root, "program.py").write_bytes(program)
    _call("mount", "proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    size = f"mode=1777,size={limits.memory_bytes},nr_inodes=1024"
    _call("mount", "tmp", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    for source in sources.values():
        os.close(source)
    os.chdir(root)
    _call("pivot_root", ".", ".")  # the old root is now on top of the new one
    _call("umount2", ".", _MNT_DETACH)
    _call("mount", None, "/", None, _MS_REMOUNT_READ_ONLY | _MS_NOSUID, None)
    os.chdir("/tmp")


def _become_unprivileged(is_root: bool) -> None:
    """Becomes nobody, in a user namespace that has no other user, and in which none can be made."""
    os.setsid()
    if is_root:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is still root's
    os.unshare(os.CLONE_NEWUSER)
    _map_ids((_NOBODY, _NOBODY), (_NOBODY, _NOBODY) if is_root else (0, 0))
    pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0")
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)  # and, not being root, it loses all capabilities when it starts


def _limit(limits: Limits) -> None:
    for name, most in (
        ("CPU", limits.cpu_seconds),
        ("AS", limits.memory_bytes),
        ("NPROC", limits.processes),
        ("FSIZE", limits.file_bytes),
        ("NOFILE", limits.files),
        ("CORE", 0),
        ("MSGQUEUE", 0),
        ("MEMLOCK", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)


if __name__ == "__main__":
    _main()
