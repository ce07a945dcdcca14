"""Published runs are shown beside one's own and are a baseline of none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from attnbench.cli import history as verbs
from attnbench.dashboard.overview import overview_context
from attnbench.dashboard.watch import Watch
from attnbench.errors import ExitCode
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason, Verdict
from attnbench.history.series_rows import series_of
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement
from tests.history.fake import row, table_of, timed


def run_ids(rows: list[Measurement]) -> frozenset[str]:
    return frozenset(one.run_id for one in rows)


def test_a_strangers_faster_runs_make_no_regression() -> None:
    theirs, mine = timed([1e-3] * 4), timed([1.5e-3], first_run=4)
    table = table_of([*theirs, *mine])
    # They are of the same device class, so without knowing whose they are, they would judge.
    assert judge(table, require_confirmation=False).exit_code is ExitCode.REGRESSION
    found = judge(table, published=run_ids(theirs), require_confirmation=False)
    assert [v.reasons for v in found.verdicts] == [(Reason.NO_BASELINE,)]
    assert found.exit_code is ExitCode.OK
    assert found.previous is None
    assert found.environment is None


def test_own_runs_between_a_strangers_are_the_baseline() -> None:
    """Slow strangers before and after: neither hides that one's own run became slower."""
    mine = [*timed([1e-3] * 3), *timed([1.5e-3], first_run=6)]
    theirs = timed([1.5e-3] * 3, first_run=3)
    found = judge(table_of([*mine, *theirs]), published=run_ids(theirs), require_confirmation=False)
    (verdict,) = found.verdicts
    assert verdict.verdict is Verdict.REGRESSION
    assert verdict.baseline_runs == 3
    assert verdict.estimate is not None
    assert verdict.estimate.ratio == pytest.approx(1.5, rel=0.01)
    # The level began with this run, not with a stranger's that was as slow.
    assert verdict.since is verdict.subject
    assert found.previous is not None
    assert found.previous.run_id == mine[8].run_id


def test_a_strangers_support_is_not_ones_own() -> None:
    theirs = [row(run) for run in range(3)]
    mine = [row(3, status="UNSUPPORTED", reasons=("needs another library",))]
    found = judge(table_of([*theirs, *mine]), published=run_ids(theirs))
    assert found.exit_code is ExitCode.OK
    # Nor does a stranger's other timer make one's own incomparable.
    other = [row(run, timer="event") for run in range(3)]
    found = judge(table_of([*other, row(3)]), published=run_ids(other))
    assert found.verdicts[0].reasons == (Reason.NO_BASELINE,)


def test_the_newest_own_run_is_judged_and_shown_as_the_latest() -> None:
    mine, theirs = timed([1e-3, 1.01e-3]), timed([5e-3], first_run=8)
    table = table_of([*mine, *theirs])
    published = run_ids(theirs)
    assert judge(table, published=published).run.run_id == mine[-1].run_id
    (series,) = series_of(table, published=published)
    assert series.newest.run_id == mine[-1].run_id
    assert [value.is_published for value in series.values] == [False, False, True]
    # A folder with none of its own shows what there is.
    everything = run_ids([*mine, *theirs])
    assert judge(table, published=everything).run.run_id == theirs[-1].run_id


def test_the_overview_of_a_first_run_says_so_in_whole_sentences() -> None:
    table = table_of(timed([1e-3]))
    panel = Panel.of_table(table, ())
    runs, index = panel.runs, {panel.runs[0].run_id: 0}
    context = overview_context(judge(panel), panel, runs, index, (), Watch())
    assert context["sentence"] == "The next run is judged by this one."
    assert context["counts"] == "Nothing to compare with yet"


def test_history_lists_the_verdict_on_ones_own_run(tmp_path: Path) -> None:
    mine, theirs = ResultsFolder(tmp_path / "mine"), ResultsFolder(tmp_path / "theirs")
    for folder, rows in (
        (theirs, timed([1e-3] * 4)),
        (theirs, timed([1e-3], first_run=9)),
        (mine, timed([2e-3], first_run=5)),
    ):
        for run_id in sorted(run_ids(rows)):
            own = [one for one in rows if one.run_id == run_id]
            with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as run:
                for one in own:
                    run.append(one)
    theirs.publish(mine.path / "published" / "theirs.parquet")
    app = typer.Typer()
    app.command()(verbs.history)
    done = CliRunner().invoke(app, ["--results", str(mine.path), "--format", "json"])
    (line,) = json.loads(done.stdout)
    assert line["reasons"] == ["no_baseline"]
    assert line["latest_us"] == pytest.approx(2000)
    assert line["runs"] == 6
