"""Kept digests: lost, damaged, old or not to be written, the answer is that of the runs."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from attnbench.errors import CorruptDataError, ResultsFolderError
from attnbench.history import digests
from attnbench.history.panel import Panel
from attnbench.history.series import Series
from attnbench.history.series_rows import series_of
from attnbench.store import ResultsFolder, RunHeader
from tests.history.fake import row, table_of, timed
from tests.history.test_panel import every, store

ROWS = [
    *timed([1e-3, 1.1e-3, 1.2e-3]),
    *timed([2e-3, 2e-3], backend="TORCH_SDPA"),
    row(2, backend="TORCH_SDPA", status="INCORRECT", timer="", reasons=("max error 0.3",)),
]


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path / "results")
    store(folder, ROWS)
    return folder


def kept(folder: ResultsFolder) -> list[Path]:
    return sorted((folder.path / ".digests").iterdir())


def read(folder: ResultsFolder) -> list[Series]:
    return every(Panel.of(folder))


EXPECTED = series_of(table_of(ROWS))


def test_digests_are_read_instead_of_runs(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(folder) == EXPECTED

    def refuse(*_: object) -> pa.Table:
        raise AssertionError("made again")

    monkeypatch.setattr(digests, "digest_of", refuse)
    assert read(folder) == EXPECTED


@pytest.mark.parametrize("damage", ["byte", "empty", "cut", "text", "other run's", "stranger's"])
def test_a_damaged_digest_is_made_again(folder: ResultsFolder, damage: str) -> None:
    assert read(folder) == EXPECTED
    first, second, _ = kept(folder)
    whole = first.read_bytes()
    if damage == "byte":
        for at in range(0, len(whole), max(1, len(whole) // 60)):
            changed = bytearray(whole)
            changed[at] ^= 0x55
            first.write_bytes(bytes(changed))
            assert read(folder) == EXPECTED
        return
    if damage == "stranger's":
        pq.write_table(pa.table({"series": [1]}), first)
    else:
        content = {"empty": b"", "cut": whole[:-9], "text": b"not Parquet"}
        first.write_bytes(content.get(damage, second.read_bytes()))
    assert read(folder) == EXPECTED
    assert len(kept(folder)) == 3
    assert first.read_bytes() == whole


def test_a_digest_of_another_form_is_made_again(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(digests, "_FORM", "0:older")
        assert read(folder) == EXPECTED
    before = [path.read_bytes() for path in kept(folder)]
    assert read(folder) == EXPECTED
    assert all(a != b.read_bytes() for a, b in zip(before, kept(folder), strict=True))


def test_a_resumed_run_has_another_digest(folder: ResultsFolder) -> None:
    assert read(folder) == EXPECTED
    more = row(2, 3, seconds=1.4e-3)
    header = RunHeader(run_id=more.run_id, started_at=more.started_at)
    with folder.open_run(header, resume=True) as run:
        run.append(more)
    assert read(folder) == series_of(table_of([*ROWS, more]))


def test_a_killed_run_is_read_and_not_kept(folder: ResultsFolder) -> None:
    """A half-written night: its rows count as far as they got, and its digest is not believed."""
    half = [row(3, 0, seconds=1.3e-3), row(3, 1, seconds=1.31e-3)]
    run = folder.open_run(RunHeader(run_id=half[0].run_id, started_at=half[0].started_at))
    run.append(half[0])
    assert read(folder) == EXPECTED  # it is being written
    run.close()
    assert read(folder) == series_of(table_of([*ROWS, half[0]]))
    assert len(kept(folder)) == 3
    with folder.open_run(run.header, resume=True) as again:
        again.append(half[1])
    assert read(folder) == series_of(table_of([*ROWS, *half]))
    assert len(kept(folder)) == 4


def test_two_nights_at_once_and_a_clock_that_went_back(tmp_path: Path) -> None:
    """Runs are in order of their start, then id, whatever order they were stored in."""
    twins = [row(1, r, run_id="20261110T020000Z-ffffff", seconds=3e-3) for r in range(3)]
    rows = [*timed([1e-3] * 3, first_run=4), *twins, *timed([2e-3] * 3)]
    folder = ResultsFolder(tmp_path / "results")
    store(folder, rows)
    panel = Panel.of(folder)
    assert every(panel) == series_of(table_of(rows))
    marks = [(run.started_at, run.run_id) for run in panel.runs]
    assert marks == sorted(marks)
    assert panel.runs[2].run_id == twins[0].run_id


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    folder: ResultsFolder, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "file":
        (folder.path / ".digests").write_text("in the way")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert read(folder) == EXPECTED
    assert not [path for path in folder.path.glob(".digests/*") if path.is_file()]


def test_a_full_disk_costs_only_time(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    assert read(folder) == EXPECTED
    assert kept(folder) == []


def test_a_damaged_run_without_a_digest_is_refused(folder: ResultsFolder) -> None:
    (path, *_) = sorted((folder.path / "runs").glob("*.parquet"))
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 0x55
    path.write_bytes(bytes(changed))
    with pytest.raises(CorruptDataError, match="results check"):
        Panel.of(folder)


def test_a_digest_replaced_under_a_panel_is_noticed(folder: ResultsFolder) -> None:
    panel = Panel.of(folder)
    first, second, _ = kept(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ResultsFolderError, match="run the command again"):
        panel.series(0)


def test_stored_truth_is_left_as_it_is(folder: ResultsFolder) -> None:
    def truth() -> dict[Path, bytes]:
        files = [path for path in folder.path.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in files if path.parent.name != ".digests"}

    before = truth()
    read(folder)
    read(folder)
    assert truth() == before


def test_names_of_published_runs_become_no_paths() -> None:
    assert digests._file_name("20261110T020000Z-ffffff") == "20261110T020000Z-ffffff"
    for name in ("../../etc/passwd", "", "a/b", "x" * 300, ".."):
        assert "/" not in digests._file_name(name)
        assert digests._file_name(name).isalnum()
