"""`check` names every file with a row that must not be, and accepts what may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.store import Measurement, ResultsFolder
from tests.store.rows import make_header, make_row, store_run, write_file

HEADER = make_header()
RUN = HEADER.run_id


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    """A folder with a good run, so that not everything in it is bad."""
    folder = ResultsFolder(tmp_path / "results")
    store_run(folder, make_header(20), 3)
    return folder


def test_a_good_folder(folder: ResultsFolder) -> None:
    with folder.open_run(HEADER) as run:
        run.append(make_row(RUN, 0))
        run.append(make_row(RUN, 1, status="NOISY"))
        run.append(make_row(RUN, 2, status="UNSUPPORTED", samples=(), reasons=("no",)))
        run.append(make_row(RUN, 0, metric="host"))
        run.append(make_row(RUN, 0, replicate=1, stack=(), stack_id=make_row(RUN, 0).stack_id[:0]))
    report = folder.check()
    # The last row: an empty stack whose id is not that of an empty stack.
    assert [problem.text.split(";")[0] for problem in report.problems] == [
        "1 rows whose stack_id is not that of their stack"
    ]
    assert (report.num_files, report.num_rows) == (2, 8)


def _twice(row: Measurement) -> list[Measurement]:
    return [row, replace(row, samples=(9.0,))]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (_twice, "1 rows have the key of another row"),
        (lambda row: [replace(row, status="INCORRECT")], "samples but neither OK nor NOISY"),
        (lambda row: [replace(row, samples=())], "OK or NOISY without samples"),
        (lambda row: [replace(row, status="GREAT", samples=())], "unknown status"),
        (lambda row: [replace(row, workload_id="0" * 16)], "whose workload_id is not"),
        (lambda row: [replace(row, variant="FA3")], "whose point_id is not"),
        (lambda row: [replace(row, stack=("torch==2.12.0",))], "whose stack_id is not"),
        (lambda row: [replace(row, run_id="20260101T000000Z-000000")], "rows of other runs"),
    ],
)
def test_bad_rows_are_found(
    folder: ResultsFolder, rows: Callable[[Measurement], list[Measurement]], text: str
) -> None:
    path = write_file(folder.path / "runs" / f"{RUN}.parquet", HEADER, rows(make_row(RUN, 0)))
    report = folder.check()
    assert report.bad_files == (path,)
    assert any(text in problem.text for problem in report.problems)
    assert all("move the file out" in problem.text for problem in report.problems)


def test_bad_rows_of_a_journal_are_found(folder: ResultsFolder) -> None:
    from attnbench.store.journal import Journal

    path = folder.path / "runs" / f"{RUN}.journal"
    journal = Journal(path, HEADER)
    for row in _twice(make_row(RUN, 0)):
        journal.append(row)
    journal.close()
    assert folder.check().bad_files == (path,)
    assert folder.table(where={"run_id": RUN}).num_rows == 1  # and are not doubled


def test_a_file_in_the_wrong_place_is_found(folder: ResultsFolder) -> None:
    (good,) = (folder.path / "runs").glob("*.parquet")
    renamed = good.with_name("20260101T000000Z-000000.parquet")
    good.rename(renamed)
    (problem,) = folder.check().problems
    assert (problem.path, "rename it back" in problem.text) == (renamed, True)


def test_a_month_file_twice_is_found(folder: ResultsFolder) -> None:
    folder.compact()
    (month,) = (folder.path / "months").glob("*.parquet")
    copy = month.with_name("2026-12.parquet")
    copy.write_bytes(month.read_bytes())
    report = folder.check()
    assert report.bad_files == (copy,)
    texts = " ".join(problem.text for problem in report.problems)
    assert "another month" in texts
    assert f"as does {month}" in texts


def test_every_bad_file_is_named_and_the_good_ones_are_not(folder: ResultsFolder) -> None:
    damaged: list[Any] = []
    for day in (21, 22, 23):
        path = store_run(folder, make_header(day), 1)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        damaged.append((path, data))
    for path, data in damaged:
        path.write_bytes(data)
    report = folder.check()
    assert list(report.bad_files) == [path for path, _ in damaged]
    assert (report.num_files, report.num_rows) == (4, 3)
