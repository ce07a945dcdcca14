"""One sweep at a time on a GPU: two would mistime each other, and neither would know."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnbench.errors import InfrastructureError


@contextmanager
def device_lock(uuid: str) -> Iterator[None]:
    """Hold the device `uuid` against every other attnbench on this machine. "": nothing to hold.

    Raises:
        InfrastructureError: another process holds it, or the lock's file cannot be opened.
    """
    if not uuid:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"attnbench-{uuid}.lock"
    try:
        descriptor = _open(path)
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be opened: {error.strerror}; delete it, or set TMPDIR to a "
            "folder that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InfrastructureError(
                f"another attnbench is measuring on {uuid}, and two at once would mistime each "
                "other; wait for it, or choose another device with CUDA_VISIBLE_DEVICES"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    # Without O_CREAT first: in a sticky folder Linux refuses it for a file of another user.
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
