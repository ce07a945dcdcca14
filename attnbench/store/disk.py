"""Files that are there whole or not at all, locks between processes, and what a bad disk says.

Every write of the store goes through here, so that a test can fail any single step.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnbench.errors import AttnBenchError, InfrastructureError, ResultsFolderError

#: What a system says when there is no room.
DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_GO_ON = "go on with --resume last"


def write_error(path: Path, error: OSError, then: str = _GO_ON) -> AttnBenchError:
    """What to raise for `error` met while writing `path`; `then`: what to do with a free disk."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return InfrastructureError(
            f"{path}: cannot be written: {reason}; free some space there, then {then}"
        )
    return ResultsFolderError(
        f"{path}: cannot be written: {reason}; name a folder you can write with --results"
    )


@contextmanager
def writing(path: Path, then: str = _GO_ON) -> Iterator[None]:
    """Turn an OSError of the block into InfrastructureError (disk full) or ResultsFolderError."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, then) from error


def make_folder(path: Path) -> None:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path` in one step, on disk when this returns."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_file(path.parent)


def remove_file(path: Path) -> None:
    path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, exclusive: bool) -> Iterator[None]:
    """Hold the lock file `path` (flock). Readers share it; sealing and compacting exclude them.

    A reader of a folder it cannot write goes on without: nobody else there writes either.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if not exclusive and error.errno in _READ_ONLY:
            yield
            return
        raise write_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, exclusive: bool) -> bool:
    """Take the flock of an open file if nobody holds it; False if somebody does."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
