"""`attnbench doctor` as a user types it, and as a script reads it."""

from __future__ import annotations

import json

import pytest

from attnbench.cli import main as cli
from attnbench.cli.doctor import _lines
from attnbench.measure import doctor
from attnbench.measure.checks import Check, CheckResult
from tests.cli.conftest import Attnbench


def _check(name: str, result: CheckResult, mend: str = "") -> Check:
    return Check(name=name, result=result, measured=f"{name} seen", meaning="so", mend=mend)


def test_this_machine_end_to_end(attnbench: Attnbench) -> None:
    done = attnbench("doctor", "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert {row["result"] for row in rows.values()} <= {"ok", "warn", "not run"}
    assert rows["A/A"]["values"]["difference"] >= 0.01
    assert "3 processes" in rows["A/A"]["measured"]
    assert 0.95 < rows["canary"]["values"]["wall_ratio"] < 1.05


@pytest.mark.parametrize(
    ("results", "code", "last"),
    [
        (["ok", "ok"], 0, "This machine can measure, and nothing needs mending."),
        (["ok", "not run"], 0, "This machine can measure, and nothing needs mending."),
        (["warn", "ok"], 0, "This machine can measure; 1 thing could be better."),
        (["warn", "warn"], 0, "This machine can measure; 2 things could be better."),
        (["warn", "fail"], 4, "This machine cannot measure: b."),
    ],
)
def test_exit_code_and_last_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    results: list[str],
    code: int,
    last: str,
) -> None:
    found = [_check(name, CheckResult(r)) for name, r in zip("ab", results, strict=True)]
    monkeypatch.setattr(doctor, "examine", lambda results, device: iter(found))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert stopped.value.code == code
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith(last)
    assert line.endswith(f"exit {code}")


def test_csv_has_a_line_a_check_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [_check("a", CheckResult.FAIL, "mend it"), _check("b", CheckResult.OK)]
    monkeypatch.setattr(doctor, "examine", lambda results, device: iter(found))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--format", "csv"])
    assert stopped.value.code == 4
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "check,result,measured,meaning,mend"
    assert [line.split(",")[:2] for line in lines] == [["a", "fail"], ["b", "ok"]]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_and_a_number_keeps_its_unit(width: int) -> None:
    check = Check(
        name="rates",
        result=CheckResult.WARN,
        measured=", ".join(f"fp{n} product {n} GFLOP/s" for n in range(10, 40)),
        mend="stop other programs, then ask again " * 3,
    )
    lines = _lines(check, width, color=False)
    assert all(len(line) <= max(width, 53) for line in lines)
    assert not any(line.rstrip()[-1].isdigit() for line in lines)
    assert lines[0].startswith("warn    rates          fp10")
    assert sum("mend: " in line for line in lines) == 1
