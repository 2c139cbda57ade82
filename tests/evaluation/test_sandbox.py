"""Hostile programs are survived: nothing of the host is read, changed, signalled or used up, and nothing outlives them."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from gptjax.evaluation import sandbox
from gptjax.evaluation.sandbox import Limits, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
QUICK = Limits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=128 << 20, file_bytes=1 << 20)
# A process in new namespaces that is not root, whoever started it.
AS_USER = """
import os, pathlib, sys
os.unshare(os.CLONE_NEWUSER)
for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {UID} 1"), ("gid_map", f"1000 {GID} 1")):
    pathlib.Path(f"/proc/self/{name}").write_text(text)
os.execv(sys.executable, [sys.executable, FILE])
"""

# Each prints ESCAPED if it gets what it wants. HOST is a folder of the host, PORT a port it listens on, PID ours.
HOSTILE = {
    "fork bomb": """
import os
most = 0
while True:
    try:
        os.fork()
    except OSError:
        pass
    if len([p for p in os.listdir("/proc") if p.isdigit()]) > 12: print("ESCAPED", flush=True)
""",
    "endless loop": "while True: pass",
    "endless sleep": "import time; time.sleep(1e6); print('ESCAPED')",
    "stopped": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); print('ESCAPED')",
    "ignores signals": """
import signal
for s in range(1, 65):
    try: signal.signal(s, lambda *_: None)
    except (OSError, ValueError): pass
while True: pass
""",
    "memory": "x = bytearray(1 << 30); print('ESCAPED')",
    "memory of many": """
import os
for _ in range(6): os.fork()
x = bytearray(1 << 28); print("ESCAPED")
""",
    "threads": """
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
print("ESCAPED")
""",
    "deletes": "import shutil; [shutil.rmtree(p, ignore_errors=True) for p in ('HOST', '/usr', '/')]",
    "network": """
import socket
for address in (("127.0.0.1", PORT), ("1.1.1.1", 53)):
    try: socket.create_connection(address, 1); print("ESCAPED")
    except OSError: pass
""",
    "abstract socket": "import socket; socket.socket(socket.AF_UNIX).connect('\\0gptjax-PORT'); print('ESCAPED')",
    "signals": """
import os, signal
for pid in (PID, -1, 1, -os.getpgid(0), os.getppid()):
    try:
        os.kill(pid, signal.SIGKILL)
        if pid == PID: print("ESCAPED")
    except OSError: pass
""",
    "environments": """
import glob, os
if "SECRET" in os.environ: print("ESCAPED")
for name in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
    try:
        if b"hunter2" in open(name, "rb").read(): print("ESCAPED")
    except OSError: pass
""",
    "floods": "while True: print('flood ' * 1000, flush=True)",
    "closes its output": "import os, sys; os.close(1); os.close(2); sys.stdout = None; os.closerange(0, 99)",
    "daemon": """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        sys.argv[0] = "outlives"
        while True: time.sleep(0.01)
os._exit(0)
""",
    "huge file": "open('/tmp/huge', 'wb').truncate(1 << 40); print('ESCAPED')",
    "fills the disk": """
try:
    for i in range(10000):
        with open(f"/tmp/{i}", "wb") as f: f.write(bytes(1 << 20))
except OSError: pass
import os
if os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_bsize > 1 << 28: print("ESCAPED")
""",
    "symlinks": """
import os
os.symlink("HOST/treasure", "/tmp/link")
for path in ("/tmp/link", "/proc/self/cwd/../HOST/treasure", "/proc/1/root/HOST/treasure", "../" * 20 + "HOST/treasure"):
    for mode in ("r", "r+", "w"):
        try: open(path, mode).close(); print("ESCAPED")
        except OSError: pass
""",
    "writes": """
import os
open("/tmp/oursPID", "w").write("of this sandbox alone")
for folder in ("HOST", "/usr", "/", "/etc", "/root", "/dev", "/proc/sys/kernel", os.path.dirname(os.__file__)):
    try: open(os.path.join(folder, "new"), "w").close(); print("ESCAPED", folder)
    except OSError: pass
for name in ("core_pattern", "hostname", "modprobe"):
    try: open("/proc/sys/kernel/" + name, "r+"); print("ESCAPED", name)
    except OSError: pass
""",
    "reads": """
import os
for path in ("/etc/passwd", "/etc/shadow", "/home", "/var", "/sys", "/work", "HOST", os.path.expanduser("~/.ssh")):
    if os.path.exists(path): print("ESCAPED", path)
""",
    "ptrace": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, 1, 0, 0) == 0: print("ESCAPED")
try: open("/proc/1/mem", "rb"); print("ESCAPED")
except OSError: pass
""",
    "mounts": """
import ctypes
libc = ctypes.CDLL(None)
for call in (("mount", None, b"/", None, 32, None), ("umount2", b"/tmp", 2), ("mount", b"x", b"/tmp", b"tmpfs", 0, None),
             ("pivot_root", b".", b"."), ("chroot", b"/tmp"), ("sethostname", b"x", 1),
             ("mknod", b"/tmp/sda", 0o60666, 2048)):
    if getattr(libc, call[0])(*call[1:]) == 0: print("ESCAPED", call)
""",
    "namespaces": """
import os
for name in ("USER", "NS", "NET", "PID", "USER|NS"):
    flags = sum(getattr(os, "CLONE_NEW" + n) for n in name.split("|"))
    try: os.unshare(flags); print("ESCAPED", name)
    except OSError: pass
for name in os.listdir("/proc/1/ns") if os.access("/proc/1/ns", os.R_OK) else []:
    try: os.setns(os.open("/proc/1/ns/" + name, 0)); print("ESCAPED", name)
    except OSError: pass
""",
    "becomes root": """
import os, subprocess
for call in (lambda: os.setuid(0), lambda: os.setgroups([0]), lambda: subprocess.check_call(["su", "-c", "true"]),
             lambda: subprocess.check_call(["sudo", "-n", "true"])):
    try: call(); print("ESCAPED")
    except (OSError, subprocess.CalledProcessError): pass
""",
    "raises its limits": """
import resource
for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NPROC", "RLIMIT_FSIZE"):
    try: resource.setrlimit(getattr(resource, name), (-1, -1)); print("ESCAPED")
    except (OSError, ValueError): pass
""",
    "crashes": "import ctypes; ctypes.string_at(0); print('ESCAPED')",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What a program could take or harm."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "treasure").write_text("treasure")
    os.environ["SECRET"] = "hunter2"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0gptjax-{port}")
        abstract.listen()
        yield folder, {"HOST": str(folder), "PORT": str(port), "PID": str(os.getpid())}
    del os.environ["SECRET"]


def survivors():
    """Names of processes that a program of ours has become."""
    names = []
    for file in pathlib.Path("/proc").glob("[0-9]*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:  # it just ended
            continue
    return [name for name in names if name == f"hostile{os.getpid()}"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(host, name):
    folder, names = host
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b'hostilePID')\n" + HOSTILE[name]
    for word, value in names.items():
        program = program.replace(word, value)
    started = time.monotonic()
    ran = run(program, QUICK)
    assert time.monotonic() - started < 20
    assert not [line for line in ran.output.splitlines() if line.startswith("ESCAPED")], ran.output
    assert len(ran.output) <= QUICK.file_bytes
    assert [p.name for p in folder.iterdir()] == ["treasure"] and (folder / "treasure").read_text() == "treasure"
    assert pathlib.Path(os.__file__).exists() and not pathlib.Path(f"/tmp/ours{os.getpid()}").exists()
    deadline = time.monotonic() + 10  # what is killed takes a moment to be gone
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert survivors() == []
    if name in ("endless sleep", "stopped"):
        assert ran.status is None
    if name in ("endless loop", "ignores signals", "memory", "crashes", "threads", "floods", "huge file"):
        assert ran.status != 0


@pytest.mark.parametrize("name", ["network", "abstract socket", "environments", "reads"])
def test_the_hostile_succeed_outside(host, name):
    program = HOSTILE[name]
    for word, value in host[1].items():
        program = program.replace(word, value)
    assert "ESCAPED" in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout


def test_an_ordinary_program():
    program = """
import collections, json, math, os, random, re, subprocess, tempfile, threading, unicodedata
assert os.getuid() == 65534 and os.getcwd() == "/tmp" and not os.listdir(".") and input is not None
with tempfile.NamedTemporaryFile("w+") as file: file.write("x")
threading.Thread(target=print, args=("thread",)).start()
print(subprocess.run(["/bin/sh", "-c", "echo shell"], capture_output=True, text=True).stdout, "ü")
exit(3)
"""
    ran = run(program)
    assert ran.status == 3 and sorted(ran.output.split()) == ["shell", "thread", "ü"]
    assert run("import os; os.kill(os.getpid(), 11)").status == -11
    assert run("print(input())").status == 1
    assert run("x = '\ud800'").status == 1  # no UTF-8


def test_as_root_and_as_user(tmp_path):
    """Root's way and everyone's; the other tests take only that of whoever runs them."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        f"import importlib.util as u, os; s = u.spec_from_file_location('sandbox', {sandbox.__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m); assert os.getuid() == 1000\n"
        "r = m.run('import os; print(os.getuid(), os.listdir(\"/proc/1/task\")); os.unshare(os.CLONE_NEWUSER)')\n"
        "assert r.status == 1 and r.output.startswith('65534 '), r"
    )
    program = (
        AS_USER.replace("UID", str(os.getuid())).replace("GID", str(os.getgid())).replace("FILE", repr(str(probe)))
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_many_at_once():
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(f"print({i})").output})) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {i: f"{i}\n" for i in range(6)}


def test_refuses_where_it_cannot_isolate(monkeypatch, tmp_path):
    """No namespaces here, or another system: one line, and nothing ran."""
    witness = tmp_path / "ran"
    source = pathlib.Path(sandbox.__file__).read_text()
    broken = tmp_path / "sandbox.py"
    broken.write_text(source.replace("os.CLONE_NEWNS |", "1 << 62 |"))
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "__file__", str(broken))
        with pytest.raises(ValueError, match="generated code is not run: this host cannot isolate it: ") as caught:
            run(f"open({str(witness)!r}, 'w')")
        assert "\n" not in str(caught.value) and not witness.exists()
        broken.write_text("raise SystemExit('not even Python starts')")
        with pytest.raises(ValueError, match="cannot isolate it: not even Python starts"):
            run("")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="the sandbox needs Linux, and this is darwin"):
        run("")
