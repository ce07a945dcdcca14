"""The night judged on arrays is the night judged on objects."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.night import judge_newest, judge_panel
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Verdict, VerdictSettings
from attnbench.history.series_rows import series_of
from attnbench.history.series_verdict import SeriesVerdict, judge_night
from attnbench.history.verdict import judge
from attnbench.store.record import Measurement
from tests.history.fake import row, table_of, timed

RUNS = 16


@st.composite
def nights(draw: st.DrawFn) -> list[Measurement]:
    """A few points over nights: steps, noise, statuses, gaps, local edits, fresh processes."""
    random = np.random.default_rng(draw(st.integers(0, 2**20)))
    dirty = draw(st.sets(st.integers(0, RUNS - 1), max_size=4))
    looked_at_again = draw(st.sets(st.integers(RUNS - 4, RUNS - 1), max_size=3))
    rows = []
    for point in range(draw(st.integers(1, 5))):
        again = draw(st.sampled_from(["OK", "OK", "CRASH", "NOISY"]))
        spread = draw(st.sampled_from([0.0, 0.001, 0.01, 0.1]))
        step_at = draw(st.integers(0, RUNS))
        step = draw(st.sampled_from([1.0, 1.03, 1.3, 0.8]))
        replicates = draw(st.sampled_from([1, 3]))
        timer = draw(st.sampled_from(["wall", "event", "fake"]))
        first = draw(st.integers(0, RUNS - 1))
        odd = draw(
            st.dictionaries(
                st.integers(0, RUNS - 1),
                st.sampled_from(
                    ["CRASH", "UNSUPPORTED", "THROTTLED", "INCORRECT", "UNTIMED", "NOISY", "gap"]
                ),
                max_size=5,
            )
        )
        for run in range(first, RUNS):
            status = odd.get(run, "OK")
            if status == "gap":
                continue
            level = 1e-3 * (step if run >= step_at else 1.0) * (1 + spread * random.normal())
            numbers = [*range(replicates)]
            if run in looked_at_again:
                numbers += [100 + n for n in range(draw(st.sampled_from([0, 1, 4, 10])))]
                numbers += [200 + n for n in range(draw(st.sampled_from([0, 2, 10])))]
            for number in numbers:
                commit = f"{run:07x}" + ("+dirty" if run in dirty else "")
                if number >= 200:
                    commit = "before0"
                seconds = abs(level * (1 + spread * random.normal() / 2)) + 1e-9
                rows.append(
                    row(
                        run,
                        number,
                        workload=f"{point + 1}q1s1k dtype=fp32",
                        seconds=float(seconds),
                        status=status if number < 100 else again if number == 101 else "OK",
                        timer=timer,
                        commit=commit,
                    )
                )
    return rows


def same(found: SeriesVerdict, expected: SeriesVerdict) -> bool:
    """Equal, up to rounding of the estimate."""
    if (found.estimate is None) != (expected.estimate is None):
        return False
    if found.estimate and expected.estimate:
        pairs = zip(
            (found.estimate.ratio, found.estimate.low, found.estimate.high),
            (expected.estimate.ratio, expected.estimate.low, expected.estimate.high),
            strict=True,
        )
        if not all(np.isclose(a, b, rtol=1e-9, atol=0) for a, b in pairs):
            return False
    names = ("series", "subject", "verdict", "reasons", "baseline_runs", "status_before", "since")
    return all(
        getattr(found, name) == getattr(expected, name) for name in (*names, "note", "is_flagged")
    )


@settings(deadline=None, max_examples=60)
@given(nights(), st.sets(st.integers(0, RUNS - 1), max_size=3), st.booleans(), st.booleans())
def test_verdicts_are_those_of_objects(
    rows: list[Measurement], theirs: set[int], require_confirmation: bool, has_reference: bool
) -> None:
    if not rows:
        return
    table = table_of(rows)
    published = {row(run).run_id for run in theirs}
    panel = Panel.of_table(table, published)
    settings_ = VerdictSettings(has_reference=has_reference)
    expected = judge_night(
        [(series, series.newest) for series in series_of(table, published=published)],
        settings_,
        require_confirmation,
    )
    every = np.arange(panel.num_series)
    found = judge_panel(panel, every, panel.newest, settings_, require_confirmation)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert same(one, other), (one, other)


@settings(deadline=None, max_examples=20)
@given(nights())
def test_any_run_of_the_past_can_be_judged(rows: list[Measurement]) -> None:
    table = table_of(rows)
    panel = Panel.of_table(table)
    every = series_of(table)
    for run in range(panel.num_runs):
        planned = np.flatnonzero(panel.status[:, run] != NOT_PLANNED)
        pairs = [
            (series, value)
            for series in every
            if (value := series.at(panel.runs[run].run_id)) is not None
        ]
        found = judge_panel(panel, planned, np.full(len(planned), run), VerdictSettings())
        expected = judge_night(pairs, VerdictSettings())
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_what_else_is_stored_or_asked_for_changes_no_verdict() -> None:
    rows = timed([1e-3] * 10 + [1.023e-3], timer="event")
    rows += [row(10, 100 + n, seconds=1.023e-3, timer="event") for n in range(10)]
    # Last measured a night before; of so many the step would not be picked.
    for batch in range(2, 300):
        rows += timed([1e-3] * 10, replicates=1, workload=f"{batch}q1s1k dtype=fp32", timer="event")
    panel = Panel.of_table(table_of(rows))
    (then,) = judge(panel, row(10).run_id).verdicts
    assert then.verdict is Verdict.REGRESSION
    every = np.arange(panel.num_series)
    (found,) = [
        v for v in judge_newest(panel, every, VerdictSettings()) if v.series.key == then.series.key
    ]
    assert same(found, then)
    (alone,) = judge_newest(panel, [panel.index_of(then.series.key)], VerdictSettings())
    assert same(alone, then)
    backwards = judge_newest(panel, every[::-1], VerdictSettings())
    assert [v.series.key for v in backwards] == list(panel.keys)[::-1]
    together = judge_panel(panel, every, panel.newest, VerdictSettings())
    assert any(not same(a, b) for a, b in zip(together, backwards[::-1], strict=True))
