"""The arithmetic, against hand-computed numbers, scipy, and simulated noise."""

from __future__ import annotations

import math

import pytest

from attnbench.history.rule import (
    TIMER_NOISE,
    Estimate,
    Reason,
    Verdict,
    VerdictSettings,
    decide,
    estimate,
    estimate_groups,
)

WALL = TIMER_NOISE["wall"]
EVENT = TIMER_NOISE["event"]


def test_few_runs_pool_the_replicates_with_the_assumed_spread() -> None:
    # Logs of the two runs together: -0.03, 0, 0.02, 0.05. Median 0.01, distances 0.04, 0.01, 0.01,
    # 0.04, their median 0.025. Logs of the new run: 0.28, 0.30, 0.35: median 0.30, distances 0.02,
    # 0, 0.05, median 0.02. s^2 = (4 * 0.08^2 + 3 * (1.4826 * 0.025)^2 + 2 * (1.4826 * 0.02)^2) / 9
    # = (0.0256 + 0.0041214 + 0.0017585) / 9 = 0.0034978; t(0.995, 9) = 3.24984.
    a = [math.exp(x) for x in (0.0, 0.05, -0.03, 0.02)]
    b = [math.exp(x) for x in (0.28, 0.35, 0.30)]
    half = 3.24984 * math.sqrt(0.0034978 * (1 / 4 + 1 / 3)) + math.log(1.1)
    found = estimate([a[:2], a[2:]], b, WALL)
    assert found.ratio == pytest.approx(math.exp(0.29))
    assert found.low == pytest.approx(math.exp(0.29 - half), rel=1e-5)
    assert found.high == pytest.approx(math.exp(0.29 + half), rel=1e-5)
    assert estimate_groups([a[:2], a[2:]], [b], WALL) == found


def test_a_single_replicate_a_side_has_the_assumed_spread() -> None:
    # s^2 = 4 * 0.001^2 / 4, t(0.995, 4) = 4.60409.
    found = estimate([[1.0]], [1.0], TIMER_NOISE["fake"])
    half = 4.60409 * 0.001 * math.sqrt(2) + math.log(1.005)
    assert found.high == pytest.approx(math.exp(half), rel=1e-6)


@pytest.mark.parametrize("outlier", [1.6, 3.0, 160.0])
def test_one_odd_process_of_three_does_not_widen_few_runs(outlier: float) -> None:
    """Seen on a shared machine: the first process of a night up to 160 times slower."""
    quiet = estimate([[0.98, 1.0, 1.03]], [1.01, 1.04, 0.99], WALL)
    for baseline, subject in (
        ([[0.98, 1.0, outlier]], [1.01, 1.04, 0.99]),
        ([[0.98, 1.0, 1.03]], [1.01, outlier, 0.99]),
        ([[0.98, 1.0, outlier]], [1.01, outlier, 0.99]),
    ):
        found = estimate(baseline, subject, WALL)
        assert decide(found, WALL) == (Verdict.UNCHANGED, Reason.WITHIN_FLOOR)
        assert found.high / found.low == pytest.approx(quiet.high / quiet.low, rel=0.05)


def test_processes_that_disagree_do_widen_few_runs() -> None:
    found = estimate([[1.0, 0.55, 160.6]], [0.6, 0.54, 0.59], WALL)
    assert found.high > 1
    assert decide(found, WALL) == (Verdict.UNCHANGED, Reason.WITHIN_NOISE)


def test_too_few_replicates_give_no_interval() -> None:
    found = estimate([[1.0]], [2.0], WALL)
    assert not found.enough
    assert decide(found, WALL) == (Verdict.UNDECIDED, Reason.TOO_FEW_REPLICATES)
    assert estimate([[1.0]], [2.0], TIMER_NOISE["fake"]).enough


def test_groups_of_three_runs_use_their_medians() -> None:
    from scipy import stats

    a = [[1.0, 1.1, 0.9], [1.05], [0.98, 1.0]]
    b = [[1.2], [1.25], [1.22]]
    medians = [math.log(x) for x in (1.0, 1.05, 0.99)], [math.log(x) for x in (1.2, 1.25, 1.22)]
    interval = stats.ttest_ind(medians[1], medians[0], equal_var=False).confidence_interval(0.99)
    found = estimate_groups(a, b, WALL)
    half = (interval.high - interval.low) / 2
    assert math.log(found.high / found.low) / 2 == pytest.approx(half)
    assert found.ratio == pytest.approx(1.22)


def test_swapping_sides_inverts_the_ratio() -> None:
    a, b = [[1.0, 1.02, 0.99]], [[1.4, 1.38, 1.41]]
    there, back = estimate_groups(a, b, WALL), estimate_groups(b, a, WALL)
    assert there.ratio * back.ratio == pytest.approx(1)
    assert there.low * back.high == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "ratio", "high", "verdict", "reason"),
    [
        (1.05, 1.20, 1.40, Verdict.REGRESSION, Reason.SLOWER_THAN_FLOOR),
        (0.70, 0.80, 0.95, Verdict.IMPROVEMENT, Reason.FASTER_THAN_FLOOR),
        (1.01, 1.05, 1.09, Verdict.UNCHANGED, Reason.WITHIN_FLOOR),
        (0.90, 1.05, 1.20, Verdict.UNCHANGED, Reason.WITHIN_FLOOR),
        (0.90, 1.15, 1.45, Verdict.UNCHANGED, Reason.WITHIN_NOISE),
        (0.60, 0.85, 1.15, Verdict.UNCHANGED, Reason.WITHIN_NOISE),
        (0.80, 1.15, 1.55, Verdict.UNDECIDED, Reason.INTERVAL_TOO_WIDE),
        (0.50, 1.05, 1.95, Verdict.UNCHANGED, Reason.WITHIN_FLOOR),
        (0.40, 1.05, 2.95, Verdict.UNCHANGED, Reason.WITHIN_FLOOR),
        (0.30, 1.05, 3.05, Verdict.UNDECIDED, Reason.INTERVAL_TOO_WIDE),
        (0.20, 0.80, 3.05, Verdict.UNDECIDED, Reason.INTERVAL_TOO_WIDE),
    ],
)
def test_decide(low: float, ratio: float, high: float, verdict: Verdict, reason: Reason) -> None:
    assert decide(Estimate(ratio, low, high), WALL) == (verdict, reason)


def test_floor_can_be_set_and_unknown_timers_get_the_widest() -> None:
    settings = VerdictSettings(floors={"event": 0.05})
    assert settings.noise("event").floor == 0.05
    assert settings.noise("graph").floor == 0.02
    assert settings.noise("sundial") == WALL
