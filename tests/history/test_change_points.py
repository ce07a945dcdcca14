"""Change points against steps put into noise by hand, and against a slow oracle."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnbench.history.change_points import (
    MIN_CHANGE,
    MIN_VALUES,
    change_points,
    change_points_of_panel,
)

Array = NDArray[np.float64]


def noise(rng: np.random.Generator, rows: int, nights: int, spread: float, rho: float) -> Array:
    y = rng.normal(size=(rows, nights)) * spread * np.sqrt(1 - rho**2)
    for t in range(1, nights):
        y[:, t] += rho * y[:, t - 1]
    return np.asarray(y)


def test_one_clear_step_is_found_where_it_is() -> None:
    values = np.r_[np.full(30, 1.0), np.full(20, 1.05)] * 1e-5
    values *= np.exp(np.random.default_rng(0).normal(size=50) * 0.002)
    (found,) = change_points(values)
    assert found.index == 30
    assert (found.low, found.high) == (29, 30)
    assert found.ratio == pytest.approx(1.05, rel=0.003)
    assert found.before_s == pytest.approx(1e-5, rel=0.003)
    assert found.after_s == pytest.approx(1.05e-5, rel=0.003)
    assert found.p < 1e-6


def test_up_and_down_again_are_two() -> None:
    rng = np.random.default_rng(1)
    level = np.r_[np.full(40, 1.0), np.full(15, 1.08), np.full(40, 0.97)]
    found = change_points(level * np.exp(rng.normal(size=95) * 0.004))
    assert [c.index for c in found] == [40, 55]
    assert [c.ratio > 1 for c in found] == [True, False]


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.8])
def test_noise_has_no_change_points(rho: float) -> None:
    block = noise(np.random.default_rng(2), 200, 200, 0.01, rho)
    assert sum(map(len, change_points_of_panel(block))) <= 0.0005 * block.size


def test_odd_nights_are_no_change_points() -> None:
    rng = np.random.default_rng(3)
    block = noise(rng, 100, 200, 0.005, 0.0)
    for row in block:
        row[rng.choice(200, 6, replace=False)] += 0.3
    assert sum(map(len, change_points_of_panel(block))) <= 2


def test_steps_in_autocorrelated_heavy_tailed_noise_are_found() -> None:
    rng = np.random.default_rng(4)
    block = noise(rng, 100, 150, 0.004, 0.4)
    block += (rng.random(block.shape) < 0.02) * 0.2
    block[:, 90:] += np.log(1.03)
    found = change_points_of_panel(block)
    hit = [any(abs(c.index - 90) <= 5 and c.ratio > 1 for c in f) for f in found]
    assert np.mean(hit) >= 0.95
    near = [c for f in found for c in f if abs(c.index - 90) <= 5]
    assert np.mean([c.low < 90 <= c.high for c in near]) >= 0.85
    assert sum(map(len, found)) <= 110


def test_missing_values_move_the_index_not_the_result() -> None:
    rng = np.random.default_rng(5)
    full = np.exp(noise(rng, 1, 80, 0.004, 0.0)[0])
    full[50:] *= 1.06
    keep = rng.random(80) < 0.7
    # The nights around the step are missing: it lies somewhere in the gap.
    keep[48:53] = False
    gappy = np.where(keep, full, np.nan)
    (found,) = change_points(gappy)
    assert (found.low, found.index, found.high) == (
        int(np.flatnonzero(keep[:48])[-1]),
        int(np.flatnonzero(keep & (np.arange(80) >= 53))[0]),
        int(np.flatnonzero(keep & (np.arange(80) >= 53))[0]),
    )
    (dense,) = change_points(full[keep])
    assert dense.ratio == found.ratio
    assert np.flatnonzero(keep)[dense.index] == found.index


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [1.0, 2.0],
        [1.0] * 100,
        [np.nan] * 100,
        [0.0, -1.0, np.inf] * 20,
        [1.0] * (MIN_VALUES - 2) + [2.0],
    ],
)
def test_series_that_say_nothing(values: list[float]) -> None:
    assert change_points(values) == ()


def test_a_change_below_the_practical_size_is_not_reported() -> None:
    level = np.r_[np.full(100, 1.0), np.full(100, 1 + MIN_CHANGE / 2)]
    level *= np.exp(np.random.default_rng(6).normal(size=200) * 0.0003)
    assert change_points(level) == ()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.just(1e-5), st.just(2e-5)),
        max_size=60,
    )
)
def test_any_values_give_ordered_points_or_none(values: list[float]) -> None:
    found = change_points(values)
    usable = {i for i, v in enumerate(values) if np.isfinite(v) and v > 0}
    assert all(c.index in usable and c.low in usable and c.high in usable for c in found)
    assert all(c.low < c.high and c.low < c.index <= c.high for c in found)
    assert all(a.index < b.index for a, b in itertools.pairwise(found))
    assert all(0 <= c.p <= 1 and c.ratio > 0 for c in found)


def test_a_panel_gives_what_each_series_alone_gives_twice_the_same() -> None:
    rng = np.random.default_rng(7)
    block = noise(rng, 30, 60, 0.01, 0.3)
    block[::2, 30:] += 0.05
    block[rng.random(block.shape) < 0.1] = np.nan
    together = change_points_of_panel(block)
    assert together == change_points_of_panel(block)
    for row, found in zip(block, together, strict=True):
        alone = change_points(np.exp(row))
        assert [c.index for c in alone] == [c.index for c in found]


def test_the_unit_does_not_matter() -> None:
    rng = np.random.default_rng(8)
    values = np.exp(noise(rng, 1, 100, 0.01, 0.0)[0])
    values[60:] *= 0.9
    seconds, microseconds = change_points(values), change_points(values * 1e-6)
    assert [c.index for c in seconds] == [c.index for c in microseconds] == [60]
    assert seconds[0].ratio == pytest.approx(microseconds[0].ratio)


def test_location_is_that_of_least_absolute_error() -> None:
    """A slow search over all places of one step."""
    rng = np.random.default_rng(9)
    for _ in range(20):
        place = int(rng.integers(15, 45))
        y = noise(rng, 1, 60, 0.01, 0.0)[0]
        y[place:] += 0.04
        found = change_points(np.exp(y))
        if len(found) != 1:
            continue
        old, new = np.log(found[0].before_s), np.log(found[0].after_s)
        errors = [
            np.abs(y[:k] - old).sum() + np.abs(y[k:] - new).sum() for k in range(2, len(y) - 1)
        ]
        assert abs(errors[found[0].index - 2] - min(errors)) < 0.01


def test_many_series_are_quick() -> None:
    block = noise(np.random.default_rng(10), 1000, 200, 0.01, 0.2)
    block[::10, 120:] += 0.05
    begin = time.process_time()
    found = change_points_of_panel(block)
    assert time.process_time() - begin < 5.0
    assert np.mean([len(f) == 1 for f in found[::10]]) > 0.95
