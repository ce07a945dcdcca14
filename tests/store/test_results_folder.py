"""Runs opened, resumed, sealed, read; by one process and by several."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from attnbench.errors import CorruptDataError, ResultsFolderError, UsageError
from attnbench.store import ResultsFolder, RunHeader, new_run_id
from attnbench.store.schema import SCHEMA, rows_to_table, table_to_rows
from tests.store.rows import make_header, make_row, numbers, store_run

HEADER = make_header()


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    return ResultsFolder(tmp_path / "results")


def test_what_was_appended_is_read(folder: ResultsFolder) -> None:
    rows = [make_row(HEADER.run_id, number) for number in range(5)]
    with folder.open_run(HEADER) as run:
        for row in rows:
            run.append(row)
    assert table_to_rows(folder.table()) == rows
    assert [path.name for path in (folder.path / "runs").iterdir()] == [f"{HEADER.run_id}.parquet"]


def test_run_ids_sort_by_time_and_are_unique() -> None:
    moment = datetime(2026, 11, 21, 1, 55, tzinfo=UTC)
    ids = {new_run_id(moment) for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"20261121T015500Z-[0-9a-f]{6}", run_id) for run_id in ids)
    assert max(ids) < new_run_id(datetime(2026, 11, 21, 1, 55, 1, tzinfo=UTC))


def test_a_new_header_holds_what_resuming_needs(folder: ResultsFolder) -> None:
    header = RunHeader.new(argv=("attnbench", "run"), spec="8q1s4k", plan=({"a": [1, None]},))
    with folder.open_run(header):
        pass
    assert folder.header(header.run_id) == header
    assert folder.header("last") == header


def test_a_sealed_run_is_resumed_and_merged(folder: ResultsFolder) -> None:
    store_run(folder, HEADER, 3)
    shown = replace(HEADER, argv=("something", "else"))
    with folder.open_run(shown, resume=True) as run:
        assert run.header == HEADER  # as it was planned then
        assert run.done == {make_row(HEADER.run_id, number).key for number in range(3)}
        run.append(make_row(HEADER.run_id, 3))
    assert numbers(folder.table()) == [0, 1, 2, 3]
    assert folder.header(HEADER.run_id) == HEADER


def test_a_compacted_run_is_resumed_and_its_new_rows_count(folder: ResultsFolder) -> None:
    store_run(folder, HEADER, 3)
    store_run(folder, make_header(22), 1)
    folder.compact()
    with folder.open_run(HEADER, resume=True) as run:
        assert len(run.done) == 3
        run.append(make_row(HEADER.run_id, 3))
    assert numbers(folder.table()) == [0, 0, 1, 2, 3]
    assert folder.query("SELECT count(*) AS n FROM results").to_pylist() == [{"n": 5}]
    assert folder.check().is_ok
    assert folder.check().num_rows == 5
    folder.compact()
    assert numbers(folder.table()) == [0, 0, 1, 2, 3]
    assert not list((folder.path / "runs").iterdir())


def test_an_exception_leaves_the_rows_and_the_next_start_seals_them(folder: ResultsFolder) -> None:
    def fail() -> None:
        with folder.open_run(HEADER) as run:
            run.append(make_row(HEADER.run_id, 0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert numbers(folder.table()) == [0]
    (info,) = folder.runs()
    assert not info.is_sealed
    with folder.open_run(make_header(22)) as other:
        assert [orphan.run_id for orphan in other.orphans] == [HEADER.run_id]
    assert folder.runs()[0].is_sealed
    assert numbers(folder.table()) == [0]


def test_a_live_run_is_neither_read_nor_sealed_nor_resumed(folder: ResultsFolder) -> None:
    run = folder.open_run(HEADER)
    run.append(make_row(HEADER.run_id, 0))
    assert folder.table().num_rows == 0
    assert folder.seal_orphans() == []
    for attempt in (
        lambda: folder.open_run(HEADER, resume=True),
        lambda: folder.header(HEADER.run_id),
    ):
        with pytest.raises(ResultsFolderError, match=f"{HEADER.run_id} is being written"):
            attempt()
    assert folder.check().is_ok
    run.append(make_row(HEADER.run_id, 1))
    run.seal()
    assert numbers(folder.table()) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "20260101T000000Z-000000"}, "does not belong"),
        ({"status": "FINE"}, "unknown status 'FINE'"),
        ({"status": "INCORRECT"}, "INCORRECT with 2 samples"),
        ({"samples": ()}, "OK with 0 samples"),
        ({"num_reqs": None}, "num_reqs"),
    ],
)
def test_a_row_that_must_not_be_stored_is_refused_at_once(
    folder: ResultsFolder, changes: dict[str, Any], message: str
) -> None:
    with folder.open_run(HEADER) as run:
        with pytest.raises(ValueError, match=message):
            run.append(make_row(**{"run_id": run.run_id, "number": 0, **changes}))
        run.append(make_row(run.run_id, 1))
        with pytest.raises(ValueError, match="already"):
            run.append(make_row(run.run_id, 1))
    assert numbers(folder.table()) == [1]


def test_bytes_of_a_foreign_message_do_not_stop_a_run(folder: ResultsFolder) -> None:
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    with folder.open_run(HEADER) as run:
        row = make_row(run.run_id, 0, status="ERROR", samples=(), reasons=(broken,))
        run.append(replace(row, hostname=broken))
    assert folder.table(["reasons", "hostname"]).to_pylist() == [
        {"reasons": ["caf\\udce9"], "hostname": "caf\\udce9"}
    ]


def test_columns_and_where(folder: ResultsFolder) -> None:
    with folder.open_run(HEADER) as run:
        for number in range(6):
            ok = number % 2 == 0
            run.append(
                make_row(
                    run.run_id,
                    number,
                    status="OK" if ok else "UNSUPPORTED",
                    samples=(1.0,) if ok else (),
                    phase="decode" if number < 4 else "prefill",
                )
            )
    table = folder.table(["phase", "num_reqs"], {"status": "OK", "phase": ["decode", "mixed"]})
    assert table.schema.equals(pa.schema([SCHEMA.field("phase"), SCHEMA.field("num_reqs")]))
    assert table.to_pylist() == [
        {"phase": "decode", "num_reqs": 1},
        {"phase": "decode", "num_reqs": 3},
    ]
    assert numbers(folder.table(where=pc.field("num_reqs") > 4)) == [4, 5]
    with pytest.raises(UsageError, match="no column 'phse' in the results; did you mean 'phase'"):
        folder.table(["phse"])
    with pytest.raises(UsageError, match="no column 'backnd'"):
        folder.table(where={"backnd": "X"})


def test_where_and_columns_hold_for_unsealed_rows_too(folder: ResultsFolder) -> None:
    run = folder.open_run(HEADER)
    for number in range(3):
        run.append(make_row(run.run_id, number))
    run.close()
    assert folder.table(["seed"], {"num_reqs": [1, 2]}).to_pylist() == [{"seed": 0}] * 2


def test_runs_newest_last_with_counts(folder: ResultsFolder) -> None:
    with folder.open_run(make_header(23)):
        pass
    with folder.open_run(make_header(21)) as run:
        when = datetime(2026, 11, 20, tzinfo=UTC)
        facts = {"commit": "abc", "commit_time": when}
        for number in range(3):
            run.append(make_row(run.run_id, number, **facts))
        run.append(make_row(run.run_id, 3, status="OOM", samples=(), **facts))
    store_run(folder, make_header(22), 1)
    folder.compact()
    first, second, third = folder.runs()
    assert [info.started_at.day for info in (first, second, third)] == [21, 22, 23]
    assert dict(first.counts) == {"OK": 3, "OOM": 1}
    assert (first.num_rows, first.commit, first.commit_time) == (4, "abc", when)
    assert (first.device_class, first.subject) == ("cpu-2c", "attnbench")
    assert first.stack_id == make_row("r", 0).stack_id
    assert (third.num_rows, third.commit, third.commit_time) == (0, "", None)
    assert folder.header("last").run_id == third.run_id


def test_runs_that_are_not_there_and_ids_that_are_none(folder: ResultsFolder) -> None:
    unknown = make_header(25).run_id
    with pytest.raises(UsageError, match=f"no run {unknown}.*it holds no run yet"):
        folder.header(unknown)
    store_run(folder, HEADER, 1)
    with pytest.raises(UsageError, match=f"no run {unknown}.*the newest is {HEADER.run_id}"):
        folder.header(unknown)
    with pytest.raises(UsageError, match=f"--resume {unknown}.*the newest is {HEADER.run_id}"):
        folder.open_run(make_header(25), resume=True)
    with pytest.raises(UsageError, match="already; go on with --resume"):
        folder.open_run(HEADER)
    with pytest.raises(UsageError, match=r"'\.\./\.\./x' is not a run id"):
        folder.open_run(replace(HEADER, run_id="../../x"))


def test_a_folder_below_a_file_cannot_be_written_and_one_that_is_not_there_not_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "results", tmp_path / "file"):
        with pytest.raises(ResultsFolderError, match=f"{path}.*--results"):
            ResultsFolder(path).open_run(HEADER)
        with pytest.raises(ResultsFolderError, match=r"no such results folder.*attnbench run"):
            ResultsFolder(path).table()


def test_a_journal_with_a_corrupt_line_is_said_then_salvaged(folder: ResultsFolder) -> None:
    store_run(folder, HEADER, 1)
    run = folder.open_run(HEADER, resume=True)
    for number in (1, 2, 3):
        run.append(make_row(run.run_id, number))
    run.close()
    journal = folder.path / "runs" / f"{run.run_id}.journal"
    journal.write_bytes(journal.read_bytes().replace(b'"3q1s1k"', b'"7q1s1k"', 1))
    assert folder.check().bad_files == (journal,)
    for reading in (folder.table, folder.runs, lambda: folder.query("SELECT 1")):
        with pytest.raises(CorruptDataError, match=r"line 3 .*results compact"):
            reading()
    (orphan,) = folder.seal_orphans()
    assert (orphan.num_rows, orphan.corrupt_lines) == (2, (3,))
    assert orphan.set_aside is not None
    assert orphan.set_aside.name == f"{run.run_id}.journal.corrupt"
    assert numbers(folder.table()) == [0, 1, 3]
    (problem,) = folder.check().problems
    assert problem.path == orphan.set_aside
    assert "line 3 was lost" in problem.text
    with folder.open_run(HEADER, resume=True) as again:
        assert make_row(run.run_id, 2).key not in again.done
        again.append(make_row(run.run_id, 2))
    orphan.set_aside.unlink()
    assert numbers(folder.table()) == [0, 1, 2, 3]
    assert folder.check().is_ok


def test_a_run_whose_header_line_is_corrupt_is_salvaged(folder: ResultsFolder) -> None:
    run = folder.open_run(HEADER)
    run.append(make_row(run.run_id, 0))
    run.close()
    journal = folder.path / "runs" / f"{run.run_id}.journal"
    journal.write_bytes(journal.read_bytes().replace(b"argv", b"argh", 1))
    folder.seal_orphans()
    assert numbers(folder.table()) == [0]
    assert folder.header(run.run_id).started_at == HEADER.started_at


def test_damage_is_neither_sealed_nor_compacted_under_a_fresh_checksum(
    folder: ResultsFolder,
) -> None:
    sealed = store_run(folder, HEADER, 3)
    run = folder.open_run(HEADER, resume=True)
    run.append(make_row(run.run_id, 3))
    data = bytearray(sealed.read_bytes())
    digests = data.index(b"attnbench sha256")
    data[digests + 20] ^= 1  # what reading the rows does not notice
    sealed.write_bytes(data)
    assert folder.table().num_rows == 3
    with pytest.raises(CorruptDataError, match=str(sealed)):
        run.seal()
    assert (folder.path / "runs" / f"{run.run_id}.journal").exists()
    with pytest.raises(CorruptDataError, match=str(sealed)):
        folder.compact()
    run.close()
    assert sealed.read_bytes() == data
    assert not list((folder.path / "months").iterdir())


def test_two_processes_write_while_a_third_reads_seals_and_compacts(folder: ResultsFolder) -> None:
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.store.writer", str(folder.path), str(number), "40", "3"],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    stop = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not stop.is_set():
            folder.seal_orphans()
            folder.compact()
            seen.append(folder.table(["num_reqs"]).num_rows)
            folder.query("SELECT count(*) FROM results")

    folder.path.mkdir()
    reader = threading.Thread(target=read)
    reader.start()
    outputs = [writer.communicate()[0] for writer in writers]
    stop.set()
    reader.join()
    assert [writer.returncode for writer in writers] == [0, 0]
    run_ids = [json.loads(line)["sealed"] for out in outputs for line in out.splitlines()]
    assert len(set(run_ids)) == 6
    assert seen == sorted(seen)  # nothing that was seen was ever gone
    assert all(count % 40 == 0 for count in seen)  # and no run was seen in part
    assert numbers(folder.table()) == sorted(list(range(40)) * 6)
    assert folder.check().is_ok


def test_the_store_converts_to_pandas(folder: ResultsFolder) -> None:
    import pandas as pd

    store_run(folder, HEADER, 2)
    frame = folder.table(["backend", "samples", "commit_time"]).to_pandas(
        types_mapper=pd.ArrowDtype
    )
    assert list(frame["backend"]) == ["CPU_ATTN", "CPU_ATTN"]
    assert list(frame["samples"][0]) == [0.125, 0.25]


def test_rows_in_one_schema_even_when_there_are_none(folder: ResultsFolder) -> None:
    with folder.open_run(HEADER):
        pass
    assert folder.table().equals(rows_to_table([]))
    assert folder.table().schema.equals(SCHEMA)
