"""A results folder that may be read and not written, as on a share of somebody else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.history.fake import fill


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    results = tmp_path / "results"
    fill(results)
    shutil.rmtree(results / ".digests", ignore_errors=True)
    places = [results, *results.rglob("*")]
    for place in places:
        place.chmod(stat.S_IMODE(place.stat().st_mode) & ~0o222)
    yield results
    for place in places:
        place.chmod(stat.S_IMODE(place.stat().st_mode) | 0o200)


def asked(*words: str) -> subprocess.CompletedProcess[str]:
    """attnbench by somebody who must keep to the permissions, which root need not."""
    command = [sys.executable, "-m", "attnbench", *words]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may write everywhere, and there is no setpriv to give that up")
        command = [setpriv, "--bounding-set=-dac_override,-fowner", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def listing(folder: Path) -> dict[str, int]:
    return {str(one.relative_to(folder)): one.stat().st_mtime_ns for one in folder.rglob("*")}


def test_it_is_really_read_only(folder: Path) -> None:
    done = asked("results", "compact", "--results", str(folder))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_the_pages_and_the_history_need_not_write_there(folder: Path, tmp_path: Path) -> None:
    before = listing(folder)
    done = asked("dashboard", "--results", str(folder), "--site", str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "REGRESSION" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    done = asked("history", "--backend", "CPU_ATTN", "--results", str(folder), "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 8
    assert listing(folder) == before


def test_pages_that_cannot_be_written_are_refused_in_a_line(folder: Path) -> None:
    done = asked("dashboard", "--results", str(folder), "--site", str(folder / "site"))
    assert done.returncode == 2
    assert "give another --site" in done.stderr
    assert "Traceback" not in done.stderr
