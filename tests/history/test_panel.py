"""The panel says what `series_of` says, from digests that may be lost, old or damaged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.runs import runs_of
from attnbench.history.series import GRAVITY, Series
from attnbench.history.series_rows import series_of
from attnbench.store import ResultsFolder, RunHeader
from attnbench.store.record import Measurement
from tests.history.fake import history, row, table_of, timed

WORDS = ("OK", "NOISY", "UNTIMED", "UNSUPPORTED", "INCORRECT", "CRASH", "THROTTLED")


@st.composite
def histories(draw: st.DrawFn) -> list[Measurement]:
    """Any rows a store may hold: refused ones without a timer, replicates that differ, gaps."""
    cells = st.tuples(
        st.integers(0, 3),  # run
        st.sampled_from([0, 1, 2, 100, 101, 200, 201]),  # replicate
        st.sampled_from(["CPU_ATTN", "TORCH_SDPA"]),
        st.sampled_from(["attention", "host"]),
        st.sampled_from(["wall", "event", ""]),
        st.sampled_from(["eager", "graph"]),
    )
    rows = []
    for run, replicate, backend, metric, timer, execution in draw(
        st.lists(cells, min_size=1, max_size=25, unique=True)
    ):
        status = draw(st.sampled_from(WORDS))
        is_timed = status in ("OK", "NOISY")
        rows.append(
            row(
                run,
                replicate,
                backend=backend,
                metric=metric,
                timer=timer,
                execution=execution,
                status=status,
                seconds=draw(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=4)),
                reasons=() if is_timed else tuple(draw(st.lists(st.sampled_from("abc")))),
                suite=draw(st.sampled_from(["", "decode", "prefill"])),
                stop_reason=draw(st.sampled_from(["", "narrow", "budget"])),
                discarded=draw(st.integers(0, 3)),
                max_abs_error=draw(st.sampled_from([None, 0.0, 1e-3, 0.5])),
                commit=draw(st.sampled_from(["", "c0ffee", "c0ffee+dirty"])),
                driver_version=draw(st.sampled_from(["", "550.1"])),
            )
        )
    return rows


def store(folder: ResultsFolder, rows: Sequence[Measurement]) -> None:
    for run_id in dict.fromkeys(one.run_id for one in rows):
        own = [one for one in rows if one.run_id == run_id]
        with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as run:
            for one in own:
                run.append(one)


def every(panel: Panel) -> list[Series]:
    return panel.all_series(range(panel.num_series))


def assert_arrays(panel: Panel) -> None:
    """The dense arrays say what the objects say."""
    for i, series in enumerate(every(panel)):
        planned = [panel.runs[r].run_id for r in np.flatnonzero(panel.status[i] != NOT_PLANNED)]
        assert planned == [value.run_id for value in series.values]
        assert panel.runs[panel.newest[i]].run_id == series.newest.run_id
        assert len(panel.outline(i).values) == len(series.values)
        for value in series.values:
            r = panel.run_number(value.run_id)
            assert GRAVITY[panel.status[i, r]] is value.status
            assert panel.num_replicates[i, r] == len(value.replicates)
            assert panel.num_confirmations[i, r] == len(value.confirmations)
            if value.is_timed:
                assert value.median_s is not None
                assert panel.log_s[i, r] == pytest.approx(np.log(value.median_s), rel=1e-12)
            else:
                assert np.isnan(panel.log_s[i, r])


@settings(deadline=None, max_examples=60)
@given(histories(), st.sets(st.sampled_from([row(run).run_id for run in range(4)])))
def test_series_are_those_of_series_of(rows: list[Measurement], published: set[str]) -> None:
    table = table_of(rows)
    panel = Panel.of_table(table, published)
    expected = series_of(table, published=published)
    assert every(panel) == expected
    assert list(panel.runs) == runs_of(table)
    assert [panel.outline(i) for i in range(panel.num_series)] == expected
    assert_arrays(panel)
    if not expected:
        return
    one = len(expected) // 2
    assert panel.series(panel.index_of(expected[one].key)) == expected[one]


def test_the_made_up_history_from_a_folder_and_again_from_its_digests(tmp_path: Path) -> None:
    rows = history(runs=4)
    folder = ResultsFolder(tmp_path / "results")
    store(folder, rows)
    expected = series_of(table_of(rows))
    first = Panel.of(folder)
    assert every(first) == expected
    assert list(first.runs) == runs_of(table_of(rows))
    assert len(list((folder.path / ".digests").iterdir())) == 4
    again = Panel.of(folder)
    assert every(again) == expected
    assert list(again.runs) == list(first.runs)
    assert again.rows(1, ["replicate"]).num_rows == first.rows(1, ["replicate"]).num_rows
    assert_arrays(again)
    folder.compact()
    assert every(Panel.of(folder)) == expected
    assert folder.check().is_ok


def test_values_of_some_runs_only() -> None:
    rows = timed([1e-3, 2e-3, 3e-3])
    panel = Panel.of_table(table_of(rows))
    (values,) = panel.values([0], np.array([[True, False, True]]))
    assert [value.run_id for value in values] == [rows[0].run_id, rows[-1].run_id]


def test_an_empty_history(tmp_path: Path) -> None:
    panel = Panel.of_table(table_of([]))
    assert (panel.num_series, panel.num_runs, panel.log_s.shape) == (0, 0, (0, 0))
    (tmp_path / "results").mkdir()
    assert Panel.of(ResultsFolder(tmp_path / "results")).runs == ()


def test_order_of_rows_does_not_matter_even_where_refused_rows_join() -> None:
    rows = [
        *timed([1e-3]),
        row(0, 1, timer="", status="UNSUPPORTED", reasons=("a",)),
        row(0, 1, timer="", execution="graph", status="CRASH", reasons=("b",)),
    ]
    expected = series_of(table_of(rows))
    for seed in range(5):
        table = table_of(random.Random(seed).sample(rows, len(rows)))
        assert series_of(table) == expected
        assert every(Panel.of_table(table)) == expected


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_is_not_in_the_array(seconds: float) -> None:
    panel = Panel.of_table(table_of([row(0, seconds=[seconds] * 3)]))
    assert np.isnan(panel.log_s).all()
