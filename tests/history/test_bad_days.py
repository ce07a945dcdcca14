"""Nights as they go wrong: the verdict is right all the same, or the refusal clear."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import ExitCode
from attnbench.history.groups import group_alarms
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason, Verdict
from attnbench.history.summary import summary_markdown, summary_text
from attnbench.history.verdict import Judgement, judge
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement, Status
from tests.history.fake import HOSTILE, row, table_of, timed

QUIET = [1e-3 * (1 + 0.004 * ((7 * i) % 5 - 2)) for i in range(12)]


def again(run: int, level: float, **more: Any) -> list[Measurement]:
    return [row(run, 100 + r, seconds=level * (1 + 0.002 * (r % 3 - 1)), **more) for r in range(10)]


def judged(rows: list[Measurement], **options: Any) -> Judgement:
    return judge(table_of(rows), **options)


def test_a_clock_that_was_wrong_for_one_night_moves_that_night_only() -> None:
    """A run stamped a year ahead is the newest; one judged by name is judged by those before."""
    rows = timed([*QUIET, 1.5e-3]) + again(12, 1.5e-3)
    stray = [
        replace(r, run_id="20271114T020000Z-aaaaaa", started_at=r.started_at + timedelta(days=365))
        for r in timed(QUIET[:1])
    ]
    found = judged(rows + stray, subject_run=row(12).run_id)
    assert found.verdicts[0].reasons[0] is Reason.CONFIRMED
    assert judged(rows + stray).run.run_id == stray[0].run_id


def test_commits_out_of_order_are_judged_in_the_order_they_were_measured() -> None:
    rows = [
        replace(r, commit_time=r.commit_time - timedelta(days=3 * i % 17))
        for i, r in enumerate(timed([*QUIET, 1.5e-3]) + again(12, 1.5e-3))
        if r.commit_time is not None
    ]
    (found,) = judged(rows).verdicts
    assert found.reasons[0] is Reason.CONFIRMED


def test_a_rebased_history_keeps_its_series() -> None:
    """Every commit has another name than it had: the point is the same, so is its past."""
    rows = timed([*QUIET, 1.5e-3]) + again(12, 1.5e-3)
    rebased = [replace(r, commit=r.commit[::-1]) for r in rows[:18]] + rows[18:]
    (found,) = judged(rebased).verdicts
    assert found.reasons[0] is Reason.CONFIRMED
    assert found.baseline_runs == 10


def test_a_renamed_backend_is_new_and_the_old_name_is_missed() -> None:
    old = timed(QUIET, backend="CPU_ATTN")
    new = timed([1.5e-3], 12, backend="CPU_ATTENTION")
    found = judged(old + new)
    (verdict,) = found.verdicts
    assert verdict.reasons[0] is Reason.NO_BASELINE
    assert [title.split()[0] for title in found.dropped] == ["CPU_ATTN"]
    assert "CPU_ATTN" in summary_text(found)


def test_two_nights_at_once_are_two_runs() -> None:
    """Of two runs that started together one is judged, and the other is not lost."""
    rows = timed([*QUIET, 1e-3]) + again(12, 1e-3)
    twin = [replace(r, run_id=r.run_id[:-6] + "ffffff") for r in timed([*QUIET, 1.5e-3])[-3:]]
    found = judged(rows + twin)
    assert found.run.run_id.endswith("ffffff")
    assert found.verdicts[0].reasons[0] is Reason.NOT_CONFIRMED_YET
    assert judged(rows + twin, subject_run=row(12).run_id).exit_code is ExitCode.OK


def test_a_night_told_twice_changes_nothing(tmp_path: Path) -> None:
    """The same rows in a second file of the same run id: refused or read once, never doubled."""
    rows = timed([*QUIET, 1.5e-3]) + again(12, 1.5e-3)
    folder = filled(tmp_path, rows)
    before = judge(Panel.of(folder))
    newest = tmp_path / "runs" / f"{row(12).run_id}.parquet"
    (newest.parent / f"copy-{newest.name}").write_bytes(newest.read_bytes())
    after = judge(Panel.of(ResultsFolder(tmp_path)))
    assert [(v.series.title, v.reasons) for v in after.verdicts] == [
        (v.series.title, v.reasons) for v in before.verdicts
    ]


def test_a_half_written_night_is_incomplete_and_judged_as_far_as_it_is() -> None:
    rows = timed([*QUIET, 1e-3]) + timed([*QUIET], backend="TORCH_SDPA")
    planned = {r.point_id for r in rows}
    found = judged(rows, planned=planned)
    assert len(found.missing) == 1
    assert found.exit_code is ExitCode.INCOMPLETE
    assert "go on: attnbench nightly --resume last" in summary_text(found)


@pytest.mark.parametrize("nights", [1, 2, 3])
def test_a_series_of_few_points_raises_no_alarm_by_itself(nights: int) -> None:
    found = judged(timed([1e-3] * nights))
    assert found.verdict is Verdict.UNCHANGED
    assert found.exit_code is ExitCode.OK


def test_a_constant_series_raises_no_alarm_until_it_moves() -> None:
    same = [row(i, r, seconds=(1e-3,) * 5) for i in range(20) for r in range(3)]
    assert judged(same).exit_code is ExitCode.OK
    moved = same[:-3] + [row(19, r, seconds=(1.5e-3,) * 5) for r in range(3)]
    assert judged(moved).verdicts[0].is_flagged


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_none_is_never_stored(tmp_path: Path, bad: float) -> None:
    first = row(0)
    with (
        ResultsFolder(tmp_path).open_run(
            RunHeader(run_id=first.run_id, started_at=first.started_at)
        ) as run,
        pytest.raises(ValueError, match="seconds above zero"),
    ):
        run.append(replace(first, samples=(1e-3, bad)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_stored_time_that_is_none_is_an_error_and_no_level(bad: float) -> None:
    """A file from elsewhere may have one: neither a quiet night nor a crash."""
    broken = [row(12, r, seconds=(bad,) * 5) for r in range(3)]
    tonight = judged([*timed(QUIET), *broken])
    assert tonight.verdicts[0].verdict is Verdict.REGRESSION
    assert tonight.verdicts[0].subject.status is Status.ERROR
    past = judged([*timed(QUIET), *broken, *timed([1e-3], 13)])
    assert past.verdicts[0].verdict is Verdict.UNCHANGED
    assert past.verdicts[0].baseline_runs == 10


def test_another_driver_is_named_beside_the_verdict() -> None:
    rows = [replace(r, driver_version="550.1") for r in timed(QUIET)]
    rows += [replace(r, driver_version="560.2") for r in timed([1.5e-3], 12) + again(12, 1.5e-3)]
    found = judged(rows)
    assert found.verdicts[0].reasons == (
        Reason.CONFIRMED,
        Reason.SLOWER_THAN_FLOOR,
        Reason.ENVIRONMENT_CHANGED,
    )
    assert "driver 550.1 -> 560.2" in summary_text(found)


def test_hostile_words_stay_words() -> None:
    bad = "\x1b[31m" + HOSTILE + "\n| a | b |"
    rows = [
        replace(r, commit_subject=bad, hostname=bad, device_name=bad, suite=bad)
        for r in timed([*QUIET, 1.5e-3]) + again(12, 1.5e-3)
    ]
    lost = [replace(r, status="CRASH", samples=(), reasons=(bad,)) for r in rows[-13:-10]]
    for found in (judged(rows), judged(rows[:-13] + lost)):
        text, markdown = summary_text(found), summary_markdown(found)
        assert "\x1b" not in text
        assert "<img" not in markdown
        assert all(line.startswith(("|", "#")) for line in markdown.splitlines() if line)


def test_ten_thousand_alarms_at_once_are_a_handful_of_lines() -> None:
    words = [f"{n}q1s{m}k dtype=fp32" for n in range(2, 27) for m in range(1, 9)]
    rows = []
    for word in words:
        for backend in ("CPU_ATTN", "TORCH_SDPA"):
            point: dict[str, Any] = {"backend": backend, "workload": word}
            rows += [row(i, seconds=level, **point) for i, level in enumerate([*QUIET, 1.5e-3])]
            rows += again(12, 1.5e-3, **point)
    found = judged(rows)
    assert len(found.of(Verdict.REGRESSION)) == 2 * len(words)
    (group,) = group_alarms(found.verdicts)
    assert group.title == "everything on cpu-xeon-2c"
    assert len(summary_text(found).splitlines()) <= 10


def filled(path: Path, rows: list[Measurement]) -> ResultsFolder:
    folder = ResultsFolder(path)
    for run_id in dict.fromkeys(r.run_id for r in rows):
        own = [r for r in rows if r.run_id == run_id]
        with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as run:
            for measured in own:
                run.append(measured)
            run.seal()
    return folder
