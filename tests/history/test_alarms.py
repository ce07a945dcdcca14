"""Alarms with what people accepted of them: exit code, expiry, creeping levels, stale series."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from attnbench.errors import ExitCode
from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarm_lines import alarm_lines
from attnbench.history.alarms import Alarms, alarms_of
from attnbench.history.panel import Panel
from attnbench.history.summary import summary_markdown, summary_text
from attnbench.history.verdict import Judgement, judge
from attnbench.store.record import Measurement, Status
from tests.history.fake import HOSTILE, row, table_of, timed

TEXT = "16q1s4k dtype=fp32"
OTHER = "4q1s4k dtype=fp32"


def entry(kind: str = "slower", since: int = 10, **more: Any) -> Acknowledgement:
    values: dict[str, Any] = {
        "kind": AlarmKind(kind),
        "patterns": {"backend": "CPU_ATTN"},
        "since": row(since).run_id,
        "reason": "known",
        "by": "A. Person",
        "expires": date(2026, 12, 31),
        "place": "acknowledged.toml, line 3",
        **more,
    }
    return Acknowledgement(**values)


def night(
    rows: list[Measurement], *entries: Acknowledgement, **more: Any
) -> tuple[Judgement, Alarms]:
    """The newest run judged, with its alarms in it."""
    panel = Panel.of_table(table_of(rows))
    keywords = {name: more.pop(name) for name in ("planned",) if name in more}
    judgement = judge(panel, more.pop("run", None), **keywords)
    found = alarms_of(judgement, panel, entries, **more)
    return replace(judgement, alarms=found), found


def slower(level: float = 1.3, runs: int = 10, **more: Any) -> list[Measurement]:
    """Equal runs, then one that is slower and confirmed."""
    rows = timed([1e-3] * runs, workload=TEXT, **more)
    rows += timed([1e-3 * level], runs, workload=TEXT, **more)
    rows += [row(runs, 100 + r, workload=TEXT, seconds=1e-3 * level, **more) for r in range(10)]
    return rows


def test_without_entries_nothing_changes() -> None:
    rows = slower() + [
        row(r, 0, workload=OTHER, status="OOM" if r > 8 else "OK") for r in range(11)
    ]
    plain = judge(table_of(rows))
    judgement, found = night(rows)
    assert plain.exit_code is judgement.exit_code is ExitCode.REGRESSION
    assert {a.kind for a in found.alarms} == {AlarmKind.SLOWER, AlarmKind.STATUS}
    assert summary_text(plain) == summary_text(judgement)


def test_an_accepted_slow_down_is_shown_and_does_not_fail_the_night() -> None:
    judgement, found = night(slower(), entry(up_to=1.35, reason=HOSTILE))
    assert judgement.exit_code is ExitCode.OK
    assert found.warnings == ()
    (known,) = found.known
    assert known.ratio == pytest.approx(1.3)
    text = summary_text(judgement)
    assert "UNCHANGED: 1 known     exit 0" in text
    (line,) = [line for line in text.splitlines() if line.startswith("known")]
    for part in ("+30.0 %", row(10).run_id, "A. Person", "2026-12-31", "up to +35.0 %"):
        assert part in line
    assert "slower" not in text
    assert "<img" not in summary_markdown(judgement)


def test_what_one_entry_is_about_is_one_line() -> None:
    rows = [
        one
        for n in range(1, 6)
        for one in slower(1.2 + n / 100, backend=f"B{n}", point_id=f"{n:016x}")
    ]
    about_all = replace(entry(up_to=1.4), patterns={"workload": "*"})
    lines = alarm_lines(night(rows, about_all)[1], 3)
    (line,) = lines
    assert line[1].startswith(f"B5 {TEXT} +25.0 % and 4 more   known since ")
    lines = alarm_lines(night(rows, replace(about_all, up_to=1.225))[1], 3)
    assert [label for label, _, _ in lines] == ["refused", "known"]
    assert " and 2 more   +25.0 %, and +22.5 % was accepted" in lines[0][1]
    assert f"B2 {TEXT} +22.0 % and 1 more   known" in lines[1][1]


def test_all_that_is_wrong_with_an_entry_is_said_at_once() -> None:
    _, found = night(slower(1.3), entry(up_to=1.1, expires=date(2026, 11, 10)))
    ((_, why),) = found.alarms[0].refused
    assert why == "+30.0 %, and +10.0 % was accepted; expired on 2026-11-10"


def test_worse_than_accepted_alarms() -> None:
    judgement, found = night(slower(), entry(up_to=1.2))
    assert judgement.exit_code is ExitCode.REGRESSION
    text = summary_text(judgement)
    assert "+30.0 %, and +20.0 % was accepted; was accepted by A. Person" in text
    assert "acknowledged.toml, line 3" in text
    assert "\nslower" in text
    assert found.known == ()


def test_the_last_day_counts_and_the_next_alarms_again() -> None:
    day = row(10).started_at.date()
    assert night(slower(), entry(up_to=1.35, expires=day))[0].exit_code is ExitCode.OK
    judgement, _ = night(slower(), entry(up_to=1.35, expires=date.fromordinal(day.toordinal() - 1)))
    assert judgement.exit_code is ExitCode.REGRESSION
    assert "expired on 2026-11-18" in summary_text(judgement)
    again = entry(up_to=1.35)
    both = night(slower(), entry(up_to=1.35, expires=date(2026, 1, 1)), again)[0]
    assert both.exit_code is ExitCode.OK


def test_a_second_slow_down_is_not_accepted_by_the_first_ones_entry() -> None:
    """The level has followed the first; tonight alone is within what was accepted."""
    levels = [1e-3] * 10 + [1.1e-3] * 10 + [1.1e-3 * 1.3]
    rows = timed(levels, workload=TEXT)
    rows += [row(20, 100 + r, workload=TEXT, seconds=1.1e-3 * 1.3) for r in range(10)]
    judgement, found = night(rows, entry(up_to=1.35, since=10))
    (alarm,) = found.alarms
    assert alarm.verdict is not None
    assert alarm.verdict.estimate is not None
    assert alarm.verdict.estimate.ratio == pytest.approx(1.3)
    assert alarm.ratio == pytest.approx(1.43)
    assert judgement.exit_code is ExitCode.REGRESSION
    assert night(rows, entry(up_to=1.45, since=10))[0].exit_code is ExitCode.OK


def test_an_entry_of_a_later_run_says_nothing_of_an_earlier_one() -> None:
    rows = slower() + timed([1e-3], 11, workload=TEXT)
    own = entry(up_to=1.35, since=11)
    assert night(rows, own, run=row(10).run_id)[0].exit_code is ExitCode.REGRESSION


@pytest.mark.parametrize("since", [row(10).run_id[:15], row(10).commit[:7], "2026-11-19"])
def test_since_is_a_run_a_commit_or_a_day(since: str) -> None:
    own = replace(entry(up_to=1.35), since=since)
    assert night(slower(), own)[0].exit_code is ExitCode.OK


def test_a_since_that_names_nothing_accepts_nothing_and_is_named() -> None:
    judgement, found = night(slower(), replace(entry(up_to=1.35), since="deadbeef"))
    assert judgement.exit_code is ExitCode.REGRESSION
    (warning,) = found.warnings
    assert "'deadbeef' names no stored run" in warning
    assert warning in summary_text(judgement)


def test_an_entry_that_matches_nothing_is_named() -> None:
    nobody = entry(up_to=1.35, patterns={"backend": "NOBODY"})
    over = entry("stale")
    elsewhere = entry(up_to=1.35, patterns={"backend": "CPU_ATTN", "workload": OTHER})
    rows = slower() + timed([1e-3] * 3, workload=OTHER)  # not in the newest run
    _, found = night(rows, nobody, over, elsewhere)
    assert found.warnings == (
        "acknowledged.toml, line 3: matches no series; mend or remove it",
        "acknowledged.toml, line 3: matches no alarm of this run; remove it if that is over",
    )


def test_another_kind_accepts_nothing() -> None:
    assert night(slower(), entry("stale"))[0].exit_code is ExitCode.REGRESSION


def lost(status: str) -> list[Measurement]:
    rows = timed([1e-3] * 10, workload=TEXT)
    return rows + [row(10, r, workload=TEXT, status=status) for r in range(3)]


def test_a_lost_support_is_accepted_by_its_status() -> None:
    unsupported = entry("status", statuses=(Status.UNSUPPORTED,))
    judgement, _ = night(lost("UNSUPPORTED"), unsupported)
    assert judgement.exit_code is ExitCode.OK
    assert "changed" not in summary_text(judgement)
    judgement, _ = night(lost("CRASH"), unsupported)
    assert judgement.exit_code is ExitCode.REGRESSION
    assert "CRASH, and UNSUPPORTED was accepted" in summary_text(judgement)
    crash = entry("status", statuses=(Status.CRASH,))
    judgement, _ = night(lost("CRASH"), crash)
    assert (judgement.exit_code, judgement.incomplete) == (ExitCode.OK, False)
    assert "failed" not in summary_text(judgement)


def test_a_crash_that_stays_is_incomplete_until_it_is_accepted() -> None:
    rows = [row(r, 0, workload=TEXT, status="CRASH") for r in range(11)]
    assert night(rows)[0].exit_code is ExitCode.INCOMPLETE
    crash = entry("status", statuses=(Status.CRASH,))
    assert night(rows, crash)[0].exit_code is ExitCode.OK
    mixed = [*rows, row(10, 1, workload=TEXT, status="INCORRECT")]
    assert night(mixed, crash)[0].exit_code is ExitCode.REGRESSION


def test_an_undecided_series_that_is_accepted_does_not_leave_the_night_open() -> None:
    rows = timed([1e-3] * 10 + [1.3e-3], workload=TEXT)  # looks slower, not measured again
    assert night(rows)[0].exit_code is ExitCode.UNDECIDED
    assert night(rows, entry(up_to=1.35))[0].exit_code is ExitCode.OK
    assert night(rows, entry(up_to=1.2))[0].exit_code is ExitCode.UNDECIDED


def test_a_missing_point_is_accepted_by_what_is_stored_of_it_or_by_the_plan() -> None:
    rows = timed([1e-3] * 11, workload=TEXT) + timed([1e-3] * 10, workload=OTHER)
    other = row(0, workload=OTHER).point_id
    planned = [rows[0].point_id, other, "f" * 16]
    points = {"f" * 16: {"workload": "q7", "backend": "NEW", "variant": "v"}}
    judgement, found = night(rows, planned=planned, points=points)
    assert judgement.exit_code is ExitCode.INCOMPLETE
    assert [a.title for a in found.alarms] == [f"CPU_ATTN {OTHER}", "NEW[v] q7"]
    own = entry("missing", patterns={"workload": OTHER, "phase": "decode"})
    new = entry("missing", patterns={"backend": "NEW", "device": "cpu-*"})
    judgement, _ = night(rows, own, planned=planned, points=points)
    assert judgement.exit_code is ExitCode.INCOMPLETE
    assert "1 planned points have no row" in summary_text(judgement)
    judgement, found = night(rows, own, new, planned=planned, points=points)
    assert judgement.exit_code is ExitCode.OK
    assert "planned points have no row" not in summary_text(judgement)
    assert len(found.known) == 2


def silent(nights: int, **more: Any) -> list[Measurement]:
    """One backend stops after three nights; another goes on for `nights` more."""
    gone = timed([1e-3] * 3, replicates=1, backend="FLEX_ATTENTION", workload=TEXT, **more)
    stays = timed([1e-3] * (3 + nights), replicates=1, workload=TEXT, **more)
    return gone + stays


@pytest.mark.parametrize(
    ("nights", "is_stale"), [(6, False), (7, True), (27, True), (28, False), (40, False)]
)
def test_a_backend_that_fell_silent(nights: int, is_stale: bool) -> None:
    judgement, found = night(silent(nights))
    assert bool(found.of(AlarmKind.STALE)) is is_stale
    assert judgement.exit_code is (ExitCode.INCOMPLETE if is_stale else ExitCode.OK)
    if is_stale:
        text = summary_text(judgement)
        assert f"FLEX_ATTENTION {TEXT}: not measured for {nights} nights" in text
        assert row(2).run_id in text
        accepted = entry("stale", since=3, patterns={"backend": "FLEX_*"})
        assert night(silent(nights), accepted)[0].exit_code is ExitCode.OK


def test_fewer_nights_by_the_setting() -> None:
    assert night(silent(3), stale_nights=3)[1].of(AlarmKind.STALE)
    assert not night(silent(2), stale_nights=3)[1].of(AlarmKind.STALE)


def test_what_is_not_stale() -> None:
    # A workload that left the suite for everybody.
    rows = silent(0) + timed([1e-3] * 12, replicates=1, workload=OTHER)
    assert not night(rows)[1].alarms
    # The backend goes on there as another variant.
    rows = silent(9) + timed([1e-3] * 9, 3, 1, backend="FLEX_ATTENTION", workload=TEXT, variant="b")
    assert not night(rows)[1].alarms
    # Another device went on.
    rows = silent(0) + timed([1e-3] * 9, 3, 1, workload=TEXT, device_class="h200")
    assert not night(rows)[1].alarms
    # Runs by hand, of no suite.
    rows = silent(0) + timed([1e-3] * 9, 3, 1, workload=TEXT, suite="")
    assert not night(rows)[1].alarms
    # Many runs of one day.
    last = row(3).started_at
    rows = silent(0)
    for number in range(3, 12):
        rows += [
            replace(one, started_at=last.replace(hour=number))
            for one in timed([1e-3], number, 1, workload=TEXT)
        ]
    assert not night(rows)[1].of(AlarmKind.STALE)


def test_ten_thousand_alarms_and_fifty_entries() -> None:
    """What decides is arrays and text patterns, not series' values."""
    import time

    workloads = [f"{n}q1s{64 + n}" for n in range(2, 102)]
    rows = [
        row(run, 0, workload=text, backend=f"B{b}", status="CRASH" if run == 4 else "OK")
        for run in range(5)
        for text in workloads
        for b in range(10)
    ]
    entries = [
        entry("status", 4, patterns={"backend": f"B{n % 10}", "workload": f"{n}q1*"},
              statuses=(Status.CRASH,))
        for n in range(2, 52)
    ]  # fmt: skip
    panel = Panel.of_table(table_of(rows))
    judgement = judge(panel)
    started = time.perf_counter()
    found = alarms_of(judgement, panel, entries)
    assert time.perf_counter() - started < 5
    assert (len(found.alarms), len(found.known)) == (1000, 50)
    assert found.exit_code is ExitCode.REGRESSION
