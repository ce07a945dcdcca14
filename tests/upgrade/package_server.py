"""A package index on this machine that counts what it sends and can be told to fail."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

SELECTOR = "vllm/v1/attention/selector.py"


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, as compiled code in a wheel hardly does."""
    return random.Random(seed).randbytes(size)


def wheel_bytes(
    name: str,
    version: str,
    files: Mapping[str, bytes],
    requires: tuple[str, ...] = (),
) -> bytes:
    """A wheel with these files, in this order, and its metadata at the end."""
    stem = f"{name.replace('-', '_')}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    every = {**files, f"{stem}/METADATA": "\n".join(lines).encode(), f"{stem}/WHEEL": tags.encode()}
    record = [f"{one},{_digest(body)},{len(body)}" for one, body in every.items()]
    every[f"{stem}/RECORD"] = "\n".join([*record, f"{stem}/RECORD,,"]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, body in every.items():
            archive.writestr(one, body)
    return out.getvalue()


def _digest(body: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")


def vllm_wheel(version: str, *, compiled: int = 3 << 20, flashinfer: str | None = None) -> bytes:
    """A wheel in vLLM's shape: Python around `compiled` bytes of machine code."""
    files = {
        "vllm/__init__.py": b"NAME = 'first'\n",
        "vllm/_C.abi3.so": noise(compiled),
        "vllm/data.json": b"{}",
        SELECTOR: b"def get_attn_backend(): ...\n",
        "vllm/_moe_C.abi3.so": noise(compiled, 1),
        "vllm/worker.py": b"# the last one\n",
    }
    pin = (f"flashinfer-python=={flashinfer}",) if flashinfer else ()
    return wheel_bytes("vllm", version, files, ("torch==2.11.0", *pin))


class PackageServer:
    """The index at `url`. Set its attributes to make it worse than PyPI."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.json = True
        self.with_digest = True
        self.etag = '"one"'
        self.cut_after: int | None = None
        self.cuts = 0
        self.statuses: list[int] = []
        self.sent = 0
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""

    def add(self, filename: str, content: bytes) -> str:
        """Serve a file; returns its address."""
        self.files[filename] = content
        return f"{self.url.removesuffix('/simple')}/files/{filename}"

    def asked(self, prefix: str = "/files/") -> list[tuple[str, str]]:
        """Path and Range header of the requests so far."""
        return [one for one in self.requests if one[0].startswith(prefix)]

    def project(self, name: str) -> list[str]:
        """The files of a project."""
        stem = re.sub(r"[-_.]+", "_", name)
        return [one for one in self.files if one.partition("-")[0].lower() == stem]

    def page(self, name: str) -> tuple[str, bytes]:
        """Content type and body of a project's page (PEP 691 or PEP 503)."""
        listed = [(one, f"../../files/{one}") for one in self.project(name)]
        hashes = {one: hashlib.sha256(self.files[one]).hexdigest() for one, _ in listed}
        if self.json:
            files = [
                {"filename": one, "url": url, "hashes": {"sha256": hashes[one]}}
                if self.with_digest
                else {"filename": one, "url": url, "hashes": {}}
                for one, url in listed
            ]
            body = {"meta": {"api-version": "1.0"}, "name": name, "files": files}
            return "application/vnd.pypi.simple.v1+json", json.dumps(body).encode()
        links = [
            f'<a href="{url}{"#sha256=" + hashes[one] if self.with_digest else ""}">{one}</a>'
            for one, url in listed
        ]
        return "text/html", f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()


class _Handler(BaseHTTPRequestHandler):
    server_state: ClassVar[PackageServer]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.server_state
        span = self.headers.get("Range", "")
        with state.lock:
            state.requests.append((self.path, span))
            status = state.statuses.pop(0) if state.statuses else 0
        if status:
            self._answer(status, b"", "text/plain")
        elif self.path.startswith("/files/"):
            self._file(state.files.get(self.path.removeprefix("/files/")), span)
        else:
            name = self.path.removeprefix("/simple/").strip("/")
            if state.project(name):
                kind, body = state.page(name)
                self._answer(200, body, kind)
            else:
                self._answer(404, b"", "text/plain")

    def _file(self, content: bytes | None, span: str) -> None:
        if content is None:
            self._answer(404, b"", "text/plain")
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        if match is None or not self.server_state.ranges:
            self._answer(200, content, "application/zip")
            return
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        where = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], "application/zip", where)

    def _answer(self, status: int, body: bytes, kind: str, where: str = "") -> None:
        state = self.server_state
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", state.etag)
        if where:
            self.send_header("Content-Range", where)
        self.end_headers()
        with state.lock:
            cut = state.cuts > 0 and state.cut_after is not None and len(body) > state.cut_after
            if cut:
                state.cuts -= 1
        sending = body[: state.cut_after] if cut else body
        try:
            for start in range(0, len(sending), 1 << 16):
                block = sending[start : start + (1 << 16)]
                self.wfile.write(block)
                if self.path.startswith("/files/"):
                    with state.lock:
                        state.sent += len(block)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return None


@contextmanager
def package_server() -> Iterator[PackageServer]:
    """A running index."""
    state = PackageServer()
    handler = type("Handler", (_Handler,), {"server_state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
