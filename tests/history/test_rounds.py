"""Which points a night measures again, and what times of the build before may change."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attnbench.history.panel import Panel
from attnbench.history.rounds import begun_points, given_up, points_to_confirm
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.runs import runs_of
from attnbench.history.series_rows import series_of
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.summary import undecided_advice
from attnbench.history.verdict import Judgement, judge
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement, point_id
from attnbench.workload import Workload
from tests.history.fake import row, table_of, timed

BESIDE = VerdictSettings(has_reference=True)
NIGHTS = 6


def slow_night(backend: str, workloads: list[str], factor: float = 1.4) -> list[Measurement]:
    """Six quiet nights, and one on which every workload is slower, each by a bit more."""
    rows: list[Measurement] = []
    for number, workload in enumerate(workloads):
        slow = factor * (1 + 0.01 * number)
        levels = [1e-3] * NIGHTS + [1e-3 * slow]
        rows += timed(levels, backend=backend, workload=workload, timer="event")
    return rows


def batches(count: int, phase: str = "1") -> list[str]:
    return [f"{n + 1}q{phase}s1k dtype=fp32" for n in range(count)]


def an_id(batch: str, backend: str) -> str:
    return point_id(Workload.parse(f"{batch} dtype=fp32").text, backend, "")


def night_of(rows: list[Measurement]) -> Judgement:
    return judge(table_of(rows), settings=BESIDE)


def test_every_group_is_there_with_its_worst() -> None:
    rows = slow_night("CPU_ATTN", batches(12), factor=3.0)
    rows += slow_night("TORCH_SDPA", batches(3), factor=1.2)
    rows += slow_night("TORCH_SDPA", batches(1, "16"), factor=1.1)
    found = night_of(rows)
    assert len(found.flagged_points()) == 16
    backend_of = {v.series.key.point_id: v.series.identity["backend"] for v in found.verdicts}
    chosen = points_to_confirm(found, (), 7)
    assert Counter(backend_of[p] for p in chosen) == {"CPU_ATTN": 3, "TORCH_SDPA": 4}
    assert chosen[0] == an_id("12q1s1k", "CPU_ATTN")  # the worst of all first
    assert an_id("1q16s1k", "TORCH_SDPA") in chosen[:3]
    assert set(points_to_confirm(found, (), 200)) == set(found.flagged_points())
    assert points_to_confirm(found, (), 7) == chosen


def test_what_was_begun_goes_on_and_counts() -> None:
    rows = slow_night("CPU_ATTN", batches(5))
    text = batches(5)[0]
    rows.append(row(NIGHTS, 100, workload=text, seconds=1.4e-3, timer="event"))
    found = night_of(rows)
    panel = Panel.of_table(table_of(rows))
    begun = begun_points(panel, found.run.run_id)
    assert begun == [an_id("1q1s1k", "CPU_ATTN")]
    chosen = points_to_confirm(found, begun, 3)
    assert (len(chosen), chosen[0]) == (3, begun[0])
    assert points_to_confirm(found, begun, 1) == begun


def test_ten_thousand_alarms_at_once_are_cut_to_what_was_asked_for() -> None:
    (one,) = night_of(slow_night("CPU_ATTN", batches(1))).verdicts
    many = [_another(one, number) for number in range(10_000)]
    found = Judgement(
        run=night_of(slow_night("CPU_ATTN", batches(1))).run,
        previous=None,
        environment=None,
        verdicts=tuple(many),
    )
    chosen = points_to_confirm(found, (), 200)
    assert len(set(chosen)) == 200
    assert Counter(int(point) % 7 for point in chosen).most_common()[-1][1] >= 28


def _another(one: SeriesVerdict, number: int) -> SeriesVerdict:
    identity = {**one.series.identity, "backend": f"B{number % 7}"}
    key = one.series.key._replace(point_id=str(number))
    return replace(one, series=replace(one.series, key=key, identity=identity))


def beside(
    again: list[float], other: list[float], nights: int = NIGHTS, workload: str = "4q1s4k"
) -> list[Measurement]:
    """A night 40 % slower than those before, and its second look."""
    text = f"{workload} dtype=fp32"
    rows = timed([1e-3] * nights + [1.4e-3], workload=text, timer="event")
    for first, values in ((100, again), (200, other)):
        rows += [
            row(nights, first + r, workload=text, seconds=s, timer="event", commit="before")
            for r, s in enumerate(values)
        ]
    return rows


FAST = [1e-3 * (1 + 0.001 * r) for r in range(10)]
SLOW = [1.4e-3 * (1 + 0.001 * r) for r in range(10)]


@pytest.mark.parametrize("nights", [1, 2, NIGHTS])
def test_the_build_before_has_the_say_in_short_histories_too(nights: int) -> None:
    for other, verdict, reason in (
        (FAST, Verdict.REGRESSION, Reason.CONFIRMED),
        (SLOW, Verdict.UNCHANGED, Reason.NOT_CONFIRMED),
        (SLOW[:4], Verdict.REGRESSION, Reason.CONFIRMED),  # in less than half of the rounds
    ):
        (found,) = night_of(beside(SLOW, other, nights)).verdicts
        assert (found.verdict, found.reasons[0]) == (verdict, reason), (nights, other)
        assert bool(found.note) == (len(other) < 5)


def test_the_build_before_is_in_nothing_but_references() -> None:
    rows = beside(SLOW, FAST)
    late = [r for r in rows if r.replicate >= 200]
    (value,) = [s.newest for s in series_of(table_of(rows))]
    (alone,) = [s.newest for s in series_of(table_of([r for r in rows if r not in late]))]
    assert value.references == pytest.approx(FAST)
    assert replace(value, references=()) == alone
    assert runs_of(table_of(rows)) == runs_of(table_of([r for r in rows if r not in late]))
    # Alone in a run it makes neither a run nor a value.
    only = [*timed([1e-3]), row(1, 200), row(1, 201)]
    assert len(runs_of(table_of(only))) == len(series_of(table_of(only))[0].values) == 1
    assert Panel.of_table(table_of(only)).num_runs == 1


def test_a_crash_of_the_build_before_is_not_the_subjects() -> None:
    rows = beside(SLOW, [])
    crash = row(
        NIGHTS, 200, workload="4q1s4k dtype=fp32", status="CRASH", timer="event", seconds=None
    )
    (found,) = night_of([*rows, crash]).verdicts
    assert (str(found.subject.status), found.reasons[0]) == ("OK", Reason.CONFIRMED)
    assert night_of([*rows, crash]).failures == ()


def test_given_up_is_what_shows_nothing_in_its_first_four() -> None:
    texts = {"4q1s4k": (FAST, FAST), "8q1s4k": (SLOW, FAST), "2q1s4k": (FAST[:3], FAST[:3])}
    rows = [r for text, (a, b) in texts.items() for r in beside(a, b, workload=text)]
    # What came after four rounds changes nothing: a night that goes on gives up the same.
    rows += beside([*FAST[:4], *SLOW[:6]], FAST, workload="16q1s4k")
    panel = Panel.of_table(table_of(rows))
    run_id = panel.runs[-1].run_id
    ids = {text: an_id(text, "CPU_ATTN") for text in (*texts, "16q1s4k")}
    found = given_up(panel, run_id, set(ids.values()), BESIDE)
    assert found == {ids["4q1s4k"], ids["16q1s4k"]}
    assert given_up(panel, run_id, {ids["8q1s4k"]}, BESIDE) == frozenset()


def test_a_folder_shows_rows_of_the_build_before_to_who_asks_for_them(tmp_path: Path) -> None:
    rows = beside(SLOW, FAST)
    folder = ResultsFolder(tmp_path / "results")
    for run_id in dict.fromkeys(r.run_id for r in rows):
        own = [r for r in rows if r.run_id == run_id]
        with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as run:
            for one in own:
                run.append(one)
    every = folder.table(["replicate"], references=True).num_rows
    assert every == len(rows)
    assert folder.table(["point_id"]).num_rows == len(rows) - 10
    newest = {"run_id": rows[-1].run_id}
    assert folder.table(["point_id"], newest).num_rows == 13
    assert folder.export(tmp_path / "all.csv") == every
    (value,) = [s.newest for s in Panel.of(folder).all_series([0])]
    assert value.references == pytest.approx(FAST)


def followed(
    before: int, nights: int, builds: int, replicates: int = 2, size: float = 1.1
) -> list[Measurement]:
    """A step (of 10 %) after `before` nights; each night after it is measured again to the end.

    `builds`: 2 where the build before takes turns. Nights differ by 0.3 %, processes by 0.1 %.
    """
    random = np.random.default_rng(7)
    rows = []
    for run in range(before + nights):
        step = size if run >= before else 1.0
        night = 1e-3 * float(np.exp(random.normal(0, 0.003)))
        for number in range(replicates):
            seconds = night * step * float(np.exp(random.normal(0, 0.001)))
            rows.append(row(run, number, seconds=seconds, timer="event"))
        for number in range(10 if run >= before else 0):
            new, old = (night * float(np.exp(random.normal(0, 0.001))) for _ in range(2))
            rows.append(row(run, 100 + number, seconds=new * step, timer="event"))
            if builds == 2:
                rows.append(row(run, 200 + number, seconds=old, timer="event", commit="old"))
    return rows


@pytest.mark.parametrize("builds", [1, 2])
@pytest.mark.parametrize(("before", "last"), [(3, 5), (5, 7), (40, 8)])
def test_a_regression_nobody_mended_stays_one_and_begins_where_it_began(
    before: int, last: int, builds: int
) -> None:
    for nights in range(1, last + 1):
        rows = followed(before, nights, builds)
        (verdict,) = judge(table_of(rows)).verdicts
        assert verdict.verdict is Verdict.REGRESSION, (nights, verdict)
        assert verdict.since is not None
        assert verdict.since.run_id == row(before).run_id, nights
        assert verdict.estimate is not None
        assert verdict.estimate.ratio == pytest.approx(1.1, abs=0.01)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [
        (1.005, Verdict.UNCHANGED),
        (1.022, Verdict.UNDECIDED),  # picked with a p between 0.5 and 5 %
        (1.026, Verdict.UNDECIDED),
        (1.3, Verdict.REGRESSION),
    ],
)
def test_a_night_judged_later_is_judged_as_it_was(factor: float, verdict: Verdict) -> None:
    # Whether the build before was at hand is known on the night only; that it missed most rounds
    # is stored.
    rows = timed([1e-3] * 6 + [1e-3 * factor], timer="event")
    for number in range(10):
        rows.append(row(6, 100 + number, seconds=1e-3 * factor, timer="event"))
    for number in range(4):
        rows.append(row(6, 200 + number, seconds=1e-3, timer="event", commit="old"))
    (then,) = judge(table_of(rows), settings=BESIDE).verdicts
    (later,) = judge(table_of(rows)).verdicts
    assert then.verdict is verdict
    assert (then.verdict, then.reasons, then.estimate) == (
        later.verdict,
        later.reasons,
        later.estimate,
    )


@pytest.mark.parametrize("other", [FAST[:1], FAST])
def test_what_a_night_left_waiting_is_waiting_when_it_is_judged_later(other: list[float]) -> None:
    """Picked with a p between 0.5 and 5 %, and beyond what may be measured again."""
    rows = beside(SLOW, other)
    rows += timed([1e-3] * NIGHTS + [1.022e-3], workload="8q1s4k dtype=fp32", timer="event")
    then = {v.series.id: v for v in judge(table_of(rows), settings=BESIDE).verdicts}
    later = {v.series.id: v for v in judge(table_of(rows)).verdicts}
    assert {(v.verdict, v.reasons[0]) for v in then.values()} == {
        (Verdict.REGRESSION, Reason.CONFIRMED),
        (Verdict.UNDECIDED, Reason.NOT_CONFIRMED_YET),
    }
    assert later == then
    (alone,) = [
        v
        for v in judge(table_of([r for r in rows if r.replicate < 200])).verdicts
        if not v.subject.confirmations
    ]
    assert (alone.verdict, alone.is_flagged) == (Verdict.UNCHANGED, False)


def test_a_step_among_the_past_changes_is_still_confirmed_beside_the_build_before() -> None:
    """The series' own past is too restless to pick it by; two builds by turns are not."""
    for nights in (5, 6):
        # Among twenty others a p of a few percent is chance; each of them is a little faster.
        others = [
            one
            for n in range(1, 21)
            for one in timed(
                [*([1e-3] * (11 + nights)), 0.9995e-3],
                workload=f"{n}q1s9k dtype=fp32",
                timer="event",
            )
        ]
        found = judge(table_of([*followed(12, nights, builds=2), *others])).verdicts
        (verdict,) = [one for one in found if one.subject.confirmations]
        assert verdict.verdict is Verdict.REGRESSION
        assert verdict.reasons[:2] == (Reason.CONFIRMED, Reason.INTERVAL_TOO_WIDE)
        assert verdict.since is not None
        assert verdict.since.run_id == row(12).run_id
        # The new build alone shares the night with what made it look slower.
        (alone,) = judge(table_of(followed(12, nights, builds=1))).verdicts
        assert alone.verdict is Verdict.UNDECIDED
        assert "see its page" in undecided_advice(alone)


@pytest.mark.parametrize("before", [6, 12])
def test_after_a_step_that_stays_a_series_is_not_undecided_for_weeks(before: int) -> None:
    for nights in range(8, 20, 3):
        rows = [r for r in followed(before, nights, 2, size=1.3) if r.replicate < 100]
        (verdict,) = judge(table_of(rows)).verdicts
        assert (verdict.verdict, verdict.reasons[0]) == (Verdict.UNCHANGED, Reason.WITHIN_FLOOR)


def test_a_restless_level_is_undecided_as_before() -> None:
    jumping = [1e-3, 1.6e-3, 0.7e-3, 1.5e-3, 0.8e-3, 1.4e-3] * 3
    (verdict,) = judge(table_of(timed([*jumping, 1.1e-3], timer="event"))).verdicts
    assert (verdict.verdict, verdict.reasons[0]) == (
        Verdict.UNDECIDED,
        Reason.INTERVAL_TOO_WIDE,
    )


def test_what_is_picked_for_the_build_before_makes_no_alarm_harder_without_it() -> None:
    """Twenty series with a p between 0.5 and 5 %, and one that ten fresh processes confirm."""
    rows = beside(SLOW, [])
    for batch in range(2, 22):
        levels = [1e-3] * NIGHTS + [1.022e-3]
        rows += timed(levels, workload=f"{batch}q1s2k dtype=fp32", timer="event")
    rows = [
        r
        if r.replicate < 100
        else replace(r, samples=tuple(s * (0.6 if r.replicate == 100 else 1.0) for s in r.samples))
        for r in rows
    ]
    found = {v.verdict for v in judge(table_of(rows)).verdicts}
    assert found == {Verdict.REGRESSION, Verdict.UNCHANGED}
