"""The cache folder of upgrade comparisons: entries that are whole or made anew, one maker each."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnbench.errors import AttnBenchError, InfrastructureError, UsageError
from attnbench.store.disk import DISK_FULL, try_lock
from attnbench.upgrade.tell import Tell

STAMP = "ready.json"
"""Written last into an entry; an entry without it, or with another one, is half-made."""


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/attnbench/upgrade`, else `~/.cache/attnbench/upgrade`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is to be ignored.
    base = Path(named) if named and Path(named).is_absolute() else Path.home() / ".cache"
    return base / "attnbench" / "upgrade"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into one of ours.

    Raises:
        InfrastructureError: the disk is full.
        UsageError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> AttnBenchError:
    reason = f"{error.filename or path}: cannot be written: {error.strerror or error}"
    if error.errno in DISK_FULL:
        return InfrastructureError(f"{reason}; free some space there and run it again")
    return UsageError(f"{reason}; name a folder you can write with --cache-dir")


@contextmanager
def making(entry: Path, tell: Tell) -> Iterator[None]:
    """Hold the lock of the cache entry `entry`: who else wants it waits until it is made."""
    with writing(entry):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = entry.with_name(f"{entry.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(descriptor, exclusive=True):
            tell.note(f"another attnbench is making {entry}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_stamp(entry: Path) -> dict[str, Any] | None:
    """What `stamp` wrote; None for an entry that is not there or half-made."""
    try:
        found = json.loads((entry / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def stamp(entry: Path, content: dict[str, Any]) -> None:
    """Declare `entry` whole."""
    with writing(entry):
        part = entry / f"{STAMP}.part"
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(entry / STAMP)


def empty(folder: Path) -> Path:
    """`folder`, made anew."""
    with writing(folder):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    return folder
