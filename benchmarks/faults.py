"""Break training runs on purpose and see what is lost: python -m benchmarks.faults --minutes 10

Each fault hits a small run in processes of its own. Then either the run continues, and its losses and final arrays equal
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
from tests import runs


class Outcome(NamedTuple):
    """What a fault did: steps done but to be done again, and seconds from the next start to its first step."""

    steps_lost: int
    seconds: float


class Victim:
    """One run that faults hit, again and again, until it is finished."""

    def __init__(self, folder: pathlib.Path, rng: random.Random):
        self.folder, self.rng = folder, rng
        self.corpus = runs.write_corpus(folder)
        self.variables = {"GPTJAX_CACHE": str(folder / "cache")}
        self.alone = folder / "alone"
        result = runs.run(self.command(self.alone), **self.variables)
        assert result.returncode == 0, result.stderr
        self.renew()

    def command(self, workdir: pathlib.Path) -> list[str]:
        """What starts or continues the run."""
        return runs.train_command(workdir, self.corpus)

    def renew(self) -> None:
        """Begins a new run, some steps of it done."""
        self.workdir = pathlib.Path(tempfile.mkdtemp(dir=self.folder)) / "run"
        process = self.start()
        self.wait_for(process, 30)
        process.send_signal(signal.SIGTERM)
        process.communicate()

    def start(self) -> subprocess.Popen[str]:
        """Starts or continues the run."""
        return subprocess.Popen(
            self.command(self.workdir),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=runs.environment(**self.variables),
            cwd=runs.ROOT,
        )

    def step(self) -> int:
        """The last step logged."""
        path = self.workdir / "metrics.jsonl"
        steps = re.findall(r'^{"step": (\d+)', path.read_text() if path.exists() else "", re.M)
        return int(steps[-1]) if steps else 0

    def wait_for(self, process: subprocess.Popen[str], step: int) -> None:
        """Returns when the run has logged `step`."""
        while self.step() < step:
            if process.poll() is not None:
                raise AssertionError(f"ended with code {process.returncode}: {process.communicate()[1][-300:]}")
            time.sleep(0.005)

    def checkpoints(self) -> list[pathlib.Path]:
        """The whole ones, the latest last."""
        found = [path.parent for path in (self.workdir / "checkpoints").glob("*/manifest.json")]
        return sorted(found, key=lambda path: int(path.name))

    def recover(self, before: int) -> Outcome:
        """Continues the run, which had logged `before`, to its end, compares it, and begins another."""
        started = time.monotonic()
        process = self.start()
        stamp = time.time()
        metrics = self.workdir / "metrics.jsonl"
        while process.poll() is None and not metrics.stat().st_mtime > stamp:
            time.sleep(0.005)
        seconds = time.monotonic() - started
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-500:]
        resumed = re.search(r"resuming from step (\d+)", errors)
        runs.assert_same_run(self.alone, self.workdir)
        self.renew()
        return Outcome(max(0, before - int(resumed[1]) if resumed else before), seconds)


def kill(victim: Victim) -> Outcome:
    """SIGKILL at a random moment, every other time inside a save."""
    wait = victim.rng.uniform(0, 0.5)
    runs.kill_when(victim.command(victim.workdir), victim.workdir, wait, in_save=victim.rng.random() < 0.5)
    return victim.recover(victim.step())


def terminate(victim: Victim) -> Outcome:
    """SIGTERM: the state is saved, and the exit code is 143."""
    process = victim.start()
    victim.wait_for(process, victim.step() + victim.rng.randint(1, 20))
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143, process.returncode
    return victim.recover(victim.step())


def pause(victim: Victim, seconds: float = 60) -> Outcome:
    """SIGSTOP for a minute, then SIGCONT; ended by SIGTERM, as the run would go on by itself."""
    process = victim.start()
    victim.wait_for(process, victim.step() + 1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    victim.wait_for(process, victim.step() + 2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return victim.recover(victim.step())


def truncate(victim: Victim) -> Outcome:
    """The largest file of the latest checkpoint loses its second half."""
    file = max(victim.checkpoints()[-1].rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(file, file.stat().st_size // 2)
    return victim.recover(victim.step())


def flip(victim: Victim) -> Outcome:
    """One bit of the latest checkpoint is turned over."""
    files = [path for path in victim.checkpoints()[-1].rglob("*") if path.is_file() and path.stat().st_size]
    file = victim.rng.choice([path for path in files if path.name != "manifest.json"])
    content = bytearray(file.read_bytes())
    content[victim.rng.randrange(len(content))] ^= 1 << victim.rng.randrange(8)
    file.write_bytes(content)
    return victim.recover(victim.step())


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
    before, whole = victim.step(), [path.name for path in victim.checkpoints()]
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


FAULTS: dict[str, Callable[[Victim], Outcome]] = {
    "SIGKILL": kill,
    "SIGTERM": terminate,
    "SIGSTOP for a minute": pause,
    "truncated checkpoint file": truncate,
    "flipped bit in a checkpoint": flip,
    "deleted data shard": delete_rows,
    "full disk": fill_disk,
    "read-only folder": read_only,
}


def main(argv: Sequence[str]) -> int:
    """Tries faults in turn until the time is over, each at least once."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    outcomes: dict[str, list[Outcome | str]] = {name: [] for name in FAULTS}
    skipped = () if can_mount() else ("full disk", "read-only folder")
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(pathlib.Path(folder), random.Random(arguments.seed))
        while time.monotonic() < deadline or not all(outcomes[name] for name in FAULTS if name not in skipped):
            for name, fault in FAULTS.items():
                if name in skipped or (time.monotonic() > deadline and outcomes[name]):
                    continue
                try:
                    outcomes[name].append(fault(victim))
                except AssertionError as error:
                    outcomes[name].append(str(error).strip() or "failed")
                    victim = Victim(pathlib.Path(tempfile.mkdtemp(dir=folder)), victim.rng)  # nothing of it is left
    print(f"{'fault':<28} {'tried':>5} {'survived':>8} {'steps lost':>10} {'seconds to recover':>18}")
    metrics: dict[str, float] = {}
    survived_all = True
    for name, found in outcomes.items():
        survived = [outcome for outcome in found if isinstance(outcome, Outcome)]
        survived_all &= len(survived) == len(found)
        lost = max((outcome.steps_lost for outcome in survived), default=0)
        seconds = max((outcome.seconds for outcome in survived), default=0.0)
        shown = "no namespace to mount in" if name in skipped else f"{lost:>10} {seconds:>18.1f}"
        print(f"{name:<28} {len(found):>5} {len(survived):>8} {shown}")
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
