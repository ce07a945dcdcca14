"""The stopping rule against fed numbers: no clock."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.measure.stopping import StoppingRule, StopReason, median, median_interval

RULE = StoppingRule(target_rel_ci=0.02, budget_s=1.0, min_samples=5, max_samples=100)


def run_until_stopped(values: Sequence[float]) -> tuple[int, StopReason | None]:
    for n in range(1, len(values) + 1):
        reason = RULE.decide(values[:n], sum(values[:n]))
        if reason is not None:
            return n, reason
    return len(values), None


def test_equal_samples_converge_at_the_minimum() -> None:
    assert run_until_stopped([0.001] * 50) == (5, StopReason.CONVERGED)


def test_the_minimum_is_taken_even_when_the_budget_is_gone() -> None:
    assert run_until_stopped([2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (5, StopReason.BUDGET)


def test_wild_samples_end_at_the_most_samples() -> None:
    values = [0.0001, 0.0003] * 100
    assert run_until_stopped(values) == (100, StopReason.MAX_SAMPLES)


def test_noise_that_averages_out_converges_before_the_budget() -> None:
    rng = random.Random(3)
    values = [0.001 * rng.gauss(1.0, 0.02) for _ in range(100)]
    n, reason = run_until_stopped(values)
    assert reason is StopReason.CONVERGED
    assert 5 <= n < 60


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    # 95 % nominal; the binomial steps make it conservative or slightly short at small n.
    rng = random.Random(11)
    for n in (11, 30, 101):
        hits = 0
        for _ in range(2000):
            ordered = sorted(rng.expovariate(1.0) for _ in range(n))
            low, high = median_interval(ordered)
            hits += low <= 0.6931471805599453 <= high
        assert 0.925 <= hits / 2000 <= 0.99, (n, hits)


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=60))
@settings(deadline=None)
def test_the_interval_holds_the_median_which_is_the_textbook_one(values: list[float]) -> None:
    ordered = sorted(values)
    low, high = median_interval(ordered)
    assert median(ordered) == statistics.median(values)
    assert low <= median(ordered) <= high
