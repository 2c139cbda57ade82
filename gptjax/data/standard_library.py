"""The running Python's standard library, code and documentation: real text on every machine, with no download."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not code or prose that a reader of Python would know: tests, generated tables, and what differs between machines.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
_SKIPPED_FOLDERS |= {"encodings"}  # 1.4 MB of character tables
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_SUFFIXES = (".py", ".txt", ".rst")
_TOPICS = "pydoc_data/topics.py"  # the language reference, as one dict of texts


def root() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files() -> list[str]:
    """Returns the names of the files the corpus is made of, relative to `root()`, in an order fit for any machine."""
    names = []
    for folder, subfolders, files in os.walk(root()):
        subfolders[:] = [s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith(_SKIPPED_PREFIXES)]
        relative = Path(folder).relative_to(root())
        names += [
            (relative / file).as_posix()
            for file in files
            if file.endswith(_SUFFIXES) and not file.startswith(_SKIPPED_PREFIXES)
        ]
    return sorted(names)


def documents() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of each document: a source file, or a topic of the language reference."""
    for name in source_files():
        if name == _TOPICS:
            from pydoc_data.topics import topics

            yield from ((f"{name}#{topic}", text) for topic, text in topics.items())
            continue
        try:
            text = (root() / name).read_bytes().decode()
        except UnicodeDecodeError:  # a few old files declare another encoding
            continue
        if text:
            yield name, text
