"""The search over candidates whose true times are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attnbench.errors import DataError
from attnbench.history.bisect import (
    NOT_BUILT,
    Bisection,
    Journal,
    Outcome,
    Reading,
    bisect,
)
from attnbench.history.rule import TIMER_NOISE

NOISE = TIMER_NOISE["event"]


class Machine:
    """Candidates with true levels, noise, drift, and failures; it counts what it measures."""

    def __init__(self, levels: list[float | Reading], spread: float = 0.003, seed: int = 0) -> None:
        self.levels = levels
        self.rng = np.random.default_rng(seed)
        self.spread = spread
        self.drift = 0.0
        self.stops_after = -1
        self.measured: list[int] = []

    @property
    def labels(self) -> list[str]:
        return [f"c{n}" for n in range(len(self.levels))]

    def __call__(self, place: int) -> Reading:
        if len(self.measured) == self.stops_after:
            raise KeyboardInterrupt
        self.measured.append(place)
        level = self.levels[place]
        if isinstance(level, Reading):
            return level
        noise = self.rng.normal() * self.spread + self.drift * len(self.measured)
        return Reading(1e-5 * level * float(np.exp(noise)), "OK")

    def search(self, folder: Path) -> Bisection:
        return bisect(self.labels, self, NOISE, Journal(folder / "j.jsonl", {}))


def steps(first_bad: int, size: int = 12, factor: float = 1.05) -> list[float | Reading]:
    return [factor if n >= first_bad else 1.0 for n in range(size)]


NO = Reading(None, NOT_BUILT, "does not compile")
REFUSED = Reading(None, "UNSUPPORTED", "no such head size")
CRASH = Reading(None, "CRASH")


@pytest.mark.parametrize("first_bad", range(1, 12))
def test_every_place_is_found(tmp_path: Path, first_bad: int) -> None:
    machine = Machine(steps(first_bad), seed=first_bad)
    found = machine.search(tmp_path)
    assert found.is_found, found.text
    assert found.suspects == (f"c{first_bad}",)
    assert found.final is not None
    assert found.final.estimate.ratio == pytest.approx(1.05, rel=0.01)
    assert f"the first bad one is c{first_bad}: 1.0" in found.text
    assert len(found.steps) <= 4
    # By turns from the start, and both ends anew for every question.
    assert machine.measured[:8] == [0, 11, 11, 0, 0, 11, 11, 0]
    assert machine.measured.count(0) >= 5 * (1 + len(found.steps))


def test_drift_of_the_machine_misleads_nobody(tmp_path: Path) -> None:
    """It gets 10 % slower while it is measured, twice the step that is searched."""
    machine = Machine(steps(7), spread=0.001)
    machine.drift = 0.10 / 70
    found = machine.search(tmp_path)
    assert found.suspects == ("c7",)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_ends_that_do_not_differ_are_refused(tmp_path: Path, factor: float) -> None:
    machine = Machine(steps(5, factor=factor))
    found = machine.search(tmp_path)
    assert "do not really differ" in found.problem
    assert not found.steps
    assert set(machine.measured) == {0, 11}
    assert found.text == found.problem


def test_ends_that_noise_hides_are_refused(tmp_path: Path) -> None:
    found = Machine(steps(5, factor=1.05), spread=0.2, seed=3).search(tmp_path)
    assert "do not really differ" in found.problem


def test_swapped_ends_are_said(tmp_path: Path) -> None:
    found = Machine(steps(5, factor=0.9)).search(tmp_path)
    assert found.is_wrong_way
    assert "swap the ends" in found.problem


def test_a_candidate_that_cannot_be_built_is_skipped(tmp_path: Path) -> None:
    levels = steps(8)
    levels[5] = levels[6] = NO
    found = Machine(levels).search(tmp_path)
    assert found.suspects == ("c8",)
    skipped = [step for step in found.steps if step.outcome is Outcome.SKIPPED]
    assert {step.place for step in skipped} <= {5, 6}
    assert skipped
    assert skipped[0].why == "not built (does not compile)"


def test_skipped_beside_the_change_leaves_several_suspects(tmp_path: Path) -> None:
    levels = steps(6)
    levels[5] = levels[6] = CRASH
    found = Machine(levels).search(tmp_path)
    assert not found.is_found
    assert found.suspects == ("c5", "c6", "c7")
    assert "among 3: c5, c6, c7" in found.text
    assert found.final is None


def test_a_candidate_that_is_now_fast_now_slow_is_never_guessed(tmp_path: Path) -> None:
    class Changing(Machine):
        def __call__(self, place: int) -> Reading:
            self.levels[3] = 1.1 if len(self.measured) % 2 else 1.0
            return super().__call__(place)

    found = Changing(steps(6, size=7, factor=1.10)).search(tmp_path)
    assert [s.outcome for s in found.steps if s.place == 3] == [Outcome.UNDECIDED]
    assert found.suspects == ("c6",)


def test_two_changes_are_said_to_be_more_than_one(tmp_path: Path) -> None:
    levels: list[float | Reading] = [1.0, 1.0, 1.0, 1.05, 1.05, 1.05, 1.12, 1.12]
    found = Machine(levels, spread=0.001).search(tmp_path)
    assert found.is_found
    assert found.suspects in (("c3",), ("c6",))
    assert "others add to it" in found.text


def test_a_lost_support_is_found_by_status(tmp_path: Path) -> None:
    levels: list[float | Reading] = [1.0] * 4 + [REFUSED] * 5
    levels[6] = NO
    machine = Machine(levels)
    found = machine.search(tmp_path)
    assert found.is_found
    assert found.suspects == ("c4",)
    assert found.text == "the first bad one is c4: UNSUPPORTED, and c3 works"
    assert len(machine.measured) <= 12


def test_another_failure_than_the_bad_ends_is_no_answer(tmp_path: Path) -> None:
    levels: list[float | Reading] = [1.0, 1.0, CRASH, REFUSED, REFUSED]
    found = Machine(levels).search(tmp_path)
    assert found.suspects == ("c2", "c3")


@pytest.mark.parametrize(("place", "said"), [(0, "the good end, c0"), (4, "the bad end, c4")])
def test_an_end_that_cannot_be_built_is_refused(tmp_path: Path, place: int, said: str) -> None:
    levels = steps(2, size=5)
    levels[place] = NO
    machine = Machine(levels)
    found = machine.search(tmp_path)
    assert found.problem.startswith(said)
    # A good end that does not work says it all.
    assert place != 0 or machine.measured == [0]
    assert "does not compile" in found.problem


def test_a_stopped_search_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    whole = Machine(steps(7))
    expected = whole.search(tmp_path / "whole")
    total = 0
    for stop in (3, 9, 21):
        machine = Machine(steps(7), seed=stop)
        machine.stops_after = stop
        with pytest.raises(KeyboardInterrupt):
            machine.search(tmp_path)
        total += stop
        # Killed in the middle of a line.
        with (tmp_path / "j.jsonl").open("a") as file:
            file.write('{"key": "st')
    machine = Machine(steps(7), seed=1)
    found = machine.search(tmp_path)
    assert found.suspects == expected.suspects == ("c7",)
    assert total + len(machine.measured) == len(whole.measured)
    again = Machine(steps(7))
    assert again.search(tmp_path) == found
    assert again.measured == []


def test_a_journal_of_another_question_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"ends": ["a", "b"]})
    Journal(tmp_path / "j", {"ends": ["a", "b"]})
    with pytest.raises(DataError, match="another question"):
        Journal(tmp_path / "j", {"ends": ["a", "c"]})
    (tmp_path / "k").write_text('{"question": {}}\n{"key": 3\n')
    with pytest.raises(DataError, match="start anew with --fresh"):
        Journal(tmp_path / "k", {})


def test_two_candidates_need_no_step(tmp_path: Path) -> None:
    found = Machine([1.0, 1.05]).search(tmp_path)
    assert found.steps == ()
    assert found.suspects == ("c1",)
    assert found.is_found


def test_wrong_answers_are_rare(tmp_path: Path) -> None:
    """A 3 % step in noise of 1 %: found, or said not to be; wrong at most once in twenty."""
    wrong = named = 0
    for seed in range(60):
        machine = Machine(steps(4, size=9, factor=1.03), spread=0.01, seed=seed)
        found = machine.search(tmp_path / str(seed))
        if found.is_found:
            named += 1
            wrong += found.suspects != ("c4",)
    assert wrong <= 3
    assert named >= 20


class Stumbling(Machine):
    """The first process of a round is slow, as after a pause, whosever it is."""

    def __init__(self, levels: list[float | Reading], penalty: float, spread: float = 1e-4) -> None:
        super().__init__(levels, spread)
        self.penalty = penalty

    def __call__(self, place: int) -> Reading:
        reading = super().__call__(place)
        # Both ends alone: rounds of two.
        if len(self.measured) % 2 == 1 and reading.seconds is not None:
            return Reading(reading.seconds * self.penalty, reading.status)
        return reading


@pytest.mark.parametrize("penalty", [1.06, 1 / 1.06])
def test_who_goes_first_in_a_round_makes_no_difference(tmp_path: Path, penalty: float) -> None:
    """Equal ends stay equal: were one of them always first, it would be 6 % slower, or faster."""
    machine = Stumbling([1.0, 1.0], penalty)
    found = machine.search(tmp_path)
    assert "good and bad do not really differ here" in found.problem
    assert not found.is_wrong_way
    first = machine.measured[::2]
    assert abs(first.count(0) - first.count(1)) <= 1
    assert found.ends is not None
    assert found.ends.estimate.ratio == pytest.approx(1.0, abs=2e-3)


def test_steady_drift_is_the_same_for_both_ends(tmp_path: Path) -> None:
    machine = Machine([1.0, 1.05], spread=0.0)
    machine.drift = 0.002
    found = machine.search(tmp_path)
    assert len(machine.measured) == 24  # clear at the first look, the ends and the answer
    assert found.ends is not None
    assert found.ends.estimate.ratio == pytest.approx(1.05, abs=1e-5)


def test_a_candidate_and_both_ends_take_turns_too(tmp_path: Path) -> None:
    machine = Machine(steps(1, size=3))
    machine.search(tmp_path)
    after_ends = machine.measured[12:]
    assert after_ends[:9] == [1, 0, 2, 2, 0, 1, 1, 0, 2]
