"""The first look, against a slow one written from its description, scipy and simulated noise."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history import gate
from attnbench.history.gate import Floats, Screen, accepted, newest_values, pick, screen

NAN = math.nan


def one(values: list[float], spread: float = 0.01) -> Screen:
    return screen(np.array([values]), np.array([spread]))


def slow_change(values: list[float], span: int, spread: float) -> tuple[float, float, float]:
    """(change, scale, freedom) of the newest run as docs/verdict.md states it, value by value."""

    def variance(count: int) -> float:
        return math.pi / (2 * count + math.pi - 2)

    def change(end: int) -> tuple[float, int] | None:
        level = values[max(0, end - span - 10) : end - span]
        if end < span or len(level) < 3:
            return None
        return statistics.median(values[end - span : end]) - statistics.median(level), len(level)

    newest = change(len(values))
    assert newest is not None
    past = [
        abs(found[0]) / math.sqrt(variance(span) + variance(found[1]))
        for end in range(len(values) - span, max(0, len(values) - span - 60), -1)
        if (found := change(end))
    ]
    if len(past) >= 8:
        tail = sorted(past)[math.ceil(0.9 * len(past)) - 1]
        own, evidence = max(1.4826 * statistics.median(past), tail / 1.645), len(past) / span
    else:
        level = values[: len(values) - span][-10:]
        middle = statistics.median(level)
        own = 1.4826 * statistics.median(abs(v - middle) for v in level)
        evidence = len(level) - 1
    freedom = 4 + evidence
    scale = math.sqrt((4 * spread**2 + evidence * own**2) / freedom)
    unit = math.sqrt(variance(span) + variance(newest[1]))
    return newest[0], scale * unit, min(freedom, 30)


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 120), st.integers(0, 2**32 - 1), st.booleans())
def test_the_arrays_say_what_a_slow_look_says(count: int, seed: int, is_restless: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.01, count)
    values = values.cumsum() if is_restless else values
    gaps = np.full(2 * count, NAN)
    gaps[np.sort(rng.choice(2 * count, count, replace=False))] = values
    found = one(gaps.tolist(), 0.02)
    change, scale, freedom = slow_change(values.tolist(), 1, 0.02)
    assert found.change[0] == pytest.approx(change, abs=1e-12)
    assert found.half_width[0] == pytest.approx(scale * t_quantile(0.995, freedom), rel=1e-9)
    ps, changes = [], []
    for span in (1, 3):
        if count >= span + 3:
            change, scale, freedom = slow_change(values.tolist(), span, 0.02)
            ps.append(t_tail(change / scale, freedom))
            changes.append(change)
    assert found.p[0] == pytest.approx(min(1.0, 2 * min(ps)), rel=1e-7)
    assert found.largest_change[0] == pytest.approx(max(changes), abs=1e-12)
    assert found.level_runs[0] == min(10, count - 1)


def t_quantile(share: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(share, freedom))


def t_tail(value: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.sf(value, freedom))


def test_three_equal_runs_leave_only_the_assumed_spread() -> None:
    # By hand: s^2 = 4 * 0.08^2 / 6, t(0.995, 6) = 3.70743; a median of three normal values has
    # pi / (6 + pi - 2) = 0.43990 of one's variance.
    found = one([0.0, 0.0, 0.0, 0.2], 0.08)
    half = 3.70743 * math.sqrt(4 * 0.08**2 / 6) * math.sqrt(1 + 0.43990)
    assert found.change[0] == pytest.approx(0.2)
    assert found.half_width[0] == pytest.approx(half, rel=1e-5)


def test_own_spread_of_the_runs_counts() -> None:
    # 0, 0.02, 0.04, 0.06, 0.08: median 0.04, MAD 0.02 -> 1.4826 * 0.02 = 0.029652; t(0.995, 8).
    s = math.sqrt((4 * 0.01**2 + 4 * 0.029652**2) / 8)
    half = 3.35539 * s * math.sqrt(1 + math.pi / (10 + math.pi - 2))
    found = one([0.0, 0.02, 0.04, 0.06, 0.08, 0.04])
    assert found.change[0] == pytest.approx(0.0)
    assert found.half_width[0] == pytest.approx(half, rel=1e-5)


def test_a_step_inside_the_window_neither_moves_nor_widens_it() -> None:
    before = [0.01 * (i % 2) for i in range(10)]
    after = [*before[:7], 0.34, 0.34, 0.34]
    quiet, stepped = (one([*runs, 0.34], 0.08) for runs in (before, after))
    assert stepped.change[0] == pytest.approx(quiet.change[0], abs=0.01)
    assert stepped.half_width[0] == pytest.approx(quiet.half_width[0], rel=0.05)


@pytest.mark.parametrize("values", [[], [NAN] * 9, [0.1], [0.1, NAN, 0.2], [NAN, 0, 0, 0.5]])
def test_too_few_values_give_no_change(values: list[float]) -> None:
    found = one(values)
    assert np.isnan(found.change[0])
    assert np.isnan(found.p[0])
    assert found.level_runs[0] == 0
    assert not pick(found, np.array([0.02]))[0]


def test_no_series_at_all() -> None:
    found = screen(np.empty((0, 5)), np.empty(0))
    assert found.p.shape == found.level_runs.shape == (0,)
    assert pick(found, np.empty(0)).shape == (0,)


def test_a_constant_series_is_not_picked_until_it_moves() -> None:
    assert not pick(one([1.0] * 50), np.array([0.02]))[0]
    assert pick(one([1.0] * 50 + [1.05]), np.array([0.02]))[0]


def test_a_small_step_shows_in_three_nights_together() -> None:
    rng = np.random.default_rng(7)
    noise = rng.normal(0, 0.004, (400, 80))
    noise[:, -3:] += 0.012
    found = screen(noise, np.full(400, 0.005))
    together = (found.p < 1e-3).mean()
    alone = screen(np.delete(noise, [-3, -2], axis=1), np.full(400, 0.005))
    assert together > 2 * (alone.p < 1e-3).mean() > 0


def test_a_series_that_wanders_is_held_against_its_own_wandering() -> None:
    """Lag-1 autocorrelation of 0.8: the spread around the last ten runs says too little."""
    rng = np.random.default_rng(11)
    values = np.zeros((2000, 80))
    for night in range(1, 80):
        values[:, night] = 0.8 * values[:, night - 1] + rng.normal(0, 0.006, 2000)
    found = screen(values, np.full(2000, 0.01))
    assert (found.p <= 0.01).mean() <= 0.02


@pytest.mark.parametrize("spread", [0.003, 0.02, 0.1])
def test_p_is_honest_on_independent_noise(spread: float) -> None:
    rng = np.random.default_rng(3)
    found = screen(rng.normal(0, spread, (20000, 90)), np.full(20000, 0.01))
    for level in (0.001, 0.01, 0.05):
        assert (found.p <= level).mean() <= 1.3 * level
        assert (found.p_faster <= level).mean() <= 1.5 * level


def test_picking_follows_benjamini_and_hochberg() -> None:
    from scipy.stats import false_discovery_control

    rng = np.random.default_rng(5)
    p = np.concatenate([rng.random(500), rng.random(40) * 1e-3, [NAN] * 5])
    rng.shuffle(p)
    known = ~np.isnan(p)
    adjusted = np.ones_like(p)
    adjusted[known] = false_discovery_control(p[known])
    for share in (0.01, 0.05, 0.5):
        assert accepted(p, share).tolist() == (known & (adjusted <= share)).tolist()
    assert not accepted(np.array([NAN, NAN]), 0.5).any()


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = np.random.default_rng(2).normal(0, 0.01, (25, 40))
    whole = screen(logs, np.full(25, 0.01))
    monkeypatch.setattr(gate, "_CHUNK", 10)
    parts = screen(logs, np.full(25, 0.01))
    for name in Screen.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_newest_values_are_taken_in_order() -> None:
    logs: Floats = np.array([[1, NAN, 2, 3, NAN], [NAN] * 5, [1, 2, 3, 4, 5]])
    expected = [[1, 2, 3], [NAN] * 3, [3, 4, 5]]
    np.testing.assert_array_equal(newest_values(logs, 3), expected)
    np.testing.assert_array_equal(newest_values(logs, 7)[2], [NAN, NAN, 1, 2, 3, 4, 5])
