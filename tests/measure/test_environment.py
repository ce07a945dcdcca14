"""The facts a row carries: read from the machine and the repository, never guessed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

import attnbench
from attnbench.backends.device import Device
from attnbench.measure import environment
from attnbench.measure.environment import (
    Commit,
    OtherLoad,
    cpu_class,
    read_commit,
    read_conditions,
)
from attnbench.store.record import COLUMNS, stack_id


@pytest.mark.parametrize(
    ("name", "threads", "expected"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.80GHz", 2, "cpu-xeon-2c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 8, "cpu-xeon-platinum-8481c-8c"),
        ("AMD EPYC 7B13", 4, "cpu-epyc-7b13-4c"),
        ("", 1, "cpu-unknown-1c"),
    ],
)
def test_cpu_class_is_a_slug_that_two_like_machines_share(
    name: str, threads: int, expected: str
) -> None:
    assert cpu_class(name, threads) == expected


def test_environment_fills_columns_of_the_record_and_no_others() -> None:
    facts = environment.read_environment(Device("cpu"))
    assert set(facts.columns()) <= set(COLUMNS)
    assert facts.stack == tuple(sorted(facts.stack))
    assert facts.stack_id == stack_id(facts.stack)
    assert f"torch=={importlib.metadata.version('torch')}" in facts.stack
    assert facts.device_class.startswith("cpu-")
    assert facts.harness_version == attnbench.__version__


def test_conditions_name_their_units() -> None:
    units = ("_bytes", "_hz", "_c", "_1m", "_w", "_cores")
    conditions = read_conditions()
    assert conditions["memory_available_bytes"] > 0
    assert all(key.endswith(units) for key in conditions)


def test_other_load_is_what_other_processes_use_and_not_our_own() -> None:
    quiet = OtherLoad()
    assert quiet.cores() is None  # too short to tell
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    theirs = psutil.Process(busy.pid)
    try:
        time.sleep(0.3)
        others, started = OtherLoad(), time.perf_counter()
        theirs_s, ours_s = sum(theirs.cpu_times()[:2]), time.process_time()
        while time.perf_counter() < started + 1.0:
            pass  # our own core must not count
        found = others.cores()
        span_s = time.perf_counter() - started
        theirs_s = sum(theirs.cpu_times()[:2]) - theirs_s
        ours_s = time.process_time() - ours_s
    finally:
        busy.kill()
        busy.wait()
    # Whatever else runs: at least what that process got, at most what we left. Ticks are 10 ms.
    assert found is not None
    slack = 0.05
    assert found >= theirs_s / span_s - slack
    assert found <= ((os.cpu_count() or 1) * span_s - ours_s) / span_s + slack


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def installed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose package pretends to be the installed attnbench."""
    package = tmp_path / "repo" / "attnbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(attnbench, "__file__", str(package / "__init__.py"))
    monkeypatch.delenv("ASV_COMMIT", raising=False)
    return package


def test_commit_of_the_repository_the_package_lies_in(installed_from: Path) -> None:
    repo = installed_from.parent
    git(repo, "init", "-q")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", 'Say | why "quoted"', "--date=2026-01-02T03:04:05Z")
    commit = read_commit()
    assert commit.sha == git(repo, "rev-parse", "HEAD")
    assert commit.subject == 'Say | why "quoted"'
    assert isinstance(commit.time, datetime)
    assert commit.time.tzinfo is UTC

    (installed_from / "__init__.py").write_text("x = 1\n", encoding="utf-8")
    assert read_commit().sha == commit.sha + "+dirty"


def test_a_repository_that_does_not_track_the_package_is_not_its_commit(
    installed_from: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A virtual environment inside somebody's project: that project's HEAD is not our commit.
    repo = installed_from.parent
    git(repo, "init", "-q")
    git(repo, "commit", "-q", "--allow-empty", "-m", "unrelated")

    class Uninstalled:
        def read_text(self, name: str) -> str | None:
            return None

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Uninstalled())
    assert read_commit() == Commit()


def test_commit_an_installer_recorded(
    installed_from: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return '{"url": "https://example.org/x", "vcs_info": {"commit_id": "abc"}}'

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    assert read_commit() == Commit(sha="abc")


def test_asv_names_the_commit_it_installed(
    installed_from: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASV_COMMIT", "0" * 40)
    assert read_commit() == Commit(sha="0" * 40)
