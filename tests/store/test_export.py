"""Exports, read back by the plainest reader of each format."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from attnbench.errors import ResultsFolderError, UsageError
from attnbench.store import ResultsFolder
from attnbench.store.export import ExportFormat
from attnbench.store.schema import SCHEMA
from tests.store.rows import make_header, make_row


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    folder = ResultsFolder(tmp_path / "results")
    with folder.open_run(make_header()) as run:
        run.append(
            make_row(
                run.run_id,
                0,
                conditions_before={"load_1min": 0.5},
                reasons=('say "no", | or\nnot',),
                max_abs_error=float("nan"),
            )
        )
        run.append(make_row(run.run_id, 1, samples=(0.1, 0.2)))
    return folder


def test_csv(folder: ResultsFolder, tmp_path: Path) -> None:
    assert folder.export(tmp_path / "a.csv") == 2
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == SCHEMA.names
    assert json.loads(first["conditions_before"]) == {"load_1min": 0.5}
    assert json.loads(first["reasons"]) == ['say "no", | or\nnot']
    assert first["max_abs_error"] == ""
    assert json.loads(second["samples"]) == [0.1, 0.2]
    assert first["started_at"] == "2026-11-21T01:55:00+00:00"


def test_json_is_strict(folder: ResultsFolder, tmp_path: Path) -> None:
    folder.export(tmp_path / "a.json")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    rows = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert [row["num_reqs"] for row in rows] == [1, 2]
    assert rows[0]["conditions_before"] == {"load_1min": 0.5}
    assert rows[0]["max_abs_error"] is None
    assert rows[1]["samples"] == [0.1, 0.2]


def test_parquet(folder: ResultsFolder, tmp_path: Path) -> None:
    folder.export(tmp_path / "a.parquet")
    exported = pq.read_table(tmp_path / "a.parquet")
    assert exported.schema.equals(folder.table().schema)
    assert str(exported.to_pylist()) == str(folder.table().to_pylist())  # a NaN is not itself


def test_markdown_of_a_query(folder: ResultsFolder, tmp_path: Path) -> None:
    sql = "SELECT num_reqs, reasons FROM results ORDER BY num_reqs"
    folder.export(tmp_path / "a.txt", ExportFormat.MARKDOWN, sql)
    assert (tmp_path / "a.txt").read_text().splitlines() == [
        "| num_reqs | reasons |",
        "|---|---|",
        '| 1 | ["say \\"no\\", \\| or\\nnot"] |',
        "| 2 | [] |",
    ]


def test_nothing_is_a_whole_file_too(folder: ResultsFolder, tmp_path: Path) -> None:
    assert folder.export(tmp_path / "a.json", sql="SELECT 1 AS x WHERE false") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_a_name_without_a_known_ending_and_a_place_that_cannot_be_written(
    folder: ResultsFolder, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"a\.xls: .*\.csv, \.json, \.parquet, \.md or give"):
        folder.export(tmp_path / "a.xls")
    with pytest.raises(ResultsFolderError, match=r"none/a\.csv: cannot be written"):
        folder.export(tmp_path / "none" / "a.csv")
