"""`acknowledge` and `gate` as a user types them."""

from __future__ import annotations

import json
import tomllib
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from attnbench.cli.acknowledge import acknowledge
from attnbench.cli.gate import gate
from attnbench.errors import DataError, SettingsError, UsageError
from attnbench.history.acknowledge import load_acknowledgements
from attnbench.history.alarms import alarms_of
from attnbench.history.panel import Panel
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder
from tests.history.fake import HOSTILE, fill, row

SOON = (datetime.now(UTC).date() + timedelta(days=30)).isoformat()
SLOW = "CPU_ATTN 16q1s4k dtype=fp32"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    fill(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "attnbench.toml").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(results: Path, *words: str) -> Result:
    app = typer.Typer()
    app.command()(acknowledge)
    app.command()(gate)
    outcome = CliRunner().invoke(app, [*words, "--results", str(results)])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return outcome


def accept(results: Path, series: str, *words: str) -> Result:
    given = ("--reason", HOSTILE, "--expires", SOON, "--by", "A. Person")
    return run(results, "acknowledge", series, *given, *words)


def test_an_alarm_is_accepted_and_then_known(results: Path, project: Path) -> None:
    outcome = accept(results, SLOW)
    path = project / "acknowledged.toml"
    assert tomllib.loads(outcome.stdout) == tomllib.loads(path.read_text(encoding="utf-8"))
    (entry,) = load_acknowledgements(path)
    assert (entry.kind, entry.patterns["series"]) == ("slower", SLOW)
    assert (entry.reason, entry.by, entry.expires.isoformat()) == (HOSTILE, "A. Person", SOON)
    assert entry.since == row(10).run_id
    panel = Panel.of(ResultsFolder(results))
    found = alarms_of(judge(panel), panel, [entry])
    (known,) = found.known
    assert known.ratio is not None
    assert known.ratio < entry.up_to < known.ratio * 1.06
    assert "covers 1 alarm(s)" in outcome.stderr
    with pytest.raises(DataError, match="matches no open alarm") as refused:
        accept(results, SLOW)
    told = f"1 it matches are accepted already, until {SOON} (acknowledged.toml, line 1)"
    assert told in str(refused.value)


@pytest.mark.parametrize("name", ["last", row(11).run_id])
def test_a_run_is_named_by_its_id_or_as_the_last(results: Path, project: Path, name: str) -> None:
    assert "covers 1 alarm(s)" in accept(results, SLOW, "--run", name).stderr
    with pytest.raises(DataError, match="run 'none' is not stored"):
        accept(results, SLOW, "--run", "none")


def test_by_the_id_of_a_series_and_only_printed(results: Path, project: Path) -> None:
    panel = Panel.of(ResultsFolder(results))
    (slow,) = [v for v in judge(panel).verdicts if v.series.title == SLOW and v.estimate]
    outcome = accept(results, slow.series.id, "--print", "--up-to", "1.5")
    (entry,) = tomllib.loads(outcome.stdout)["known"]
    assert (entry["series"], entry["up_to"]) == (slow.series.id, 1.5)
    assert entry["expires"] == date.fromisoformat(SOON)
    assert not (project / "acknowledged.toml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("NOBODY*",), r"'NOBODY\*' matches no open alarm of run .*; open alarms: .*CPU_ATTN"),
        (("*",), "alarms of several kinds; choose one with --kind: slower, status"),
        ((SLOW, "--kind", "stale"), "matches no open alarm of kind stale"),
        ((SLOW, "--kind", "sad"), "use one of slower, status, missing, stale"),
        ((SLOW, "--expires", "soon"), "'soon' is not a day; write 2026-12-31"),
        (("*", "--kind", "status", "--up-to", "1.2"), "--up-to says nothing of kind 'status'"),
        (("FLEX_ATTENTION*",), "a wrong output is never accepted"),
        (("*", "--kind", "slower"), "would accept every point"),
        ((SLOW, "--expires", "2999-01-01"), "more than 180 days from now"),
        ((SLOW, "--up-to", "0.5"), "not a ratio above 1"),
        ((SLOW, "--run", "20200101T000000Z-000000"), "is not stored"),
    ],
)
def test_what_is_refused_leaves_no_file(
    results: Path, project: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises((UsageError, DataError, SettingsError), match=message):
        accept(results, *words)
    assert not (project / "acknowledged.toml").exists()


def test_a_file_that_is_wrong_is_named_before_anything_is_judged(project: Path) -> None:
    (project / "acknowledged.toml").write_text("[[known]]\nkind = 3\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"acknowledged\.toml, line 2"):
        accept(project / "none", SLOW)


def test_the_gates_record_as_rows(results: Path, project: Path) -> None:
    outcome = run(results, "gate", "--nights", "3", "--format", "json")
    rows = json.loads(outcome.stdout)
    confirmed = [r for r in rows if r["what"] == "replayed: confirmed" and r["change"] == "+10%"]
    assert [r["night"] for r in confirmed] == [1, 2, 3]
    assert all(r["timer"] == "wall" and r["of"] > 0 for r in confirmed)
    assert all(r["low"] <= r["rate"] <= r["high"] for r in rows)
    assert "false alarms are not known yet" in outcome.stderr  # each run has its own commit


@pytest.mark.parametrize("standing", [0, 2])
def test_what_was_slow_the_night_before_is_told_apart(standing: int) -> None:
    from attnbench.cli.gate import record_rows
    from attnbench.history.self_record import rate

    names = ("picked", "confirmed", "undecided", "not_confirmed_yet")
    of_timer = {"timer": "wall", "standing": standing, **{name: rate(0, 7) for name in names}}
    record = {
        "false_alarms": {"nights": 0, "by_timer": [of_timer]},
        "power": {"by_timer": []},
        "rehearsed": [],
    }
    told = [row["count"] for row in record_rows(record) if row["what"].startswith("standing")]
    assert told == ([standing] if standing else [])
