"""A folder with a trace, and the verbs of traffic in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.workload import load_suites
from tests.choose.day import write_day
from tests.choose.verbs import Call, typed


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """One request at a time even at 64 ms a step: every gap is one step, nobody waits."""
    return write_day(tmp_path)


@pytest.fixture
def call(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Call:
    """`attnbench itl`, or another verb, beside the trace."""
    monkeypatch.chdir(tmp_path)
    return lambda *words, verb="itl": typed(capsys, verb, *words)


@pytest.fixture
def batches(call: Call, tmp_path: Path) -> list[str]:
    """What the suite that `attnbench traffic` writes measures."""
    (tmp_path / "suites").mkdir()
    words = ("day.csv", "--representatives", "24", "--out", "suites/day.py")
    code, _, err = call(*words, verb="traffic")
    assert code == 0, err
    return [one.text for one in load_suites(tmp_path / "suites")["day"].workloads("full")]
