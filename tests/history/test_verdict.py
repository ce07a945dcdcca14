"""What is said of a run: every verdict and reason reached from stored rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from attnbench.errors import DataError, ExitCode
from attnbench.history.confirm import ROUNDS
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.runs import runs_of
from attnbench.history.verdict import Judgement, judge
from attnbench.store.record import Measurement, point_id
from tests.history.fake import NEW_STACK, OLD_STACK, history, row, table_of, timed

Rows = list[Measurement]


def again(run: int, level: float, **more: Any) -> Rows:
    return [
        row(run, 100 + r, seconds=level * (1 + 0.01 * (r % 3 - 1)), **more) for r in range(ROUNDS)
    ]


def judged(rows: Rows, **options: Any) -> Judgement:
    return judge(table_of(rows), **options)


def statuses(*words: str) -> Rows:
    return [
        row(i, status=word, reasons=() if word == "OK" else ("why",))
        for i, word in enumerate(words)
    ]


FLAT = [1e-3] * 6
SCENARIOS: dict[Reason, Callable[[], tuple[Rows, Verdict]]] = {
    Reason.NO_BASELINE: lambda: (timed([1e-3]), Verdict.UNCHANGED),
    Reason.WITHIN_FLOOR: lambda: (timed([*FLAT, 1.04e-3]), Verdict.UNCHANGED),
    Reason.WITHIN_NOISE: lambda: (timed([*FLAT, 1.13e-3]), Verdict.UNCHANGED),
    Reason.FASTER_THAN_FLOOR: lambda: (timed([*FLAT, 0.6e-3]), Verdict.IMPROVEMENT),
    Reason.NOT_CONFIRMED_YET: lambda: (timed([*FLAT, 1.5e-3]), Verdict.UNDECIDED),
    Reason.CONFIRMED: lambda: (timed([*FLAT, 1.5e-3]) + again(6, 1.5e-3), Verdict.REGRESSION),
    Reason.NOT_CONFIRMED: lambda: (timed([*FLAT, 1.5e-3]) + again(6, 1e-3), Verdict.UNCHANGED),
    Reason.INTERVAL_TOO_WIDE: lambda: (
        timed([1e-3, 1.5e-3, 0.7e-3, 1.3e-3, 0.8e-3, 1.6e-3]),
        Verdict.UNDECIDED,
    ),
    Reason.TOO_FEW_REPLICATES: lambda: (timed([1e-3, 1e-3], replicates=1), Verdict.UNDECIDED),
    Reason.STATUS_CHANGED: lambda: (statuses("OK", "OK", "UNSUPPORTED"), Verdict.REGRESSION),
    Reason.STATUS_RECOVERED: lambda: (statuses("CRASH", "CRASH", "OK"), Verdict.IMPROVEMENT),
    Reason.STATUS_SAME: lambda: (statuses("UNSUPPORTED", "UNSUPPORTED"), Verdict.UNCHANGED),
    Reason.STATUS_UNSTABLE: lambda: (
        [*timed([1e-3, 1e-3]), row(1, 3, status="CRASH", reasons=("killed",))],
        Verdict.UNDECIDED,
    ),
    Reason.THROTTLED: lambda: (statuses("OK", "OK", "THROTTLED"), Verdict.INVALID),
    Reason.INCOMPARABLE_TIMER: lambda: (
        timed([1e-3], timer="event") + timed([1e-3], 1, timer="graph"),
        Verdict.INVALID,
    ),
    Reason.INCOMPARABLE_L2_STATE: lambda: (
        timed([1e-3], l2_state="cold") + timed([1e-3], 1, l2_state="hot"),
        Verdict.INVALID,
    ),
    Reason.INCOMPARABLE_EXECUTION: lambda: (
        timed([1e-3], execution="graph") + timed([1e-3], 1, execution="eager"),
        Verdict.INVALID,
    ),
    Reason.INCOMPARABLE_PROTOCOL_VERSION: lambda: (
        timed([1e-3], protocol_version=1) + timed([1e-3], 1, protocol_version=2),
        Verdict.INVALID,
    ),
}
#: Reached by other tests below: without confirmation, beside another reason, and in `compare`.
ELSEWHERE = {
    Reason.SLOWER_THAN_FLOOR,
    Reason.ENVIRONMENT_CHANGED,
    Reason.INCOMPARABLE_DEVICE_CLASS,
}


def test_every_reason_has_a_scenario() -> None:
    assert set(SCENARIOS) | ELSEWHERE == set(Reason)


@pytest.mark.parametrize("reason", SCENARIOS, ids=str)
def test_reason_is_reached(reason: Reason) -> None:
    rows, verdict = SCENARIOS[reason]()
    (found,) = judged(rows).verdicts
    assert (found.verdict, found.reasons[0]) == (verdict, reason)


def test_without_confirmation_one_look_is_enough() -> None:
    found = judged(timed([*FLAT, 1.5e-3]), require_confirmation=False)
    assert found.verdicts[0].reasons == (Reason.SLOWER_THAN_FLOOR,)
    assert found.exit_code is ExitCode.REGRESSION


def test_flagged_points_are_those_not_measured_again() -> None:
    slow = timed([*FLAT, 1.5e-3])
    steady = timed([*FLAT, 1e-3], backend="TORCH_SDPA")
    found = judged(slow + steady)
    assert found.flagged_points() == (point_id("4q1s4k dtype=fp32", "CPU_ATTN", ""),)
    assert found.exit_code is ExitCode.UNDECIDED
    confirmed = judged(slow + steady + again(6, 1.5e-3))
    assert confirmed.flagged_points() == ()
    assert confirmed.exit_code is ExitCode.REGRESSION


def test_a_suspicion_is_flagged_and_ends_with_a_second_look_within_the_floor() -> None:
    noisy = timed([1e-3, 1.5e-3, 0.7e-3, 1.3e-3, 0.8e-3, 1.6e-3])
    assert len(judged(noisy).flagged_points()) == 1
    (ended,) = judged(noisy + again(5, 1.0e-3)).verdicts
    assert (ended.verdict, ended.reasons) == (
        Verdict.UNCHANGED,
        (Reason.NOT_CONFIRMED, Reason.WITHIN_NOISE),
    )
    (still,) = judged(noisy + again(5, 1.6e-3)).verdicts
    assert (still.verdict, still.is_flagged) == (Verdict.UNDECIDED, False)


def test_the_second_look_gives_the_reported_ratio() -> None:
    (found,) = judged(timed([*FLAT, 1.6e-3]) + again(6, 1.5e-3)).verdicts
    assert found.estimate is not None
    assert found.estimate.ratio == pytest.approx(1.5, rel=1e-6)


def test_since_is_the_first_run_of_the_level() -> None:
    rows = timed([*FLAT, *FLAT, 1.5e-3, 1.5e-3, 1.5e-3]) + again(14, 1.5e-3)
    (found,) = judged(rows).verdicts
    assert found.verdict is Verdict.REGRESSION
    assert found.since is not None
    assert found.since.commit == row(12).commit


def test_a_lost_support_stays_a_regression_until_it_is_the_usual_state() -> None:
    lost = statuses(*["OK"] * 6, *["UNSUPPORTED"] * 3)
    (found,) = judged(lost).verdicts
    assert found.reasons[0] is Reason.STATUS_CHANGED
    assert found.since is not None
    assert found.since.commit == row(6).commit
    (later,) = judged(statuses(*["OK"] * 6, *["UNSUPPORTED"] * 8)).verdicts
    assert later.reasons[0] is Reason.STATUS_SAME


@pytest.mark.parametrize("bad", ["UNSUPPORTED", "INCORRECT", "CRASH", "OOM", "TIMEOUT", "ERROR"])
def test_every_kind_of_lost_support_is_a_regression(bad: str) -> None:
    found = judged(statuses("OK", bad))
    assert found.verdicts[0].reasons[0] is Reason.STATUS_CHANGED
    assert found.exit_code is ExitCode.REGRESSION
    assert found.incomplete == (bad != "UNSUPPORTED")


@pytest.mark.parametrize("before", [(), ("INCORRECT",), ("THROTTLED",)], ids=len)
def test_a_wrong_output_is_never_exit_0(before: tuple[str, ...]) -> None:
    found = judged(statuses(*before, "INCORRECT"))
    assert found.verdict is Verdict.UNCHANGED
    assert [v.subject.status for v in found.failures] == ["INCORRECT"]
    assert found.exit_code is ExitCode.INCOMPLETE


def test_a_wrong_output_of_a_metric_that_is_only_shown_fails_the_run_too() -> None:
    wrong = row(0, metric="kv_cache_write", status="INCORRECT", reasons=("wrong",))
    found = judged([*timed([1e-3]), wrong])
    assert [v.series.key.metric for v in found.verdicts] == ["attention"]
    assert [v.series.key.metric for v in found.failures] == ["kv_cache_write"]
    assert found.exit_code is ExitCode.INCOMPLETE
    # It is the series that worked before, though a failed row does not know its timer.
    before = row(0, metric="kv_cache_write")
    later = replace(wrong, run_id=row(1).run_id, started_at=row(1).started_at, timer="")
    (failure,) = judged([before, row(1), later]).failures
    assert failure.series.key.timer == "wall"


def test_a_first_night_that_throttled_is_invalid() -> None:
    found = judged(statuses("THROTTLED"))
    assert (found.verdict, found.exit_code) == (Verdict.INVALID, ExitCode.UNDECIDED)


def test_a_clean_commit_is_not_judged_by_a_tree_with_local_edits() -> None:
    clean, dirty = "a" * 40, "b" * 40 + "+dirty"

    def reason(*commits: str) -> Reason:
        rows = [
            measured
            for i, commit in enumerate(commits)
            for measured in timed([1e-3 if commit is clean else 3e-3], i, commit=commit)
        ]
        return judged(rows).verdicts[0].reasons[0]

    assert reason(dirty, clean) is Reason.NO_BASELINE
    assert reason(clean, dirty, dirty, clean) is Reason.WITHIN_FLOOR
    # The other way round is what a developer asks: did my edits make it slower?
    assert reason(clean, dirty) is Reason.NOT_CONFIRMED_YET
    assert reason(dirty, dirty) is Reason.WITHIN_FLOOR


def test_statuses_and_timers_of_a_tree_with_local_edits_do_not_count_either() -> None:
    dirty = "b" * 40 + "+dirty"
    worked = [row(0, commit=dirty), row(1, status="UNSUPPORTED", reasons=("no",))]
    assert judged(worked).verdicts[0].reasons[0] is Reason.NO_BASELINE
    other = timed([1e-3], timer="event", commit=dirty) + timed([1e-3], 1, timer="graph")
    assert judged(other).verdicts[0].reasons[0] is Reason.NO_BASELINE


def test_a_refusal_that_became_a_wrong_output_is_a_regression() -> None:
    assert judged(statuses("UNSUPPORTED", "INCORRECT")).exit_code is ExitCode.REGRESSION
    assert judged(statuses("INCORRECT", "UNSUPPORTED")).exit_code is ExitCode.OK


def test_one_wrong_replicate_among_right_ones_is_incorrect() -> None:
    rows = [*timed([1e-3, 1e-3]), row(1, 3, status="INCORRECT", reasons=("wrong",))]
    assert judged(rows).verdicts[0].reasons[0] is Reason.STATUS_CHANGED


def test_incomplete_runs_exit_4_unless_something_got_slower() -> None:
    failing = [row(0, status="ERROR", reasons=("boom",)), row(1, status="ERROR", reasons=("boom",))]
    assert judged(failing).exit_code is ExitCode.INCOMPLETE
    slow = timed([*FLAT, 1.5e-3], backend="TORCH_SDPA") + again(6, 1.5e-3, backend="TORCH_SDPA")
    errors = [row(i, status="ERROR", reasons=("boom",)) for i in (5, 6)]
    assert judged(errors + slow).exit_code is ExitCode.REGRESSION
    undecided = timed([*FLAT, 1.5e-3], backend="TORCH_SDPA")
    assert judged(errors + undecided).exit_code is ExitCode.INCOMPLETE


def test_planned_points_without_a_row_are_missing() -> None:
    here = row(0).point_id
    found = judged(timed([1e-3]), planned=[here, "feedfeedfeedfeed"])
    assert found.missing == ("feedfeedfeedfeed",)
    assert found.exit_code is ExitCode.INCOMPLETE
    assert judged(timed([1e-3]), planned=[here]).exit_code is ExitCode.OK


def test_points_that_were_not_planned_again_are_named() -> None:
    rows = timed([1e-3, 1e-3]) + timed([1e-3], backend="TORCH_SDPA")
    assert judged(rows).dropped == ("TORCH_SDPA 4q1s4k dtype=fp32",)
    # A run of another suite drops nothing.
    other = timed([1e-3], backend="TORCH_SDPA") + timed([1e-3], 1, suite="prefill")
    assert judged(other).dropped == ()


def test_a_shard_follows_the_run_that_measured_its_points() -> None:
    """Two nights in two shards each; the second night has other packages."""
    nights = (OLD_STACK, NEW_STACK)
    rows = [
        row(2 * night + shard, workload=f"{shard + 1}q1s4k dtype=fp32", stack=stack)
        for night, stack in enumerate(nights)
        for shard in range(2)
    ]
    table = table_of(rows)
    runs = [run.run_id for run in runs_of(table)]
    for shard in range(2):
        found = judge(table, runs[2 + shard])
        assert found.previous is not None
        assert found.previous.run_id == runs[shard]
        assert found.dropped == ()
    # Points that no run before had: the newest one is the one before.
    alone = judge(table, runs[1])
    assert alone.previous is not None
    assert alone.previous.run_id == runs[0]


def test_an_environment_change_is_named_with_its_packages() -> None:
    rows = timed([*FLAT, 1e-3, 1.5e-3]) + again(7, 1.5e-3)
    found = judged(rows)
    assert found.environment is not None
    assert found.environment.text == "+ gxx 12.2.0, torch 2.12.0 -> 2.13.0, triton 3.6.0 -> 3.7.1"
    assert Reason.ENVIRONMENT_CHANGED in found.verdicts[0].reasons
    driver = timed([1e-3], driver_version="570.1") + timed([1e-3], 1, driver_version="580.2")
    change = judged(driver).environment
    assert change is not None
    assert change.text == "driver 570.1 -> 580.2"


def test_another_device_in_the_folder_is_no_baseline() -> None:
    rows = timed([1e-3], device_class="cpu-epyc-8c") + timed([1e-3], 1)
    assert judged(rows).verdicts[0].reasons == (Reason.NO_BASELINE,)


def test_a_second_way_beside_the_old_one_is_a_new_series() -> None:
    rows = timed([1e-3, 1e-3], execution="eager") + timed([1e-3], 1, execution="graph")
    reasons = {v.series.key.execution: v.reasons[0] for v in judged(rows).verdicts}
    assert reasons == {"eager": Reason.WITHIN_FLOOR, "graph": Reason.NO_BASELINE}


def test_a_refused_row_without_timer_joins_its_timed_series() -> None:
    refused = row(1, status="UNSUPPORTED", timer="", l2_state="", reasons=("no",))
    rows = [*timed([1e-3]), refused]
    (found,) = judged(rows).verdicts
    assert found.series.key.timer == "wall"
    assert found.reasons[0] is Reason.STATUS_CHANGED


def test_only_the_judged_metrics_are_judged() -> None:
    rows = timed([*FLAT, 1e-3]) + timed([*FLAT, 5e-3], metric="metadata_build")
    assert judged(rows).exit_code is ExitCode.OK
    settings = VerdictSettings(metrics=("attention", "metadata_build"))
    assert judged(rows, settings=settings).exit_code is ExitCode.UNDECIDED


def test_window_forgets_old_runs() -> None:
    rows = timed([9e-3] * 10 + [1e-3] * 10 + [1e-3])
    (found,) = judged(rows).verdicts
    assert found.estimate is not None
    assert found.estimate.ratio == pytest.approx(1.0)
    assert found.baseline_runs == 10


def test_a_named_run_is_judged_by_the_runs_before_it_only() -> None:
    rows = timed([*FLAT, 1e-3, 3e-3])
    found = judge(table_of(rows), row(6).run_id)
    assert found.verdicts[0].reasons[0] is Reason.WITHIN_FLOOR
    with pytest.raises(DataError, match="not stored; newest"):
        judge(table_of(rows), "20200101T000000Z-000000")
    with pytest.raises(DataError, match="measure first"):
        judge(table_of([]))


def test_the_made_up_history_is_read_as_it_was_made() -> None:
    found = judged(history())
    assert found.verdict is Verdict.REGRESSION
    regressions = {v.series.title: v.reasons[0] for v in found.of(Verdict.REGRESSION)}
    assert regressions == {
        "CPU_ATTN 16q1s4k dtype=fp32": Reason.CONFIRMED,
        "FLEX_ATTENTION 4q1s4k dtype=fp32 shape=phi-3-mini": Reason.STATUS_CHANGED,
    }
    assert not found.of(Verdict.UNDECIDED, Verdict.INVALID, Verdict.IMPROVEMENT)
