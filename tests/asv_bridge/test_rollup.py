"""One number for many points."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.asv_bridge.rollup import roll_up

SECONDS = st.floats(1e-7, 1e2)


@settings(deadline=None)
@given(st.lists(st.lists(SECONDS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_complete_data_is_the_geometric_mean(rows: list[list[float]]) -> None:
    medians = {f"c{i}": dict(zip("abc", row, strict=True)) for i, row in enumerate(rows)}
    rolled = roll_up(medians)
    for i, row in enumerate(rows):
        assert rolled[f"c{i}"] == pytest.approx(math.prod(row) ** (1 / 3), rel=1e-9)


def test_a_missing_slow_point_is_no_speed_up() -> None:
    full = {"fast": 1.0, "slow": 100.0}
    rolled = roll_up({"c1": full, "c2": {"fast": 1.0}, "c3": full})
    assert rolled["c2"] == pytest.approx(10.0)
    assert rolled == pytest.approx({"c1": 10.0, "c2": 10.0, "c3": 10.0})


def test_a_slow_down_shows_with_a_point_missing() -> None:
    full = {"fast": 1.0, "slow": 100.0}
    rolled = roll_up({"c1": full, "c2": full, "c3": {"fast": 1.2}})
    assert rolled["c3"] == pytest.approx(12.0)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), SECONDS, min_size=1), st.floats(0.5, 2.0))
def test_all_points_slower_by_a_factor_is_that_factor(
    points: dict[str, float], factor: float
) -> None:
    slower = {point: seconds * factor for point, seconds in points.items()}
    rolled = roll_up({"c1": points, "c2": slower})
    assert rolled["c2"] / rolled["c1"] == pytest.approx(factor, rel=1e-9)


def test_nothing() -> None:
    assert roll_up({}) == {}
    assert roll_up({"c1": {}}) == {}
    assert list(roll_up({"c1": {"a": 1.0}, "c2": {}})) == ["c1"]
