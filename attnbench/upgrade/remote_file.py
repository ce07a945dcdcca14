"""A file on a web server, read in chunks that are files of the cache folder.

What is there is not fetched again, in this process or the next one. A server without ranges sends
the whole file, into the same chunks; broken off, it begins again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.errors import InfrastructureError
from attnbench.upgrade.cache import empty, writing
from attnbench.upgrade.tell import Advance

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20
"""Bytes of a chunk file; the last one of a file is shorter."""

TIMEOUT_S = 30.0
"""Longest silence of a server."""

PAUSES_S = (0.5, 1.0, 2.0)
"""Waits before a failed request is made again."""

_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_MEMO = "file.json"


class _Changed(InfrastructureError):
    """The file on the server is not the one the chunks are from."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: has changed on the server ({reason}); run it again")


class RemoteFile:
    """A file on a web server, in chunk files under `folder`.

    `size` is its length and `fetched` what came of it through this object, both in bytes;
    `ranges` says whether the server gives parts of it.
    """

    def __init__(self, url: str, folder: Path, session: requests.Session) -> None:
        self.url = url
        self.folder = folder
        self.session = session
        self.size = 0
        self.ranges = True
        self.fetched = 0
        self._etag = ""
        self._advance: Advance = lambda _more: None

    @property
    def name(self) -> str:
        """The file's own name, without the address."""
        return self.url.partition("#")[0].rpartition("/")[2]

    @property
    def chunks(self) -> range:
        """The numbers of all its chunks."""
        return range(-(-self.size // CHUNK))

    def find(self) -> None:
        """Learn the size: from the chunks that are here, else from the server.

        A server that gives no ranges answers with the whole file; then all of it is taken.

        Raises:
            InfrastructureError: the server cannot be reached or does not have the file.
        """
        if self._remembered():
            return
        with closing(self._get("bytes=0-0")) as response:
            self._etag = response.headers.get("ETag", "")
            self.ranges = response.status_code == 206
            if self.ranges:
                self.size = self._range_of(response)[1]
            else:
                self.size = int(response.headers.get("Content-Length") or 0)
        if not self.size:
            raise InfrastructureError(
                f"{self.url}: the server tells no length; download the wheel by hand and name "
                "the file"
            )
        memo = {"url": self.url, "size": self.size, "etag": self._etag, "ranges": self.ranges}
        with writing(self.folder):
            empty(self.folder)
            (self.folder / _MEMO).write_text(json.dumps(memo), encoding="utf-8")

    def _remembered(self) -> bool:
        try:
            memo = json.loads((self.folder / _MEMO).read_text(encoding="utf-8"))
            if memo["url"] != self.url:
                return False
            self.size, self._etag, self.ranges = memo["size"], memo["etag"], memo["ranges"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Those of `chunks` that are not here in full length, in order."""
        return [number for number in sorted(set(chunks)) if not self._is_here(number)]

    def length(self, chunk: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK, self.size - chunk * CHUNK)

    def drop(self, chunks: Iterable[int]) -> None:
        """Forget chunks, so that they are fetched again."""
        for number in chunks:
            self._path(number).unlink(missing_ok=True)

    def discard(self) -> None:
        """Forget the file and everything fetched of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def fetch(self, chunks: Iterable[int], advance: Advance | None = None) -> None:
        """Get those of `chunks` that are missing, each run of neighbours in one request.

        Raises:
            InfrastructureError: the server failed, also after waiting, or its file has changed.
        """
        self._advance = advance or (lambda _more: None)
        wanted = list(chunks)
        failures = 0
        try:
            while missing := self.missing(wanted):
                try:
                    self._fetch_run(missing)
                except _transport_errors() as error:
                    if len(self.missing(wanted)) < len(missing):
                        failures = 0
                    if failures == len(PAUSES_S):
                        raise _unreachable(self.url, error) from error
                    time.sleep(PAUSES_S[failures])
                    failures += 1
        except _Changed:
            self.discard()
            raise

    def read_at(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end; fetched if they are not here."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        chunks = range(offset // CHUNK, (end - 1) // CHUNK + 1)
        self.fetch(chunks)
        parts = []
        for number in chunks:
            begin = number * CHUNK
            with self._path(number).open("rb") as file:
                file.seek(max(offset - begin, 0))
                parts.append(file.read(end - max(offset, begin)))
        return b"".join(parts)[: end - offset]

    def sha256(self) -> str | None:
        """Of the whole file; None if only parts are here."""
        if self.missing(self.chunks):
            return None
        digest = hashlib.sha256()
        for number in self.chunks:
            digest.update(self._path(number).read_bytes())
        return digest.hexdigest()

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}"

    def _is_here(self, chunk: int) -> bool:
        try:
            return self._path(chunk).stat().st_size == self.length(chunk)
        except OSError:
            return False

    def _fetch_run(self, missing: list[int]) -> None:
        first = last = missing[0]
        while last + 1 in missing:
            last += 1
        end = min((last + 1) * CHUNK, self.size) - 1
        with closing(self._get(f"bytes={first * CHUNK}-{end}")) as response:
            if response.headers.get("ETag", "") != self._etag:
                raise _Changed(self.url, "another ETag")
            start = 0
            if response.status_code == 206:
                start, total = self._range_of(response)
                if start != first * CHUNK or total != self.size:
                    raise _Changed(self.url, f"{total} bytes instead of {self.size}")
            elif int(response.headers.get("Content-Length") or self.size) != self.size:
                raise _Changed(self.url, "another length")
            self._store(response, start // CHUNK)

    def _store(self, response: requests.Response, number: int) -> None:
        pending = bytearray()
        for block in response.iter_content(1 << 16):
            pending += block
            while len(pending) >= CHUNK:
                self._keep(number, bytes(pending[:CHUNK]))
                del pending[:CHUNK]
                number += 1
        if pending and number in self.chunks and len(pending) == self.length(number):
            self._keep(number, bytes(pending))

    def _keep(self, number: int, content: bytes) -> None:
        if self._is_here(number):
            return
        with writing(self.folder):
            part = self._path(number).with_suffix(".part")
            part.write_bytes(content)
            part.replace(self._path(number))
        self.fetched += len(content)
        self._advance(len(content))

    def _range_of(self, response: requests.Response) -> tuple[int, int]:
        """Where the bytes of a 206 begin, and how long the whole file is."""
        text = response.headers.get("Content-Range", "")
        span, _, total = text.removeprefix("bytes").strip().partition("/")
        try:
            return int(span.partition("-")[0]), int(total)
        except ValueError as error:
            raise InfrastructureError(
                f"{self.url}: the server's range header is {text!r}; download the wheel by hand "
                "and name the file"
            ) from error

    def _get(self, span: str) -> requests.Response:
        # Compressed on the way, the bytes would not be those of the range.
        headers = {"Range": span, "Accept-Encoding": "identity"}
        for pause in (*PAUSES_S, None):
            try:
                response = self.session.get(
                    self.url, headers=headers, stream=True, timeout=TIMEOUT_S
                )
            except _transport_errors() as error:
                if pause is None:
                    raise _unreachable(self.url, error) from error
            else:
                if response.status_code in (200, 206):
                    return response
                response.close()
                if response.status_code == 416:
                    raise _Changed(self.url, "a shorter file")
                if pause is None or response.status_code not in _RETRIED_STATUS:
                    raise InfrastructureError(
                        f"{self.url}: the server answers {response.status_code} "
                        f"{response.reason}; check the index pip is set to, or download the "
                        "wheel by hand and name the file"
                    )
            time.sleep(pause)
        raise AssertionError("unreachable")


def _transport_errors() -> tuple[type[Exception], ...]:
    import requests

    return (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


def _unreachable(url: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        f"{url}: cannot be downloaded ({type(error).__name__}: {_innermost(error)}); check the "
        "network and HTTPS_PROXY, then run it again: what came is kept"
    )


def _innermost(error: BaseException) -> str:
    *_, last = _causes(error)
    return str(last) or type(last).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
