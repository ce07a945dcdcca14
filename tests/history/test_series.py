"""From rows to series: medians, order, levels, what refused rows belong to."""

from __future__ import annotations

import random
import statistics
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.runs import environment_change, runs_of
from attnbench.history.series import Axis, gravest
from attnbench.history.series_rows import sample_statistics, series_of
from attnbench.store.record import Status
from tests.history.fake import START, history, row, table_of, timed


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(1e-9, 1e3), max_size=7), min_size=1, max_size=12))
def test_sample_statistics_equal_row_by_row_medians(samples: list[list[float]]) -> None:
    table = table_of([row(0, i, seconds=own) for i, own in enumerate(samples)])
    medians, noise, counts = sample_statistics(table["samples"])
    assert counts == [len(own) for own in samples]
    for own, median, spread in zip(samples, medians, noise, strict=True):
        if not own:
            assert median is None
            assert spread is None
            continue
        assert median == pytest.approx(statistics.median(own))
        q1, q3 = np.percentile(own, (25, 75))
        assert spread == pytest.approx((q3 - q1) / statistics.median(own))


def test_sample_statistics_of_a_slice_of_a_table() -> None:
    table = table_of([row(0, i, seconds=[float(i + 1)] * 3) for i in range(6)])
    assert sample_statistics(table.slice(2, 2)["samples"])[0] == [3.0, 4.0]


def test_order_of_rows_does_not_matter() -> None:
    rows = history(runs=4)
    shuffled = random.Random(3).sample(rows, len(rows))
    assert series_of(table_of(rows)) == series_of(table_of(shuffled))
    assert runs_of(table_of(rows)) == runs_of(table_of(shuffled))


def test_values_hold_replicates_confirmations_and_conditions() -> None:
    rows = [
        *timed([1e-3, 2e-3]),
        row(1, 100, seconds=3e-3, discarded=2),
        row(1, 101, status="NOISY", seconds=[5e-3], stop_reason="budget"),
    ]
    (series,) = series_of(table_of(rows))
    assert [value.run_id for value in series.values] == [row(0).run_id, row(1).run_id]
    newest = series.newest
    assert newest.replicates == pytest.approx((1.98e-3, 2e-3, 2.02e-3))
    assert newest.confirmations == pytest.approx((3e-3, 5e-3))
    assert newest.status is Status.NOISY
    assert newest.median_s == pytest.approx(2e-3)
    assert (newest.discarded, newest.num_samples) == (2, 21)
    assert newest.stop_reasons == ("converged", "budget")
    assert series.before(newest) == series.values[:1]


def test_a_series_is_split_by_everything_in_its_key() -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"timer": "event"},
        {"l2_state": "cold"},
        {"execution": "graph"},
    ]
    ways += [{"device_class": "h200"}, {"protocol_version": 2}, {"metric": "host"}]
    table = table_of([row(0, **way) for way in ways])
    assert len({series.id for series in series_of(table)}) == len(ways)
    assert len(series_of(table, ["host"])) == 1


def test_a_refused_row_with_a_key_of_its_own_stays_there() -> None:
    rows = [row(0), row(0, execution="graph", status="UNSUPPORTED", reasons=("no graph",))]
    rows += [row(1, execution="graph"), row(1)]
    values = {s.key.execution: [v.status for v in s.values] for s in series_of(table_of(rows))}
    assert values["graph"] == [Status.UNSUPPORTED, Status.OK]
    assert values["eager"] == [Status.OK, Status.OK]


def test_levels_over_commits_are_in_order_of_commit_time() -> None:
    # The second run measured an older commit, the third the newest again.
    old: dict[str, Any] = {"commit": "0ld", "commit_time": START - timedelta(days=9)}
    rows = [row(0, seconds=1e-3), row(1, seconds=2e-3, **old)]
    rows += [row(2, seconds=3e-3, commit=row(0).commit, commit_time=row(0).commit_time)]
    (series,) = series_of(table_of(rows))
    levels = series.levels(Axis.COMMIT)
    assert [level.label for level in levels] == ["0ld", row(0).commit]
    assert levels[1].median_s == pytest.approx(2e-3)
    assert [len(level.values) for level in levels] == [1, 2]


def test_levels_over_stacks_are_in_order_of_appearance() -> None:
    (series,) = series_of(table_of(timed([1e-3] * 7 + [2e-3] * 3)))
    levels = series.levels(Axis.STACK)
    assert [len(level.values) for level in levels] == [7, 3]
    assert [level.median_s for level in levels] == pytest.approx([1e-3, 2e-3])


def test_gravest_never_hides_a_wrong_output() -> None:
    for status in Status:
        assert gravest([status, Status.INCORRECT]) is Status.INCORRECT
        assert gravest([Status.OK, status]) is status


def test_runs_count_points_once_by_their_gravest_row() -> None:
    rows = [*timed([1e-3]), row(0, 3, status="CRASH"), row(0, backend="TORCH_SDPA")]
    (run,) = runs_of(table_of(rows))
    assert run.points == {Status.CRASH: 1, Status.OK: 1}
    assert run.duration_s == pytest.approx(3 * 40 + 0.9)
    assert run.suites == ("decode",)


def test_same_stack_is_no_environment_change() -> None:
    first, second, *_, last = runs_of(table_of(timed([1e-3] * 8)))
    assert environment_change(first, second) is None
    assert environment_change(second, last) is not None


def test_an_empty_table_has_no_series() -> None:
    assert series_of(table_of([])) == []
    assert runs_of(table_of([])) == []
