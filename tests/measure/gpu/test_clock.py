"""Clocks from stamps whose truth is known, and what the throttle rule does with them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.measure.gpu.clock import (
    MAX_CLOCK_ERROR,
    MAX_LOST_BLOCKS,
    ThrottleRule,
    ThrottleVerdict,
    sample_clocks_hz,
    shortest_span_ns,
    sm_clock_hz,
)
from attnbench.measure.gpu.runtime import Stamp

#: A global timer counts from 1970: a float of seconds has no microseconds left there.
EPOCH_NS = 1_795_000_000_000_000_000


def stamp(at_ns: float, clock_hz: float, step_ns: int, sm: int = 0) -> Stamp:
    """What a device reads `at_ns` after the epoch, at a steady clock, by a timer in steps."""
    time_ns = (EPOCH_NS + int(at_ns)) // step_ns * step_ns
    return Stamp(sm, 10**12 + round(at_ns * 1e-9 * clock_hz), time_ns)


clocks = st.floats(1e8, 3e9)
steps = st.sampled_from([1, 32, 1000, 1024])


@given(clocks, steps, st.floats(0, 1e6), st.floats(1, 1e4))
@settings(deadline=None)
def test_the_clock_is_right_within_the_error_or_not_given(
    clock: float, step: int, begin_ns: float, steps_long: float
) -> None:
    begin = stamp(begin_ns, clock, step)
    end = stamp(begin_ns + steps_long * step, clock, step)
    found = sm_clock_hz(begin, end, step)
    if steps_long >= 1 / MAX_CLOCK_ERROR + 1:
        assert found is not None
    if found is not None:
        # One step of the timer, and one cycle of each counter.
        cycles = steps_long * step * 1e-9 * clock
        # A span read as S is truly S ± one step: the clock is off by that in S.
        assert found == pytest.approx(clock, rel=MAX_CLOCK_ERROR * 1.001 + 2 / max(cycles, 1))


def test_no_clock_across_multiprocessors_or_from_slots_nobody_wrote() -> None:
    begin, end = stamp(0, 2e9, 32), stamp(1e5, 2e9, 32)
    assert sm_clock_hz(begin, end, 32) == pytest.approx(2e9, rel=1e-3)
    assert sm_clock_hz(begin, Stamp(1, end.cycles, end.time_ns), 32) is None
    nobody = Stamp(-1, 0, 0)
    assert sm_clock_hz(nobody, nobody, 32) is None
    assert sm_clock_hz(Stamp(-1, 0, 0), Stamp(-1, 10, 10**6), 32) is None
    assert sm_clock_hz(end, begin, 32) is None
    assert sm_clock_hz(begin, Stamp(0, begin.cycles - 5, end.time_ns), 32) is None


def test_the_shortest_span_is_twenty_steps() -> None:
    assert shortest_span_ns(32) == 640
    assert shortest_span_ns() == 20_000
    begin = Stamp(0, 0, EPOCH_NS)
    assert sm_clock_hz(begin, Stamp(0, 1280, EPOCH_NS + 640), 32) == pytest.approx(2e9)
    assert sm_clock_hz(begin, Stamp(0, 1278, EPOCH_NS + 639), 32) is None


def test_a_long_sample_has_its_own_clock() -> None:
    stamps = [
        Stamp(0, 0, 0),
        Stamp(0, 100_000, 50_000),  # 2 GHz
        Stamp(0, 102_000, 51_000),
        Stamp(0, 152_000, 101_000),  # 1 GHz
    ]
    assert sample_clocks_hz(stamps) == pytest.approx([2e9, 1e9])


@given(clocks, st.integers(1, 60), st.floats(500, 8000), st.sampled_from([32, 1000]))
@settings(deadline=None)
def test_short_samples_take_their_neighbours_in(
    clock: float, count: int, length_ns: float, step: int
) -> None:
    stamps = [stamp(i * length_ns, clock, step) for i in range(2 * count)]
    found = sample_clocks_hz(stamps, step)
    assert len(found) == count
    enough = (2 * count - 1) * length_ns >= shortest_span_ns(step) + step
    near_enough = 60 * length_ns >= shortest_span_ns(step) + step
    for hz in found:
        if enough and near_enough:
            assert hz is not None
        if hz is not None:
            rel = MAX_CLOCK_ERROR * 1.001 + 2e9 / (shortest_span_ns(step) * clock)
            assert hz == pytest.approx(clock, rel=rel)


def test_a_neighbour_that_was_not_written_is_stepped_over() -> None:
    stamps = [stamp(i * 5000, 1.5e9, 1000) for i in range(20)]
    stamps[3] = Stamp(-1, 0, 0)
    assert all(hz is not None for hz in sample_clocks_hz(stamps))
    stamps[2] = Stamp(-1, 0, 0)
    found = sample_clocks_hz(stamps)
    assert found[1] is not None
    assert found[1] == pytest.approx(1.5e9, rel=0.06)
    assert sample_clocks_hz([Stamp(-1, 0, 0)] * 200) == [None] * 100


def keep(*flags: int) -> tuple[bool, ...]:
    return tuple(bool(flag) for flag in flags)


def test_samples_below_the_threshold_go_and_the_device_rests() -> None:
    rule = ThrottleRule(2e9)
    assert rule.judge([2e9, 1.5e9]) == ThrottleVerdict(keep(1, 1), 0.0, False)
    assert rule.judge([2e9, 1.49e9, 1.9e9]) == ThrottleVerdict(keep(1, 0, 1), 0.05, False)
    assert rule.judge([1e9]) == ThrottleVerdict(keep(0), 0.05, False)
    assert (rule.discarded, rule.lost_blocks) == (2, 1)
    assert rule.judge([2e9]) == ThrottleVerdict(keep(1), 0.0, False)
    assert (rule.discarded, rule.lost_blocks) == (2, 0)


def test_a_clock_nobody_knows_keeps_its_sample() -> None:
    rule = ThrottleRule(2e9)
    assert rule.judge([None, math.nan]) == ThrottleVerdict(keep(1, 1), 0.0, False)
    assert ThrottleRule().judge([None, math.nan]).keep == keep(1, 1)
    assert ThrottleRule().judge([]) == ThrottleVerdict((), 0.0, False)


def test_rests_grow_and_at_last_it_gives_up() -> None:
    rule = ThrottleRule(2e9)
    verdicts = [rule.judge([1e9, 1e9]) for _ in range(MAX_LOST_BLOCKS)]
    rests = [verdict.rest_s for verdict in verdicts]
    assert rests == pytest.approx([0.05, 0.05, 0.05, 0.125, 0.3125, 0.5, 0.5, 0.5, 0.5, 0.0])
    assert [verdict.give_up for verdict in verdicts] == [False] * 9 + [True]
    assert rule.discarded == 2 * MAX_LOST_BLOCKS


def test_one_good_sample_starts_the_count_and_the_rests_again() -> None:
    rule = ThrottleRule(2e9)
    for _ in range(MAX_LOST_BLOCKS - 1):
        assert not rule.judge([1e9]).give_up
    assert rule.judge([1e9, 2e9]).rest_s == 0.05
    assert rule.lost_blocks == 0
    assert rule.judge([1e9]).rest_s == 0.05


def test_without_a_rated_clock_the_best_seen_takes_its_place() -> None:
    rule = ThrottleRule()
    assert rule.judge([1e9]).keep == keep(1)
    assert rule.judge([2e9, 1e9]).keep == keep(1, 0)
    assert rule.judge([1e9]).keep == keep(0)
    # With one, a clock above it (a boost) does not move the reference.
    rated = ThrottleRule(1e9)
    rated.judge([2e9])
    assert rated.judge([0.8e9]).keep == keep(1)


@given(st.lists(st.lists(st.one_of(st.none(), st.floats(1e8, 3e9)), max_size=8), max_size=30))
@settings(deadline=None)
def test_what_is_kept_and_counted_adds_up(blocks: list[list[float | None]]) -> None:
    rule, lost_in_a_row, discarded = ThrottleRule(2e9), 0, 0
    for block in blocks:
        verdict = rule.judge(block)
        expected = tuple(clock is None or clock >= 1.5e9 for clock in block)
        assert verdict.keep == expected
        discarded += expected.count(False)
        lost_in_a_row = lost_in_a_row + 1 if block and not any(expected) else 0
        assert (rule.discarded, rule.lost_blocks) == (discarded, lost_in_a_row)
        assert verdict.give_up == (lost_in_a_row >= MAX_LOST_BLOCKS)
        assert (verdict.rest_s > 0) == (not all(expected) and not verdict.give_up)
