"""Break training runs on purpose and see what is lost: python -m benchmarks.faults --minutes 10

Each fault hits a small run of one process, or of two. Then either the run continues, and its losses and final arrays equal
those of a run left alone bit for bit, or it ends with one clear line, its checkpoints whole, and continues so once the
fault is gone. Full disks and read-only folders are mounts of a private namespace (`unshare`); without one they are skipped.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments import cli
from gptjax.distributed.processes import DEAD_AFTER_SECONDS
from gptjax.platform import cache_dir
from tests import runs


class Outcome(NamedTuple):
    """What a fault did: steps done but to be done again, and seconds from the next start to its first step."""

    steps_lost: int
    seconds: float


class Victim:
    """Runs of so many processes that faults hit, one after another."""

    def __init__(self, folder: pathlib.Path, rng: random.Random, count: int = 1):
        self.folder, self.rng, self.count = folder, rng, count
        self.corpus = runs.write_corpus(folder)
        compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))
        self.variables = {"GPTJAX_CACHE": str(folder / "cache"), "JAX_COMPILATION_CACHE_DIR": compiled}
        self.alone = self.workdir = folder / "alone"
        ended = runs.finish(self.start())
        assert [code for code, _ in ended] == [0] * count, ended
        self.begun = self.workdir = folder / "begun"
        self.stop(self.start(), 30)

    def command(self, workdir: pathlib.Path) -> list[str]:
        """What starts or continues the run."""
        return runs.train_command(workdir, self.corpus)

    def hit(self, fault: Callable[["Victim"], Outcome]) -> Outcome:
        """Breaks a copy of a run that has begun, continues it to its end, and compares it."""
        self.workdir = pathlib.Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        shutil.copytree(self.begun, self.workdir)
        return fault(self)

    def start(self) -> list[subprocess.Popen[str]]:
        """Starts or continues the run."""
        return runs.start(self.command(self.workdir), self.count, **self.variables)

    def stop(self, processes: list[subprocess.Popen[str]], step: int) -> None:
        """SIGTERM to one of the processes once the run has logged `step`: all exit with 143, the last step saved."""
        runs.wait_for_step(self.workdir, step, processes)
        self.rng.choice(processes).send_signal(signal.SIGTERM)
        ended = runs.finish(processes)
        assert [code for code, _ in ended] == [143] * self.count, ended
        assert int(runs.whole_checkpoints(self.workdir)[-1].name) == self.step(), "the last step is not saved"

    def step(self) -> int:
        """The last step logged."""
        return runs.last_step(self.workdir)

    def recover(self, before: int, said: str = "") -> Outcome:
        """Continues the run, which had logged `before`, to its end, with `said` among its warnings, and compares it."""
        started = time.monotonic()
        processes = self.start()
        stamp = time.time()
        metrics = self.workdir / "metrics.jsonl"
        while processes[0].poll() is None and not metrics.stat().st_mtime > stamp:
            time.sleep(0.005)
        seconds = time.monotonic() - started
        ended = runs.finish(processes)
        assert [code for code, _ in ended] == [0] * self.count and said in ended[0][1], ended
        resumed = re.search(r"resuming from step (\d+)", ended[0][1])
        runs.assert_same_run(self.alone, self.workdir)
        return Outcome(max(0, before - int(resumed[1]) if resumed else before), seconds)


def kill(victim: Victim) -> Outcome:
    """SIGKILL of one process at a random moment, every other time inside a save; the others end by themselves."""
    processes = victim.start()
    return _killed(victim, processes, [victim.rng.choice(processes)])


def kill_all(victim: Victim) -> Outcome:
    """SIGKILL of all processes."""
    processes = victim.start()
    return _killed(victim, processes, processes)


def _killed(victim: Victim, processes: list[subprocess.Popen[str]], whom: list[subprocess.Popen[str]]) -> Outcome:
    wait, in_save = victim.rng.uniform(0, 0.5), victim.rng.random() < 0.5
    where = runs.kill_when(processes, whom, victim.workdir, wait, in_save=in_save)
    left = [process for process in processes if process not in whom]
    _others_end(runs.finish([*whom, *left], _END_SECONDS)[len(whom) :], finished=where == "finished")
    return victim.recover(victim.step())


def _others_end(ended: list[tuple[int, str]], *, finished: bool = False) -> None:
    """Those that were left ended with our line, or where the coordinator is gone by JAX's own hand."""
    for code, errors in ended:
        if not finished:
            assert code in (1, -signal.SIGABRT), f"exit code {code}: {errors[-500:]}"
            assert "Traceback" not in errors, errors[-1500:]
            assert code != 1 or "error: lost another process of this run" in errors, errors[-500:]


def terminate(victim: Victim) -> Outcome:
    """SIGTERM to one process: the state is saved, and the exit code of all is 143."""
    victim.stop(victim.start(), victim.step() + victim.rng.randint(1, 20))
    return victim.recover(victim.step())


def pause(victim: Victim, seconds: float = 60) -> Outcome:
    """SIGSTOP of one process for a minute, then SIGCONT; ended by SIGTERM, as the run would go on by itself."""
    processes = victim.start()
    runs.wait_for_step(victim.workdir, victim.step() + 1, processes)
    process = victim.rng.choice(processes)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    victim.stop(processes, victim.step() + 2)
    return victim.recover(victim.step())


def hang(victim: Victim) -> Outcome:
    """SIGSTOP of one process for good: the others end by themselves."""
    processes = victim.start()
    runs.wait_for_step(victim.workdir, victim.step() + 1, processes)
    process = victim.rng.choice(processes)
    process.send_signal(signal.SIGSTOP)
    try:
        _others_end(runs.finish([other for other in processes if other is not process], _END_SECONDS))
    finally:
        process.kill()
        process.communicate()
    return victim.recover(victim.step())


_END_SECONDS = DEAD_AFTER_SECONDS + 60  # in which a process ends that has lost another


def truncate(victim: Victim) -> Outcome:
    """The largest file of the latest checkpoint loses its second half."""
    latest = runs.whole_checkpoints(victim.workdir)[-1]
    file = max(latest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(file, file.stat().st_size // 2)
    return victim.recover(victim.step(), f"checkpoint {latest.name} is passed over")


def flip(victim: Victim) -> Outcome:
    """One bit of the latest checkpoint is turned over."""
    latest = runs.whole_checkpoints(victim.workdir)[-1]
    files = [path for path in latest.rglob("*") if path.is_file() and path.stat().st_size]
    file = victim.rng.choice([path for path in files if path.name != "manifest.json"])
    content = bytearray(file.read_bytes())
    content[victim.rng.randrange(len(content))] ^= 1 << victim.rng.randrange(8)
    file.write_bytes(content)
    return victim.recover(victim.step(), f"checkpoint {latest.name} is passed over")


def delete_rows(victim: Victim) -> Outcome:
    """The prepared training rows are gone: one line says what to do, and after that the run continues."""
    (rows,) = (victim.folder / "cache").rglob("train.array_record")
    rows.unlink()
    one_line(runs.run(victim.command(victim.workdir), **victim.variables))
    shutil.rmtree(rows.parent)
    return victim.recover(victim.step())


def fill_disk(victim: Victim) -> Outcome:
    """The workdir lies on a disk with room for less than one more checkpoint."""
    used = sum(path.stat().st_size for path in victim.workdir.rglob("*") if path.is_file())
    return _mounted(victim, f"mount -t tmpfs -o size={used + 300_000} none {{mount}} && cp -a {{workdir}}/. {{mount}}")


def read_only(victim: Victim) -> Outcome:
    """The workdir is on a read-only mount, which stops root too."""
    return _mounted(victim, "mount --bind {workdir} {mount} && mount -o remount,bind,ro {mount}")


def _mounted(victim: Victim, mount: str) -> Outcome:
    """Continues the run with its workdir under a mount; it must end with one line, its checkpoints still whole."""
    at = victim.folder / "mount"
    at.mkdir(exist_ok=True)
    before, whole = victim.step(), [path.name for path in runs.whole_checkpoints(victim.workdir)]
    script = (
        mount.format(mount=at, workdir=victim.workdir)
        + f' && "$@"; code=$?; ls {at}/checkpoints/*/manifest.json; exit $code'
    )
    command = [*_NAMESPACE, "sh", "-c", script, "sh", *victim.command(at)]
    result = runs.run(command, **victim.variables)
    one_line(result)
    assert any(f"/checkpoints/{name}/" in result.stdout for name in whole), "no whole checkpoint is left"
    return victim.recover(before)


_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    """Whether this machine lets us mount in a namespace of our own."""
    try:
        return (
            subprocess.run([*_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
        )
    except FileNotFoundError:
        return False


def one_line(result: subprocess.CompletedProcess[str]) -> None:
    """The run ended with an error of one line and no traceback."""
    assert result.returncode in (1, 2), f"exit code {result.returncode}: {result.stderr[-500:]}"
    assert "Traceback" not in result.stderr, result.stderr[-1500:]
    assert len(re.findall("^error: ", result.stderr, re.M)) == 1, result.stderr[-500:]


# name: (processes of the run, what hits it)
FAULTS: dict[str, tuple[int, Callable[[Victim], Outcome]]] = {
    "SIGKILL": (1, kill),
    "SIGTERM": (1, terminate),
    "SIGSTOP for a minute": (1, pause),
    "truncated checkpoint file": (1, truncate),
    "flipped bit in a checkpoint": (1, flip),
    "deleted data shard": (1, delete_rows),
    "full disk": (1, fill_disk),
    "read-only folder": (1, read_only),
    "SIGKILL of one of two": (2, kill),
    "SIGKILL of both": (2, kill_all),
    "SIGTERM to one of two": (2, terminate),
    "one of two stops for a minute": (2, pause),
    "one of two hangs": (2, hang),
}


def main(argv: Sequence[str]) -> int:
    """Tries faults in turn until the time is over, each at least once."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes: dict[str, list[Outcome | str]] = {name: [] for name in FAULTS}
    skipped = {} if can_mount() else dict.fromkeys(("full disk", "read-only folder"), "no namespace to mount in")
    if arguments.minutes < 10:
        skipped["one of two hangs"] = "from --minutes 10 on"
    names = [name for name in FAULTS if name not in skipped]
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        victims: dict[int, Victim] = {}
        while time.monotonic() < deadline or not all(outcomes[name] for name in names):
            for name in names:
                if time.monotonic() > deadline and outcomes[name]:
                    continue
                count, fault = FAULTS[name]
                try:
                    if count not in victims:
                        victims[count] = Victim(pathlib.Path(tempfile.mkdtemp(dir=folder)), rng, count)
                    outcomes[name].append(victims[count].hit(fault))
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    outcomes[name].append(str(error).strip() or "failed")
                    victims.pop(count, None)  # nothing of it is left
    print(f"{'fault':<29} {'tried':>5} {'survived':>8} {'steps lost':>10} {'seconds to recover':>18}")
    metrics: dict[str, float] = {}
    survived_all = True
    for name, found in outcomes.items():
        survived = [outcome for outcome in found if isinstance(outcome, Outcome)]
        survived_all &= len(survived) == len(found)
        lost = max((outcome.steps_lost for outcome in survived), default=0)
        seconds = max((outcome.seconds for outcome in survived), default=0.0)
        shown = skipped.get(name, f"{lost:>10} {seconds:>18.1f}")
        print(f"{name:<29} {len(found):>5} {len(survived):>8} {shown}")
        for outcome in found:
            if isinstance(outcome, str):
                print(f"  {outcome[-300:]}")
        metrics |= {f"{name}/tried": float(len(found)), f"{name}/survived": float(len(survived))}
    if arguments.json:
        from gptjax.workdir import environment

        cli.write_report(arguments.json, environment(), [arguments.seed], metrics)
    return 0 if survived_all else 1


if __name__ == "__main__":
    cli.run(main)
