from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import requests

from attnbench.errors import CorruptDataError, DataError, ExitCode, InfrastructureError
from attnbench.upgrade.download import unpack_local, unpack_remote
from attnbench.upgrade.remote_file import CHUNK, RemoteFile
from tests.upgrade.conftest import Heard
from tests.upgrade.package_server import SELECTOR, PackageServer, noise, vllm_wheel, wheel_bytes

NAME = "vllm-0.22.1-cp38-abi3-manylinux_2_28_x86_64.whl"
WANTED = {
    "vllm/__init__.py",
    SELECTOR,
    "vllm/data.json",
    "vllm/worker.py",
    "vllm-0.22.1.dist-info/METADATA",
    "vllm-0.22.1.dist-info/WHEEL",
    "vllm-0.22.1.dist-info/RECORD",
}


def fetch(
    url: str, folder: Path, tell: Heard, sha256: str | None = None, required: str | None = SELECTOR
) -> tuple[set[str], int]:
    """The files that were unpacked, and how many bytes came over the network."""
    with requests.Session() as session:
        remote = RemoteFile(url, folder / "chunks", session)
        try:
            unpack_remote(remote, folder / "files", tell, sha256=sha256, required=required)
        finally:
            session.close()
    files = (folder / "files").rglob("*")
    names = {str(one.relative_to(folder / "files")) for one in files if one.is_file()}
    return names, remote.fetched


def chunk_names(folder: Path) -> set[str]:
    return {one.name for one in (folder / "chunks").iterdir() if one.name.isdigit()}


def test_only_the_chunks_with_python_and_metadata_are_fetched(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = vllm_wheel("0.22.1")
    url = server.add(NAME, content)
    names, fetched = fetch(url, tmp_path, tell)
    assert names == WANTED
    # Python is at the start, around 3 MiB and around 6 MiB: three of seven chunks.
    assert len(content) > 6 * CHUNK
    assert fetched == server.sent - 1 < 3 * CHUNK
    (note,) = tell.notes
    assert "of 6.3 MB" in note
    assert NAME in note
    assert tell.advanced == tell.totals


def test_the_unpacked_files_are_those_of_the_wheel(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    url = server.add(NAME, vllm_wheel("0.22.1"))
    fetch(url, tmp_path, tell)
    unpacked = tmp_path / "files"
    assert (unpacked / "vllm/__init__.py").read_bytes() == b"NAME = 'first'\n"
    assert (unpacked / "vllm/worker.py").read_bytes() == b"# the last one\n"
    local = tmp_path / NAME
    local.write_bytes(server.files[NAME])
    unpack_local(local, tmp_path / "local", SELECTOR)
    for one in WANTED:
        assert (tmp_path / "local" / one).read_bytes() == (unpacked / one).read_bytes()


def big_wheel() -> bytes:
    """Five chunks that are all wanted: Python that does not compress."""
    body = b"# " + noise(4 * CHUNK + CHUNK // 2).hex().encode()[: 9 * CHUNK] + b"\n"
    return wheel_bytes("vllm", "0.22.1", {SELECTOR: b"", "vllm/big.py": body})


def test_a_connection_that_breaks_is_resumed_in_the_same_call(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = big_wheel()
    url = server.add(NAME, content)
    server.cut_after, server.cuts = 2 * CHUNK + 1000, 1
    names, fetched = fetch(url, tmp_path, tell)
    assert "vllm/big.py" in names
    assert fetched == len(content)
    # One byte to learn the size, and the 1000 of the chunk that was cut off.
    assert server.sent == len(content) + 1 + 1000


def test_an_interrupted_download_goes_on_with_what_is_there(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = big_wheel()
    url = server.add(NAME, content)
    with requests.Session() as session:
        remote = RemoteFile(url, tmp_path / "chunks", session)
        remote.find()
        remote.fetch([0, 1])
    assert chunk_names(tmp_path) == {"000000", "000001"}
    # 100 breaks without a single whole chunk: more than it tries.
    server.cut_after, server.cuts = 1000, 100
    with pytest.raises(InfrastructureError, match="what came is kept") as caught:
        fetch(url, tmp_path, tell)
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert chunk_names(tmp_path) >= {"000000", "000001"}
    there = sum((tmp_path / "chunks" / one).stat().st_size for one in chunk_names(tmp_path))
    server.cuts, server.sent = 0, 0
    names, fetched = fetch(url, tmp_path, tell)
    assert "vllm/big.py" in names
    assert fetched == server.sent == len(content) - there


def test_a_server_without_ranges_gives_all_of_it_and_the_checksum_is_checked(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = vllm_wheel("0.22.1")
    url = server.add(NAME, content)
    server.ranges = False
    names, fetched = fetch(url, tmp_path, tell, sha256=hashlib.sha256(content).hexdigest())
    assert names == WANTED
    assert fetched == len(content)
    assert "all of it: no ranges there" in tell.notes[0]
    with pytest.raises(CorruptDataError, match="SHA-256"):
        fetch(url, tmp_path / "again", tell, sha256="0" * 64)


def test_without_ranges_a_broken_connection_begins_again_and_ends(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = vllm_wheel("0.22.1")
    url = server.add(NAME, content)
    server.ranges = False
    server.cut_after, server.cuts = 4 * CHUNK, 2  # the first one is the question for the size
    names, fetched = fetch(url, tmp_path, tell)
    assert names == WANTED
    assert fetched == len(content)


# The last chunk holds the list of files: nothing can be said of the others without it.
@pytest.mark.parametrize(("number", "again"), [(0, CHUNK), (3, CHUNK), (6, 3 * CHUNK)])
def test_a_damaged_chunk_is_fetched_once_more(
    server: PackageServer, tmp_path: Path, tell: Heard, number: int, again: int
) -> None:
    content = vllm_wheel("0.22.1")
    url = server.add(NAME, content)
    chunks = tmp_path / "chunks"
    with requests.Session() as session:
        remote = RemoteFile(url, chunks, session)
        remote.find()
        remote.fetch(remote.chunks)
    damaged = chunks / f"{number:06d}"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    names, fetched = fetch(url, tmp_path, tell)
    assert names == WANTED
    assert again - CHUNK < fetched <= again
    assert (tmp_path / "files/vllm/worker.py").read_bytes() == b"# the last one\n"


def test_a_chunk_of_a_wrong_length_counts_as_missing(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = big_wheel()
    url = server.add(NAME, content)
    with requests.Session() as session:
        remote = RemoteFile(url, tmp_path / "chunks", session)
        remote.find()
        remote.fetch(remote.chunks)
    (tmp_path / "chunks" / "000001").write_bytes(b"short")
    assert fetch(url, tmp_path, tell)[1] == CHUNK


def test_a_server_that_sends_something_else_is_found_out(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    content = bytearray(vllm_wheel("0.22.1"))
    content[40] ^= 0xFF  # within the first Python file
    url = server.add(NAME, bytes(content))
    with pytest.raises(CorruptDataError, match="not that wheel"):
        fetch(url, tmp_path, tell)
    url = server.add("other.whl", noise(3000))
    with pytest.raises(CorruptDataError, match="not that wheel"):
        fetch(url, tmp_path / "other", tell)


def test_a_file_that_has_changed_is_not_mixed_with_the_old_one(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    url = server.add(NAME, big_wheel())
    with requests.Session() as session:
        remote = RemoteFile(url, tmp_path / "chunks", session)
        remote.find()
        remote.fetch([0])
    server.etag = '"two"'
    with pytest.raises(InfrastructureError, match="has changed on the server"):
        fetch(url, tmp_path, tell)
    assert "vllm/big.py" in fetch(url, tmp_path, tell)[0]


def test_a_file_that_has_grown_is_noticed_without_an_etag(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    server.etag = ""
    url = server.add(NAME, big_wheel())
    with requests.Session() as session:
        remote = RemoteFile(url, tmp_path / "chunks", session)
        remote.find()
        remote.fetch([0])
        server.files[NAME] += b"more"
        with pytest.raises(InfrastructureError, match=r"changed .* instead of"):
            remote.fetch([1])
    assert not (tmp_path / "chunks").exists()


def test_a_wheel_without_a_selector_is_refused_before_it_is_fetched(
    server: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    files = {"vllm/__init__.py": noise(3 * CHUNK), "vllm/attention.py": b""}
    url = server.add(NAME, wheel_bytes("vllm", "0.1.0", files))
    with pytest.raises(DataError, match="no attention selector") as caught:
        fetch(url, tmp_path, tell)
    assert caught.value.exit_code == ExitCode.USAGE
    assert server.sent <= CHUNK + 1
    local = tmp_path / NAME
    local.write_bytes(server.files[NAME])
    with pytest.raises(DataError, match="no attention selector"):
        unpack_local(local, tmp_path / "local", SELECTOR)
    assert not (tmp_path / "local").exists()


def test_a_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    local = tmp_path / NAME
    local.write_bytes(b"not a zip")
    with pytest.raises(CorruptDataError, match="not a readable wheel"):
        unpack_local(local, tmp_path / "local", SELECTOR)


@pytest.mark.parametrize("statuses", [[503, 503], [429]])
def test_a_busy_server_is_asked_again(
    server: PackageServer, tmp_path: Path, tell: Heard, statuses: list[int]
) -> None:
    url = server.add(NAME, vllm_wheel("0.22.1", compiled=1000))
    server.statuses = list(statuses)
    assert fetch(url, tmp_path, tell)[0] == WANTED


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_refuses_is_not(
    server: PackageServer, tmp_path: Path, tell: Heard, status: int
) -> None:
    url = server.add(NAME, vllm_wheel("0.22.1", compiled=1000))
    server.statuses = [status] * 9
    with pytest.raises(InfrastructureError, match=f"answers {status}"):
        fetch(url, tmp_path, tell)
    assert len(server.statuses) == 8


def test_members_do_not_leave_the_folder(tmp_path: Path) -> None:
    local = tmp_path / NAME
    local.write_bytes(wheel_bytes("vllm", "0.22.1", {SELECTOR: b"", "../../out.py": b"out"}))
    unpack_local(local, tmp_path / "a" / "b" / "local", SELECTOR)
    assert not (tmp_path / "a" / "out.py").exists()
    assert (tmp_path / "a" / "b" / "local" / "out.py").exists()
