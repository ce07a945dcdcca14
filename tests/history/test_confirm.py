"""The second look, against scipy and simulated noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.history.confirm import LARGEST_P, ROUNDS, is_futile, rank_sum_p, second_look
from attnbench.history.rule import TIMER_NOISE

EVENT = TIMER_NOISE["event"]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_p_is_that_of_an_exact_rank_sum_test(first: int, second: int, seed: int) -> None:
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(seed)
    a, b = rng.random(first) + 0.3, rng.random(second)
    expected = mannwhitneyu(a, b, alternative="greater", method="exact").pvalue
    assert rank_sum_p(a.tolist(), b.tolist()) == pytest.approx(expected, rel=1e-12)


def test_equal_values_share_their_rank() -> None:
    assert rank_sum_p([1.0] * 5, [1.0] * 5) >= 0.5
    # Ranks 1, 2.5, 2.5, 4: of the six pairs {2.5, 4} has the largest sum, and comes twice.
    assert rank_sum_p([2.0, 3.0], [1.0, 2.0]) == pytest.approx(2 / 6)


def test_the_interval_is_that_of_the_rank_sum() -> None:
    """It holds the ratio as often as it says, whatever the noise looks like."""
    rng = np.random.default_rng(9)
    inside = 0
    for _ in range(600):
        a, b = np.exp(rng.standard_t(2, (2, ROUNDS)) * 0.01)
        found = second_look((1.05 * a).tolist(), b.tolist(), 0.9).estimate
        inside += found.low <= 1.05 <= found.high
    assert 0.87 <= inside / 600 <= 0.96


def test_a_step_is_confirmed_and_noise_is_not() -> None:
    rng = np.random.default_rng(4)
    confirmed = [0, 0]
    for _ in range(1000):
        a, b = np.exp(rng.standard_t(3, (2, ROUNDS)) * 0.004)
        for i, step in enumerate((1.0, 1.04)):
            found = second_look((step * a).tolist(), b.tolist())
            confirmed[i] += found.is_slower(EVENT)
    assert confirmed[0] == 0
    assert confirmed[1] >= 950


def test_a_difference_within_the_floor_is_no_alarm_however_sure() -> None:
    found = second_look([1.01 + i * 1e-6 for i in range(10)], [1.0 + i * 1e-6 for i in range(10)])
    assert found.p < 1e-4
    assert not found.is_slower(EVENT)
    assert not found.is_open(EVENT)


def test_too_few_processes_leave_it_open() -> None:
    found = second_look([1.3, 1.31, 1.32], [1.0, 1.01, 1.02])
    assert not found.is_enough
    assert not found.is_slower(EVENT)
    assert found.is_open(EVENT)
    assert not found.estimate.enough
    assert second_look([1.3] * ROUNDS, [1.0, 1.01, 1.02]).is_slower(EVENT)


def test_a_larger_p_than_the_night_allows_is_no_alarm() -> None:
    found = second_look([1.3] * 10, [1.0] * 9 + [1.4])
    assert 0 < found.p <= LARGEST_P
    assert found.is_slower(EVENT)
    assert not found.is_slower(EVENT, found.p / 2)
    assert found.is_open(EVENT)


def test_futile_is_what_shows_nothing_after_four_rounds() -> None:
    quiet, slow = [1.0, 1.001, 0.999, 1.0], [1.05] * 4
    assert is_futile(quiet, quiet, EVENT)
    assert not is_futile(quiet[:3], quiet[:3], EVENT)
    assert not is_futile(slow, quiet, EVENT)
