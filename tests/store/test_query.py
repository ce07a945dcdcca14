"""SQL over the results: what it answers, and what it must not be able to do."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from attnbench.errors import CorruptDataError, UsageError
from attnbench.store import ResultsFolder
from attnbench.store.schema import SCHEMA
from tests.store.rows import make_header, make_row, store_run


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    """A month file, a sealed run, a killed run."""
    folder = ResultsFolder(tmp_path / "results [of] o'brien*")
    store_run(folder, make_header(20), 3)
    folder.compact()
    store_run(folder, make_header(21), 2)
    run = folder.open_run(make_header(22))
    run.append(make_row(run.run_id, 0, status="OOM", samples=()))
    run.close()
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> ResultsFolder:
    """The same in a folder whose name DuckDB does not take for a pattern."""
    folder = ResultsFolder(tmp_path / "o'brien")
    store_run(folder, make_header(20), 3)
    folder.compact()
    store_run(folder, make_header(21), 2)
    return folder


def test_it_sees_month_files_runs_and_killed_runs(folder: ResultsFolder) -> None:
    table = folder.query("SELECT status, count(*) AS n FROM results GROUP BY status ORDER BY n")
    assert table.to_pylist() == [{"status": "OOM", "n": 1}, {"status": "OK", "n": 5}]


def test_rows_and_types_are_those_of_the_table(plain: ResultsFolder) -> None:
    columns = ["run_id", "num_reqs", "samples", "started_at", "conditions_before", "commit_time"]
    order = [("run_id", "ascending"), ("num_reqs", "ascending")]
    queried = plain.query(f"SELECT {', '.join(columns)} FROM results ORDER BY run_id, num_reqs")
    assert queried.to_pylist() == plain.table(columns).sort_by(order).to_pylist()
    assert queried.schema.field("started_at").type == pa.timestamp("us", tz="UTC")
    assert plain.query("SELECT * FROM results").column_names == SCHEMA.names


def test_statements_that_only_read_are_allowed(plain: ResultsFolder) -> None:
    described = plain.query("DESCRIBE results")
    assert described["column_name"].to_pylist() == SCHEMA.names
    assert plain.query("WITH a AS (SELECT 1 AS x) SELECT x FROM a;").to_pylist() == [{"x": 1}]
    assert plain.query("EXPLAIN SELECT * FROM results").num_rows > 0
    assert plain.query("SELECT 1 WHERE false").num_rows == 0


def test_a_folder_without_rows_can_be_asked(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert ResultsFolder(tmp_path / "results").query("SELECT * FROM results").num_rows == 0


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", 'Parser Error: syntax error at or near "SELEC"'),
        ("SELECT bckend FROM results", 'column "bckend" not found'),
        ("SELECT * FROM reslts", "Table with name reslts does not exist"),
        ("SELECT CAST('a' AS INTEGER)", "Could not convert string 'a'"),
        ("SELECT error('boom')", "boom"),
    ],
)
def test_an_sql_error_is_one_line_with_duckdbs_words_and_the_mend(
    plain: ResultsFolder, sql: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plain.query(sql)
    message = str(caught.value)
    assert said in message
    assert sql[:8] in message
    assert "DESCRIBE results" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SELECT 1; SELECT 2",
        "CREATE TABLE a AS SELECT 1",
        "INSERT INTO results SELECT * FROM results",
        "COPY results TO '{file}'",
        "ATTACH '{file}'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
    ],
)
def test_only_one_select_is_taken(plain: ResultsFolder, sql: str, tmp_path: Path) -> None:
    (sealed,) = (plain.path / "runs").glob("*.parquet")
    before = sealed.read_bytes()
    file = str(sealed).replace("'", "''")
    with pytest.raises(UsageError, match="write one SELECT"):
        plain.query(sql.format(file=file))
    assert sealed.read_bytes() == before


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM '{other}'",
        "SELECT * FROM read_csv('{other}')",
        "SELECT * FROM read_text('{other}')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM secret",
    ],
)
def test_no_other_file_and_no_variable_of_ours_can_be_read(
    plain: ResultsFolder, sql: str, tmp_path: Path
) -> None:
    secret = pa.table({"a": ["secret"]})
    assert secret.num_rows == 1
    other = tmp_path / "other.csv"
    other.write_text("a\nsecret\n")
    with pytest.raises(UsageError):
        plain.query(sql.format(other=other))


def test_damage_that_stops_a_query_is_said_to_be_damage(plain: ResultsFolder) -> None:
    (sealed,) = (plain.path / "runs").glob("*.parquet")
    data = bytearray(sealed.read_bytes())
    data[4:400] = bytes(396)  # the first column's pages
    sealed.write_bytes(data)
    with pytest.raises(CorruptDataError, match="SHA-256"):
        plain.query("SELECT run_id FROM results")
