"""What of a night is picked, called faster and called an alarm, over all of its series together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from attnbench.history.confirm import LARGEST_P, SecondLook
from attnbench.history.gate import Floats, Screen
from attnbench.history.looks import FirstLook, alarm_limit, is_candidate, looks_of, other_side
from attnbench.history.rule import Estimate
from attnbench.history.series import RunValue
from attnbench.store.record import Status
from tests.history.fake import START

SLOWER = Estimate(1.1, 1.05, 1.15)


def night(p: list[float], p_faster: list[float] | None = None, change: float = 0.1) -> Screen:
    shape = len(p)
    return Screen(
        change=np.full(shape, change),
        half_width=np.full(shape, 0.01),
        largest_change=np.full(shape, change),
        p=np.array(p),
        p_faster=np.array(p_faster or [1.0] * shape),
        level_runs=np.full(shape, 10),
        level_half_width=np.full(shape, 0.01),
    )


def floors(count: int) -> Floats:
    return np.full(count, 0.02)


def looked_at(
    *p: float | None, is_picked: bool = True
) -> list[tuple[FirstLook, SecondLook | None]]:
    first = FirstLook(
        SLOWER, is_picked=is_picked, is_sure=is_picked, is_faster=False, calm_high=1.0
    )
    return [(first, None if one is None else SecondLook(SLOWER, one, True)) for one in p]


@pytest.mark.parametrize(
    ("p", "is_picked", "is_sure"),
    [(0.051, False, False), (0.049, True, False), (0.0051, True, False), (0.0049, True, True)],
)
def test_a_night_of_one_series_has_its_own_limits(p: float, is_picked: bool, is_sure: bool) -> None:
    (found,) = looks_of(night([p]), floors(1))
    assert found is not None
    assert (found.is_picked, found.is_sure) == (is_picked, is_sure)


def test_of_many_series_what_chance_alone_would_do_is_no_improvement() -> None:
    chance = [(i + 1) / 201 for i in range(200)]
    ones = [1.0] * 200
    assert not any(one and one.is_faster for one in looks_of(night(ones, chance), floors(200)))
    chance[7] = 1e-6
    found = looks_of(night(ones, chance), floors(200))
    assert [n for n, one in enumerate(found) if one and one.is_faster] == [7]


def test_what_was_picked_and_not_measured_again_makes_an_alarm_harder() -> None:
    assert alarm_limit(looked_at(0.004)) == 0.004
    assert alarm_limit(looked_at(0.004, *[None] * 20)) == 0.0
    assert alarm_limit(looked_at(0.002, *[None] * 20)) == 0.002
    assert alarm_limit(looked_at(0.004) + looked_at(*[None] * 20, is_picked=False)) == 0.004


def test_no_night_makes_a_p_above_half_a_percent_an_alarm() -> None:
    assert alarm_limit(looked_at(*[0.01] * 30)) == LARGEST_P
    assert alarm_limit([]) == LARGEST_P


def test_short_histories_count_once_they_have_a_second_look() -> None:
    (_, second), *_ = looked_at(0.004)
    short: list[tuple[FirstLook | None, SecondLook | None]] = [(None, None)] * 50
    assert alarm_limit([*short, (None, second)]) == 0.004
    weak = looked_at(1.0)[0][1]
    assert alarm_limit([*[(None, weak)] * 20, (None, second)]) == 0.0


def value(seconds: float, again: int = 0, before: int = 0) -> RunValue:
    return RunValue(
        run_id=str(seconds),
        started_at=START,
        status=Status.OK,
        replicates=(seconds,),
        confirmations=(seconds,) * again,
        references=(9.0,) * before,
    )


@pytest.mark.parametrize(
    ("again", "other"),
    [
        ([0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]),
        ([0, 0, 0, 0, 10, 10], [0, 1, 2, 3]),  # a slow-down that is two nights old
        ([0, 0, 0, 0, 10, 4], [0, 1, 2, 3, 4, 5]),  # given up: it was none
        ([0, 10, 10, 0, 0, 10], [0, 1, 2, 3, 4]),  # one of long ago is the level
        ([10, 10, 10, 10, 10, 10], [0, 1, 2]),
    ],
)
def test_a_slow_down_of_last_night_is_not_what_tonights_is_held_against(
    again: list[int], other: list[int]
) -> None:
    level = [value(1.0 + n, count) for n, count in enumerate(again)]
    assert other_side(value(7.0, 10), level) == tuple(1.0 + n for n in other)
    assert other_side(value(7.0, 10, before=5), level) == (9.0,) * 5


def test_what_only_the_build_before_would_pick_is_no_candidate_without_it() -> None:
    value = RunValue(run_id="r", started_at=START, status=Status.OK, replicates=(1.0,))
    again = replace(value, confirmations=(1.0,) * 4, references=(1.0,))
    beside = replace(again, references=(1.0,) * 4)
    picked = FirstLook(SLOWER, is_picked=True, is_sure=False, is_faster=False, calm_high=1.0)
    sure = replace(picked, is_sure=True)
    assert is_candidate(sure, value, False)
    assert not is_candidate(picked, value, False)
    assert is_candidate(picked, value, True)
    # Of what was measured again, the rounds say whether it was at hand.
    assert not is_candidate(picked, again, True)
    assert is_candidate(picked, beside, False)
    assert is_candidate(None, value, False)
