"""The journal of a run: one checksummed line per row, on disk before the next point starts.

    <BLAKE2b of the JSON, 16 hex digits> {"header": {...}}
    <BLAKE2b of the JSON, 16 hex digits> {"row": {...}}

The writer holds the file's flock for as long as it lives, so a journal that can be locked belongs
to a run that ended. A last line without its newline is what a kill left of the row in flight: it is
dropped. Any other line that does not match its checksum is corrupt, and reported by its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import CorruptDataError, ResultsFolderError
from attnbench.store import disk
from attnbench.store.header import RunHeader
from attnbench.store.record import Measurement
from attnbench.store.schema import check_version, row_from_json, row_to_json

_CHECKSUM_SIZE = 16
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One line of a journal. Text no UTF-8 can hold (a lone surrogate) is kept as an escape."""
    payload = json.dumps(value, separators=(",", ":")).encode()
    return _checksum(payload) + b" " + payload + b"\n"


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_CHECKSUM_SIZE // 2).hexdigest().encode()


def _decode_line(line: bytes) -> dict[str, Any] | None:
    """The value of a line without its newline; None if it is corrupt."""
    payload = line[_CHECKSUM_SIZE + 1 :]
    if line[: _CHECKSUM_SIZE + 1] != _checksum(payload) + b" ":
        return None
    value: dict[str, Any] = json.loads(payload)
    return value


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What a journal holds. `header` is None if its line is torn or corrupt."""

    path: Path
    header: RunHeader | None
    rows: tuple[Measurement, ...]
    corrupt_lines: tuple[int, ...]  # numbers, from 1
    is_torn: bool  # the last line was in flight when its process was killed

    @property
    def is_blank(self) -> bool:
        """Whether its process was killed before the header was written."""
        return self.header is None and not self.rows and not self.corrupt_lines

    def corrupt_text(self) -> str:
        """What is wrong with it, for a message."""
        numbers = ", ".join(str(number) for number in self.corrupt_lines)
        return f"line {numbers} differs from its checksum"

    def refuse_corrupt(self) -> None:
        """Raises CorruptDataError if any line is corrupt."""
        if self.corrupt_lines:
            raise CorruptDataError(
                f"{self.path}: corrupt: {self.corrupt_text()}; type `attnbench results compact`, "
                "which keeps its good rows and sets the file aside"
            )


def read_journal(path: Path) -> JournalContents:
    """Read a journal. Raises SchemaError for a newer version, ResultsFolderError if unreadable."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultsFolderError(
            f"{path}: cannot be read: {error.strerror}; make it readable, "
            "or name another folder with --results"
        ) from error
    *lines, torn = data.split(b"\n")
    # A whole line may lack its newline, or have it damaged: that row is not lost.
    for line in (torn, torn[:-1]):
        if _decode_line(line) is not None:
            lines.append(line)
            torn = b""
    header: RunHeader | None = None
    rows: list[Measurement] = []
    corrupt: list[int] = []
    for number, line in enumerate(lines, start=1):
        value = _decode_line(line)
        if value is None:
            corrupt.append(number)
        elif "header" in value:
            check_version(value["header"]["schema_version"], path)
            header = RunHeader.from_json(value["header"])
        else:
            rows.append(row_from_json(value["row"]))
    return JournalContents(path, header, tuple(rows), tuple(corrupt), bool(torn))


class Journal:
    """A journal open for appending, locked against every other process."""

    def __init__(self, path: Path, header: RunHeader) -> None:
        """Create `path`. Raises ResultsFolderError, or InfrastructureError for a full disk."""
        self.path = path
        # Nothing of this run is stored yet: --resume last would go on with the one before.
        then = "give the command again"
        with disk.writing(path, then):
            self._descriptor = os.open(path, _CREATE, 0o666)
            _open_journals.add(self)
            if not disk.try_lock(self._descriptor, exclusive=True):
                raise BlockingIOError(None, "another process has locked it")
        self._size = 0
        try:
            with disk.writing(path, then):
                self._write_line({"header": header.to_json()})
                disk.sync_file(path.parent)
        except Exception:
            disk.remove_file(path)
            self.close()
            raise

    def append(self, row: Measurement) -> None:
        """Write one row; it is on disk when this returns."""
        with disk.writing(self.path):
            self._write_line({"row": row_to_json(row)})

    def _write_line(self, value: Mapping[str, Any]) -> None:
        line = encode_line(value)
        try:
            disk.write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError:
            # Half a line in the middle would read as corruption once later lines follow.
            os.ftruncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            raise
        self._size += len(line)

    @property
    def is_in_place(self) -> bool:
        """Whether what is written can be found: its folder may have been removed meanwhile."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def put_back(self) -> None:
        """Write all there is under the journal's name again, and go on there.

        The caller holds the folder's lock exclusively. Raises as the constructor does.
        """
        lines = os.pread(self._descriptor, self._size, 0)
        with disk.writing(self.path):
            descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
            try:
                if not disk.try_lock(descriptor, exclusive=True):
                    raise BlockingIOError(None, "another process has locked it")
                disk.write_all(descriptor, lines)
                os.fsync(descriptor)
                disk.sync_file(self.path.parent)
            except BaseException:
                disk.remove_file(self.path)
                os.close(descriptor)
                raise
        os.close(self._descriptor)
        self._descriptor = descriptor

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def close(self) -> None:
        """Release the lock. Closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_live(path: Path) -> bool:
    """Whether a process is writing the journal. False as well if the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not disk.try_lock(descriptor, exclusive=False)
    finally:
        os.close(descriptor)


def _close_in_child() -> None:
    for journal in list(_open_journals):
        journal.close()


# A forked worker that outlives a killed parent would otherwise keep the parent's lock.
os.register_at_fork(after_in_child=_close_in_child)
