"""Of a wheel, only the Python files, the data they read, and the metadata.

A wheel of vLLM is several hundred megabytes of compiled code around a dozen of Python. So of one
on a web server only the chunks are fetched that hold what is wanted.

What came is checked by the CRC-32 that the wheel holds for each of its files, and by the SHA-256
of the index only where the whole file came: a part of a file has no known checksum.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

from attnbench.errors import CorruptDataError, DataError
from attnbench.upgrade.cache import empty, writing
from attnbench.upgrade.remote_file import CHUNK, RemoteFile
from attnbench.upgrade.tell import Tell, megabytes

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class _Reader(io.RawIOBase):
    """A RemoteFile as a file object: `zipfile` asks for what it needs."""

    def __init__(self, remote: RemoteFile) -> None:
        self.remote = remote
        self.offset = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.offset, io.SEEK_END: self.remote.size}[whence]
        self.offset = max(0, base + offset)
        return self.offset

    def readinto(self, buffer: Any) -> int:
        content = self.remote.read_at(self.offset, len(buffer))
        buffer[: len(content)] = content
        self.offset += len(content)
        return len(content)


# FlashInfer opens some of its tables while it is imported.
_READ_AT_IMPORT = (".py", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".txt", ".csv")


def is_wanted(name: str) -> bool:
    """Whether a file of a wheel is unpacked: Python, tables, and the wheel's metadata."""
    return name.endswith(_READ_AT_IMPORT) or name.partition("/")[0].endswith(".dist-info")


def unpack_local(wheel: Path, into: Path, required: str | None) -> None:
    """Unpack the wanted files of a wheel on disk into the new folder `into`.

    Raises:
        CorruptDataError: not a readable wheel.
        DataError: it does not hold the file `required`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            _require(archive, required, str(wheel))
            with writing(into):
                empty(into)
                for member in filter(is_wanted, archive.namelist()):
                    archive.extract(member, into)
    except _BROKEN as error:
        raise CorruptDataError(
            f"{wheel}: not a readable wheel ({error}); download it again"
        ) from error


def unpack_remote(
    remote: RemoteFile, into: Path, tell: Tell, *, sha256: str | None, required: str | None
) -> None:
    """Unpack the wanted files of a wheel on a server into the new folder `into`.

    `sha256` is what the index says of the whole file, `required` a file it must hold.

    Raises:
        InfrastructureError: the server failed; what came stays, and the next call goes on.
        CorruptDataError: what comes from the server is broken, twice in a row.
        DataError: the wheel does not hold the file `required`.
    """
    for again in (True, False):
        remote.find()
        if not remote.ranges:
            _fetch(remote, remote.missing(remote.chunks), "all of it: no ranges there", tell)
        if sha256 and (found := remote.sha256()) not in (None, sha256):
            error: Exception = ValueError(f"its SHA-256 is {found}, the index says {sha256}")
        else:
            try:
                _unpack(remote, into, tell, required)
                return
            except _BROKEN as broken:
                error = broken
        remote.discard()
        if not again:
            raise CorruptDataError(
                f"{remote.url}: what the server sends is not that wheel ({error}); check the "
                "index pip is set to and the proxy, or download the wheel by hand and name the file"
            )


def _unpack(remote: RemoteFile, into: Path, tell: Tell, required: str | None) -> None:
    # The reader is not buffered: a buffer would still hold a chunk that was fetched once more.
    with closing(_Reader(remote)) as reader, zipfile.ZipFile(cast(IO[bytes], reader)) as archive:
        _require(archive, required, remote.url)
        spans = _chunks_of_members(archive)
        missing = remote.missing({number for chunks in spans.values() for number in chunks})
        if missing:
            _fetch(remote, missing, "its Python files, their data and metadata", tell)
        with writing(into):
            empty(into)
            for member, chunks in spans.items():
                try:
                    archive.extract(member, into)
                except _BROKEN:
                    # A chunk was damaged on disk or on the way: once more from the server.
                    remote.drop(chunks)
                    archive.extract(member, into)


def _fetch(remote: RemoteFile, missing: list[int], what: str, tell: Tell) -> None:
    total = sum(remote.length(number) for number in missing)
    tell.note(
        f"{remote.name}: to download: {megabytes(total)} of {megabytes(remote.size)} ({what})"
    )
    with tell.progress(remote.name, total, "bytes") as advance:
        remote.fetch(missing, advance)


def _chunks_of_members(archive: zipfile.ZipFile) -> dict[str, range]:
    """Each wanted file's chunks. A file's bytes end at the latest where the next one begins."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    return {
        info.filename: range(info.header_offset // CHUNK, (end - 1) // CHUNK + 1)
        for info, end in zip(infos, ends, strict=True)
        if is_wanted(info.filename)
    }


def _require(archive: zipfile.ZipFile, required: str | None, where: str) -> None:
    if required is not None and required not in archive.namelist():
        raise DataError(
            f"{where}: no attention selector in this wheel ({required} is missing); "
            "name a newer version, or a wheel of vLLM itself"
        )
