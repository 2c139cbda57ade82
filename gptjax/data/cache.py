"""A cache on disk: keys made from contents, and folders that are there whole or not at all."""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """Returns 32 hex digits that identify the sequence of `parts` by content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def file_contents(paths: Iterable[Path]) -> Iterator[bytes]:
    """Yields a digest of each file's bytes, reading it in blocks."""
    for path in paths:
        with path.open("rb") as file:
            yield hashlib.file_digest(file, "blake2b").digest()


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes sure that `folder` exists, whole, however many processes ask for it and whenever they are killed.

    One process builds and the others wait: the lock is the kernel's, so it goes when its holder ends, however it ends.

    Args:
      folder: the folder wanted; if it exists it is taken as it is.
      build: writes everything into the empty folder it is given, which is renamed to `folder` when it returns. If it
        raises, what it wrote is removed and the exception goes on.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock_path = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".lock"))
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            build(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        lock_path.unlink(missing_ok=True)
