"""`attnbench results` as typed: what is printed, where, and the exit code."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attnbench.cli.results import results_app
from attnbench.errors import CorruptDataError, ExitCode, UsageError
from attnbench.store import ResultsFolder
from tests.store.rows import make_header, store_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultsFolder:
    """Two stored runs in the default folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = ResultsFolder(tmp_path / "results")
    store_run(folder, make_header(20), 2)
    store_run(folder, make_header(21), 3)
    return folder


def typed(*words: str) -> Result:
    """Errors on purpose come out as they are: `main` prints them and exits."""
    result = CliRunner().invoke(results_app, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


SQL = "SELECT backend, sum(num_reqs) AS requests, max(started_at) AS last FROM results GROUP BY ALL"


def test_query_in_every_format(folder: ResultsFolder) -> None:
    assert json.loads(typed("query", SQL, "--format", "json").stdout) == [
        {"backend": "CPU_ATTN", "requests": 9, "last": "2026-11-21 01:55:02+00:00"}
    ]
    (row,) = csv.DictReader(io.StringIO(typed("query", SQL, "-f", "csv").stdout))
    assert row["requests"] == "9"
    markdown = typed("query", SQL, "-f", "markdown").stdout.splitlines()
    assert markdown[0] == "| backend | requests | last |"
    table = typed("query", SQL).stdout.splitlines()
    assert table[0].split() == ["backend", "requests", "last"]
    assert table[1].split()[:2] == ["CPU_ATTN", "9"]


def test_query_of_another_folder(folder: ResultsFolder, tmp_path: Path) -> None:
    other = ResultsFolder(tmp_path / "other")
    store_run(other, make_header(22), 1)
    count = "SELECT count(*) AS n FROM results"
    assert json.loads(typed("query", count, "--results", "other", "-f", "json").stdout) == [
        {"n": 1}
    ]
    (tmp_path / "attnbench.toml").write_text('results = "other"\n')
    assert json.loads(typed("query", count, "-f", "json").stdout) == [{"n": 1}]


def test_export(folder: ResultsFolder, tmp_path: Path) -> None:
    done = typed("export", "all.csv")
    assert (done.stdout, done.stderr) == ("", "5 rows written to all.csv\n")
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 6
    typed("export", "some.txt", "--sql", "SELECT 1 AS x", "--format", "json")
    assert json.loads((tmp_path / "some.txt").read_text()) == [{"x": 1}]
    with pytest.raises(UsageError, match="--format 'xls': write one of csv, json"):
        typed("export", "all.csv", "--format", "xls")


def test_check(folder: ResultsFolder) -> None:
    done = typed("check")
    assert (done.exit_code, done.stdout) == (ExitCode.OK, "")
    assert done.stderr == "2 files, 5 rows: all good\n"
    bad = folder.path / "runs" / f"{make_header(20).run_id}.parquet"
    bad.write_bytes(bad.read_bytes()[:-9])
    done = typed("check", "--format", "json")
    assert done.exit_code == ExitCode.USAGE
    (problem,) = json.loads(done.stdout)
    assert problem["file"].endswith(bad.name)
    assert "corrupt" in problem["problem"]
    assert done.stderr == "2 files, 3 rows: 1 of them bad\n"
    assert bad.name in typed("check").stdout
    with pytest.raises(CorruptDataError):
        typed("query", "SELECT 1")


def test_compact(folder: ResultsFolder) -> None:
    assert json.loads(typed("compact", "-f", "json").stdout) == [
        {"file": "results/months/2026-11.parquet", "runs_merged": 2, "rows": 5}
    ]
    assert typed("compact").stderr == "nothing to compact\n"
    assert folder.table().num_rows == 5


def test_every_option_has_help() -> None:
    for verb in ("query", "export", "check", "compact"):
        shown = typed(verb, "--help").stdout
        assert "--results" in shown
        assert "--format" in shown
        assert "Results folder" in shown


def test_export_of_some_runs(folder: ResultsFolder, tmp_path: Path) -> None:
    assert typed("export", "one.csv", "--run", "last").stderr == "3 rows written to one.csv\n"
    with pytest.raises(UsageError, match="--run 20200101T000000Z-abcdef: no such run in"):
        typed("export", "one.csv", "--run", "20200101T000000Z-abcdef")
    with pytest.raises(UsageError, match="--sql chooses its own rows"):
        typed("export", "one.csv", "--run", "last", "--sql", "SELECT 1")


def test_export_to_be_published(
    folder: ResultsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = typed("export", "results/published/mine.parquet", "--public", "--run", "last")
    size = (tmp_path / "results" / "published" / "mine.parquet").stat().st_size / 1e6
    assert done.stderr == (
        f"3 rows of 1 run(s) written to results/published/mine.parquet, {size:.2f} MB\n"
    )
    assert typed("check").stderr == "3 files, 5 rows: all good\n"
    monkeypatch.setattr("attnbench.store.publish.MAX_BYTES", 10_000)
    told = typed("export", "big.parquet", "--public").stderr.splitlines()
    assert told[1].startswith("big.parquet: more than 0.01 MB")
    assert "--run" in told[1]
    with pytest.raises(UsageError, match="--format 'csv': --public writes Parquet"):
        typed("export", "mine.csv", "--public", "--format", "csv")
    with pytest.raises(UsageError, match=r"mine\.csv: .*end it in \.parquet"):
        typed("export", "mine.csv", "--public")
    with pytest.raises(UsageError, match="--sql chooses its own rows"):
        typed("export", "mine.parquet", "--public", "--sql", "SELECT 1")


def test_git_keeps_published_results_and_no_others(tmp_path: Path) -> None:
    """By git itself, with this repository's ignore file."""
    shutil.copy(Path(__file__).parents[2] / ".gitignore", tmp_path / ".gitignore")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    kept = ["results/README.md", "results/published/a.parquet"]
    ignored = [
        "results/.publish-salt",
        "results/.lock",
        "results/runs/a.parquet",
        "results/months/a.parquet",
        "results/matrix.json",
        "results/published/.a.parquet.tmp",
        "results/published/notes.csv",
    ]
    for name in (*kept, *ignored):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "results"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert sorted(listed) == kept
