"""The race on a simulated device whose true times are known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from attnbench.choose.adaptive import MIN_ROUNDS, Race, Stop, run_race, statement

BUDGET_S = 400.0


class SimulatedDevice:
    """Each arm takes a second to measure; a round has a common drift, an arm its own noise."""

    def __init__(self, truth: Mapping[str, float], spread: float, seed: int) -> None:
        self.truth, self.spread = truth, spread
        self.random = random.Random(seed)
        self.now = 0.0
        self.samples = 0

    def sample(self, arms: Sequence[str], number: int) -> tuple[dict[str, float], dict[str, str]]:
        drift = self.random.gauss(0, 0.05)
        self.now += len(arms)
        self.samples += len(arms)
        return {
            arm: self.truth[arm] * math.exp(drift + self.random.gauss(0, self.spread))
            for arm in arms
        }, {}


def race_of(
    truth: Mapping[str, float], spread: float, seed: int, budget: float = BUDGET_S
) -> tuple[Race, Stop, SimulatedDevice]:
    device = SimulatedDevice(truth, spread, seed)
    race = Race(tuple(truth), confidence=0.95, floor=0.02)
    stop, spent = run_race(race, device.sample, budget, lambda: device.now)
    assert spent == device.now
    return race, stop, device


@pytest.mark.parametrize("spread", [0.003, 0.01, 0.05], ids=str)
def test_the_winner_is_found_as_often_as_is_said_and_with_fewer_samples(spread: float) -> None:
    truth = {"A": 1.0, "B": 1.05, "C": 1.3, "D": 2.0, "E": 2.5}
    races, wrong, used, uniform = 200, 0, 0, 0
    for seed in range(races):
        race, stop, device = race_of(truth, spread, seed)
        settled = stop in (Stop.DECIDED, Stop.TIE)
        wrong += settled and race.leader != "A"
        wrong += "A" not in race.remaining and not settled
        used += device.samples
        uniform += len(truth) * len(race.rounds)  # everybody in every round until as much is known
    assert wrong <= 0.05 * races
    assert used < uniform
    if spread == 0.05:  # where the near ones take long, the far ones are soon left out
        assert used < 0.65 * uniform


def test_the_error_rate_is_bounded_where_it_is_hardest() -> None:
    """Equal arms: any drop is of one that is as fast as the best."""
    races, dropped = 300, 0
    for seed in range(races):
        race, _, _ = race_of(dict.fromkeys("ABCD", 1.0), 0.02, seed, budget=60)
        dropped += "A" in {one.arm for one in race.dropped}
    assert dropped <= 0.05 * races


def test_a_tie_stops_the_race() -> None:
    race, stop, _ = race_of({"A": 1.0, "B": 1.001, "C": 2.0}, 0.002, 1)
    assert stop is Stop.TIE
    assert set(race.remaining) == {"A", "B"}
    assert "within 2.0%" in statement(race, stop)


def test_a_spent_budget_says_so_and_how_likely_it_is() -> None:
    race, stop, device = race_of({"A": 1.0, "B": 1.005}, 0.05, 3, budget=20)
    assert stop is Stop.BUDGET
    assert device.now <= 20
    assert "still open" in statement(race, stop)
    assert 0.5 < race.probability() < 1.0


def test_three_rounds_are_measured_whatever_the_budget() -> None:
    race, stop, _ = race_of({"A": 1.0, "B": 1.001}, 0.05, 3, budget=0.001)
    assert stop is Stop.BUDGET
    assert len(race.rounds) == MIN_ROUNDS


def test_what_fails_is_out_and_named() -> None:
    race = Race(("A", "B"))
    race.add({"A": 1.0}, {"B": "CRASH on q2k"})
    assert race.stop is Stop.DECIDED
    said = statement(race, Stop.DECIDED)
    assert said.startswith("A is the only backend that could be measured")
    assert said.endswith("B: CRASH on q2k")
    race = Race(("A",))
    race.add({}, {"A": "OOM on q2k"})
    assert race.stop is Stop.NOBODY
    assert "A: OOM on q2k" in statement(race, Stop.NOBODY)


def test_the_limits_by_hand() -> None:
    """Differences 0.10, 0.12, 0.11 in logarithms: mean 0.11, deviation 0.01, t of 2 d.f."""
    race = Race(("A", "B"), confidence=0.9)
    for difference in (0.10, 0.12, 0.11):
        race.add({"A": 1.0, "B": math.exp(difference)})
    # First look, two arms: alpha = 0.1 / (2 * 1 * 1 * 2) = 0.025; t = 4.30265.
    half = 4.30265 * 0.01 / math.sqrt(3)
    (dropped,) = race.dropped
    assert dropped.arm == "B"
    assert dropped.at_least == pytest.approx(math.exp(0.11 - half), rel=1e-5)


def test_what_failed_is_named_beside_an_answer() -> None:
    race = Race(("A", "B", "C"))
    race.add({"A": 1.0, "B": 2.0}, {"C": "THROTTLED on q2k"})
    for _ in range(2):
        race.add({"A": 1.0, "B": 2.0})
    assert race.stop is Stop.DECIDED
    assert statement(race, Stop.DECIDED).endswith("out of the race: C: THROTTLED on q2k")


def test_who_was_dropped_behind_one_that_fails_is_back() -> None:
    race = Race(("A", "B", "C"))
    for drift in (1.0, 1.1, 1.05):
        race.add({"A": drift, "B": 2.0 * drift * 1.001, "C": 3.0 * drift})
    assert race.remaining == ["A"]
    race = Race(("A", "B", "C"))
    for noise in (0.9, 1.1, 1.0):
        race.add({"A": 1.0, "B": 2.0, "C": 1.5 * noise**9})
    assert race.remaining == ["A", "C"]
    race.add({"C": 1.5}, {"A": "CRASH on q2k"})
    assert race.remaining == ["C", "B"]
    assert race.dropped == []
    race.add({"B": 2.0, "C": 1.5})
    assert race.stop is None
    assert race.leader == "C"
    assert 0.0 < race.probability() <= 1.0
