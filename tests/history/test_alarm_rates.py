"""The benchmarks of the gate and its peers: alarm rules and counts, by known answers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PLACE = 170


@pytest.fixture(scope="module")
def rates() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("alarm_rates")


@pytest.fixture(scope="module")
def gate_rates(rates: Any) -> Any:
    return importlib.import_module("gate_rates")


def quiet_series(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(0, 0.001, PLACE + 40)


def followed(rates: Any, name: str, noise: Any, step: float) -> dict[str, list[int]]:
    """Rule -> the nights with an alarm, counted from 1, of one series."""
    (peer,) = (peer for peer in rates.PEERS if peer.name == name)
    found = rates.follow(peer, [noise], [rates.Case(0, PLACE)], step, np.random.default_rng(1))
    return {
        rule: (np.flatnonzero(o[0, 0] == rates.ALARM) + 1).tolist() for rule, o in found.items()
    }


#: The nights each needs for a step far beyond the noise: levels of at least so many.
FIRST = {"asv": 1, "e-divisive": 3, "pelt": 1, "pelt, ar": 1, "change points": 2}
NAMES = tuple(FIRST)


def test_these_are_all(rates: Any) -> None:
    assert tuple(peer.name for peer in rates.PEERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_ten_percent_is_one_alarm(rates: Any, name: str) -> None:
    found = followed(rates, name, quiet_series(), 0.10)
    assert len(found) == (3 if name == "asv" else 2)
    assert all(nights == [FIRST[name]] for nights in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_did_not_get_slower_is_no_alarm(
    rates: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "NIGHTS", 7)
    noise = quiet_series()
    index = np.arange(len(noise))
    known = noise + 0.10 * (index >= PLACE - 12)
    faster = noise - 0.10 * (index >= PLACE)
    within = noise + 0.006 * (index >= PLACE)
    for values in (noise, known, faster, within):
        assert not any(followed(rates, name, values, 0.0).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_standing_slow_down_is_reported_once(rates: Any, name: str) -> None:
    noise = quiet_series()
    slower = noise + 0.10 * (np.arange(len(noise)) >= PLACE)
    found = followed(rates, name, slower, 0.0)  # its second looks see no step
    alone = {rule: nights for rule, nights in found.items() if "confirmed" not in rule}
    assert all(len(nights) == 1 for nights in alone.values())
    assert found[f"{name}, confirmed"] == []


def test_asv_alarms_beyond_its_threshold_only(rates: Any) -> None:
    found = followed(rates, "asv", quiet_series(), 0.03)
    assert found["asv, 5 %"] == []
    assert found["asv, 2 %"]
    assert found["asv, confirmed"]


def test_a_step_that_came_back_is_no_regression_of_asv(rates: Any) -> None:
    noise = quiet_series()
    index = np.arange(len(noise))
    bump = noise + 0.10 * ((index >= 60) & (index < 100))
    (report,) = rates.asv(bump[None, :150])
    (still,) = rates.asv((noise + 0.10 * (index >= 60))[None, :150])
    assert report(0.05) == []
    assert still(0.05) == [60]


def test_each_new_slow_down_is_an_alarm_until_it_is_reported(rates: Any) -> None:
    watch = rates.Watch([100])
    near, far = 100 + rates.TOLERANCE, 101 + rates.TOLERANCE
    assert watch.outcome([near], lambda: True) == rates.NOTHING
    assert watch.outcome([far], lambda: False) == rates.AGAIN
    assert watch.outcome([far], lambda: True) == rates.ALARM
    assert watch.outcome([far, far + 1], lambda: True) == rates.NOTHING


def test_the_gate_alarms_on_the_first_night_of_ten_percent(rates: Any, gate_rates: Any) -> None:
    series = [quiet_series(seed) for seed in range(30)]
    nights, cases = gate_rates.Nights(series), [rates.Case(3, PLACE), rates.Case(7, PLACE + 5)]
    found = rates.follow_gate(nights, cases, 0.10, np.random.default_rng(1))
    assert found["gate"][:, 0, 0].tolist() == [rates.ALARM] * 2
    assert found["gate, first look"][:, 0, 0].tolist() == [rates.ALARM] * 2
    still = rates.follow_gate(nights, cases, 0.0, np.random.default_rng(1))
    assert not (still["gate"] == rates.ALARM).any()


def test_what_is_too_restless_to_tell_is_measured_again_too(rates: Any, gate_rates: Any) -> None:
    series = [quiet_series(seed) for seed in range(30)]
    series[3] = series[3] * 50
    nights, cases = gate_rates.Nights(series), [rates.Case(3, PLACE), rates.Case(7, PLACE)]
    found = rates.follow_gate(nights, cases, 0.0, np.random.default_rng(1))
    unpicked = found["gate, first look"] == rates.NOTHING
    again = (found["gate"] == rates.AGAIN) & unpicked
    assert again[0].any()
    assert not again[1].any()
    # A step that its past hides is found by that second look alone.
    found = rates.follow_gate(nights, cases[:1], 0.5, np.random.default_rng(1))
    hidden = rates.follow_gate(nights, cases[:1], 0.1, np.random.default_rng(1))
    assert (found["gate"] == rates.ALARM).any()
    assert (hidden["gate"][hidden["gate, first look"] == rates.NOTHING] != rates.NOTHING).any()


def test_the_counts_of_a_line(rates: Any) -> None:
    quiet = np.zeros((10, 1, 20), np.int8)
    quiet[0, 0, 4] = rates.ALARM  # 1 of 200 series-nights: 0.9 in the 180 of a step
    quiet[1] = rates.AGAIN
    slower = np.zeros((10, 1, 20), np.int8)
    slower[0, 0, 2:] = rates.ALARM  # on the third night
    slower[1, 0, 3] = rates.ALARM
    slower[2, 0, 9] = rates.ALARM
    slower[3] = rates.AGAIN
    none = np.zeros((10, 1, 20), np.int8)
    assert rates.cells(quiet, [slower, none]) == [
        "50.0",
        "0.25 / 0.10, 0.30 / 4, 5.7",
        "0.00 / 0.00, 0.00 / -",
    ]
    assert rates.cells(none, [slower, none])[1:] == [
        "1.00 / 0.10, 0.30 / 4, 5.7",
        "- / 0.00, 0.00 / -",
    ]


def test_a_place_has_its_window_before_and_its_nights_after(rates: Any) -> None:
    series = [np.zeros(size) for size in (169, 170, 171, 400)]
    for seed in range(20):
        cases = rates.sample(series, 9, np.random.default_rng(seed))
        assert [case.series for case in cases] == [1, 2, 3]
        assert cases[0].place == rates.WINDOW
        assert all(150 <= c.place <= len(series[c.series]) - rates.NIGHTS for c in cases)


def test_limits_are_chosen_by_the_stated_rule(gate_rates: Any) -> None:
    first, second, third, *_ = gate_rates.GRID
    choose = gate_rates.chosen_limits
    assert choose({first: (0.5, 0.89), second: (0.9, 0.9), third: (0.9, 0.95)}) == second
    assert choose({first: (1.1, 0.99), second: (0.9, 0.80), third: (1.0, 0.85)}) == third
    with pytest.raises(SystemExit):
        choose({first: (1.1, 0.99)})


def test_what_is_chosen_on_one_half_is_measured_on_the_other(gate_rates: Any) -> None:
    """Every setting is perfect on one series of four only, and each half has two."""
    grid = len(gate_rates.GRID)
    false = np.zeros((grid, 4))
    power = np.zeros((grid, 4))
    power[:4] = np.eye(4)
    chosen, other, _ = gate_rates.held_back(false, power, np.ones(4), np.random.default_rng(0))
    assert len(chosen) == 2 * gate_rates.SPLITS
    assert set(chosen.tolist()) <= set(range(4))
    assert (other == 0).all()


def test_what_is_held_back_counts_nights_and_steady_series(
    gate_rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_rates, "SPLITS", 1)
    grid = len(gate_rates.GRID)
    false = np.tile([0.0, 0.5, 0.0, 0.5], (grid, 1))
    power = np.tile([np.nan, 0.95, 0.95, np.nan], (grid, 1))
    weights = np.array([3.0, 1.0, 3.0, 1.0])
    found = [
        gate_rates.held_back(false, power, weights, Ordered(order))
        for order in ([0, 1, 2, 3], [0, 2, 3, 1])
    ]
    chosen, other, as_is = found[0]
    assert chosen.tolist() == [0, 0]
    assert other.tolist() == as_is.tolist() == [[0.125, 0.95]] * 2
    assert found[1][1][:, 0].tolist() == [0.5, 0.0]


class Ordered(np.random.Generator):
    """Permutes as it is told."""

    def __init__(self, order: list[int]) -> None:
        super().__init__(np.random.PCG64(0))
        self._order = order

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.array(self._order)


def test_the_gate_as_it_is_is_one_of_the_grid(gate_rates: Any) -> None:
    assert gate_rates.AS_IS in gate_rates.GRID


def test_stricter_limits_pick_less(gate_rates: Any) -> None:
    rng = np.random.default_rng(5)
    nights = gate_rates.Nights([rng.standard_t(3, 120) * 0.01 for _ in range(60)])
    strict, *_, loose = (nights.picked(limits) for limits in gate_rates.GRID)
    between = nights.picked(gate_rates.Limits(0.5, 0.02))
    assert strict.sum() < between.sum() < loose.sum()
    assert not (strict & ~loose).any()


def test_residuals_are_sorted_by_time_and_without_their_level(rates: Any, tmp_path: Path) -> None:
    import pandas as pd

    seconds = np.where(np.arange(200) < 100, 1.0, 2.0)
    seconds[150] = 3.0
    table = pd.DataFrame({"series": 4, "commit_time_ms": np.arange(200), "seconds": seconds})
    table.sample(frac=1, random_state=0).to_parquet(tmp_path / "h.parquet")
    (noise,) = rates.residuals(tmp_path / "h.parquet")
    assert np.flatnonzero(np.abs(noise) > 1e-12).tolist() == [150]
    assert noise[150] == pytest.approx(np.log(1.5))


def test_the_documented_table_has_every_method(rates: Any) -> None:
    documented = (ROOT / "docs" / "verdict.md").read_text(encoding="utf-8")
    rules = [rule.name for peer in rates.PEERS for rule in peer.rules()]
    for name in ("gate", "gate, first look", *rules):
        assert documented.count(f"| {name} | ") == 2, name
