"""`attnbench manifest` as a user types it, and the end of a night."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attnbench.cli.manifest import manifest_app, record_stacks
from attnbench.errors import DataError, UsageError
from attnbench.history.panel import Panel
from attnbench.settings import Settings, load_settings
from attnbench.store import ResultsFolder
from attnbench.store.record import stack_id
from tests.history.fake import NEW_STACK, OLD_STACK, fill


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    fill(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attnbench.toml").write_text(f'results = "{results}"\nmanifest = "stacks"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Result:
    outcome = CliRunner().invoke(manifest_app, list(words))
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome


def test_write_log_and_show(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 stacks, 2 of them new" in run("write").stderr
    # The setting's path begins at the settings file.
    (project / "below").mkdir()
    monkeypatch.chdir(project / "below")
    assert run("write").stderr.endswith("stacks: 2 stacks, 0 of them new\n")
    listed = json.loads(run("log", "--format", "json").stdout)
    assert [(r["stack"], r["first_measured"], r["changed"]) for r in listed] == [
        (stack_id(OLD_STACK), "2026-11-09 02:00", "first stack"),
        (
            stack_id(NEW_STACK),
            "2026-11-16 02:00",
            "+ gxx 12.2.0, torch 2.12.0 -> 2.13.0, triton 3.6.0 -> 3.7.1",
        ),
    ]
    shown = json.loads(run("show", listed[0]["commit"], "--format", "json").stdout)
    assert [f"{r['name']}=={r['version']}" for r in shown] == list(OLD_STACK)
    with pytest.raises(DataError, match="names no stack"):
        run("show", "nope")
    outcome = run("log", "--device", "h200", "--format", "json")
    assert json.loads(outcome.stdout) == []
    assert "devices in it: cpu-xeon-2c" in outcome.stderr


def test_no_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("write", "log"):
        with pytest.raises(UsageError, match=r"no manifest repository is named"):
            run(verb)
    with pytest.raises(UsageError, match=r'write manifest = "stacks" into attnbench\.toml'):
        run("log")
    with pytest.raises(UsageError, match="--repository '': name a folder"):
        run("log", "--repository", "")
    with pytest.raises(UsageError, match="no such folder"):
        run("log", "--repository", "none")


def test_a_night_writes_what_is_new(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings()
    runs = Panel.of(ResultsFolder(settings.results)).runs
    record_stacks(settings, runs[:3])
    record_stacks(settings, runs)
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1 stack, 1 of them new",
        "2 stacks, 1 of them new",
    ]
    tip = _tip(project / "stacks")
    record_stacks(settings, [replace(runs[-1], stack=(), stack_id="")])
    assert "1 runs do not know their stack" in capsys.readouterr().err
    assert _tip(project / "stacks") == tip


def test_a_night_survives_a_manifest_that_cannot_be_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "stacks").mkdir()
    (project / "stacks" / "mine").write_text("mine")
    record_stacks(load_settings(), Panel.of(ResultsFolder(load_settings().results)).runs)
    said = capsys.readouterr().err
    assert said.startswith("the manifest repository was not written: ")
    assert "has files and is not a git repository" in said
    assert [path.name for path in (project / "stacks").iterdir()] == ["mine"]


def test_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().manifest == ""
    record_stacks(load_settings(), Panel.of(ResultsFolder(results)).runs)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_history_from_parquet_alone(project: Path, tmp_path: Path, results: Path) -> None:
    runs = Panel.of(ResultsFolder(results)).runs
    for number in range(1, len(runs) + 1):
        record_stacks(load_settings(), runs[:number])
    run("write", "--repository", str(tmp_path / "again"))
    assert _tip(tmp_path / "again") == _tip(project / "stacks")


def _tip(folder: Path) -> str:
    words = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout
