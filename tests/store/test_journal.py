"""What a kill, a flipped bit and a full disk leave of a journal."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from attnbench.errors import AttnBenchError, InfrastructureError, ResultsFolderError, SchemaError
from attnbench.store import disk
from attnbench.store.header import SCHEMA_VERSION
from attnbench.store.journal import Journal, encode_line, is_live, read_journal
from tests.store.rows import make_header, make_row

RUN = make_header().run_id


def write_journal(path: Path, count: int = 3) -> bytes:
    journal = Journal(path, make_header())
    for number in range(count):
        journal.append(make_row(RUN, number))
    journal.close()
    return path.read_bytes()


def test_a_kill_at_any_byte_loses_only_the_line_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    data = write_journal(path)
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    cuts = random.Random(0).sample(range(len(data)), 300)
    for cut in sorted({*cuts, *ends, *(end - 1 for end in ends), 0}):
        path.write_bytes(data[:cut])
        read = read_journal(path)
        # A line that lacks nothing but its newline is whole.
        whole = sum(end - 1 <= cut for end in ends)
        assert (read.header is not None) == (whole > 0)
        assert [row.num_reqs for row in read.rows] == list(range(1, whole)), cut
        assert read.corrupt_lines == ()
        assert read.is_blank == (whole == 0)


def test_any_flipped_bit_is_reported_by_line_number_and_spares_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    data = write_journal(path)
    chance = random.Random(1)
    for _ in range(200):
        bit = chance.randrange(len(data) * 8)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        read = read_journal(path)
        number = data[: bit // 8].count(b"\n") + 1
        if bit // 8 == len(data) - 1:  # the last newline: the row itself is whole
            assert (read.corrupt_lines, len(read.rows)) == ((), 3)
        else:
            assert number in read.corrupt_lines
            assert (
                len(read.corrupt_lines) <= 2
            )  # a damaged newline joins two lines, a new one splits
            assert len(read.rows) >= 1


def test_a_corrupt_line_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(write_journal(path).replace(b'"2q1s1k"', b'"3q1s1k"', 1))
    with pytest.raises(AttnBenchError, match=r"a\.journal: corrupt: line 3 .*results compact"):
        read_journal(path).refuse_corrupt()


def test_a_newer_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    header = make_header().to_json() | {"schema_version": SCHEMA_VERSION + 1}
    path.write_bytes(encode_line({"header": header}))
    with pytest.raises(SchemaError, match=f"version {SCHEMA_VERSION + 1}.*upgrade"):
        read_journal(path)


def test_a_journal_is_live_as_long_as_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    assert not is_live(path)
    journal = Journal(path, make_header())
    assert is_live(path)
    journal.close()
    assert not is_live(path)


def test_a_forked_worker_does_not_keep_a_killed_runs_journal_alive(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, make_header())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")  # the fork handlers have run
        time.sleep(60)
        os._exit(0)
    try:
        os.read(reader, 1)
        assert is_live(path)  # the child closed its copy only
        journal.close()
        assert not is_live(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_full_disk_takes_back_the_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, make_header())
    journal.append(make_row(RUN, 0))

    def half(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_all", half)
        with pytest.raises(InfrastructureError, match=r"a\.journal.*No space left.*--resume"):
            journal.append(make_row(RUN, 1, reasons=("long" * 5000,)))
    journal.append(make_row(RUN, 2))
    journal.close()
    read = read_journal(path)
    assert [row.num_reqs for row in read.rows] == [1, 3]
    assert read.corrupt_lines == ()
    assert not read.is_torn


def test_a_disk_that_was_full_from_the_start_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_all", full)
    with pytest.raises(InfrastructureError, match=r"a\.journal.*, then give the command again$"):
        Journal(tmp_path / "a.journal", make_header())
    assert list(tmp_path.iterdir()) == []


def test_a_real_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    journal = Journal(path, make_header())
    journal.append(make_row(RUN, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    try:
        with pytest.raises(InfrastructureError, match="too large"):
            journal.append(make_row(RUN, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.close()
    assert [row.num_reqs for row in read_journal(path).rows] == [1]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsFolderError, match=r"none/a\.journal.*--results"):
        Journal(tmp_path / "none" / "a.journal", make_header())
