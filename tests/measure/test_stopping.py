"""The stopping rule against fed numbers: no clock."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.measure.stopping import StoppingRule, StopReason, median, median_interval


def new_rule(max_samples: int = 100, budget_s: float = 1.0) -> StoppingRule:
    return StoppingRule(
        target_rel_ci=0.02, budget_s=budget_s, min_samples=5, max_samples=max_samples
    )


def run_until_stopped(
    values: Sequence[float], rule: StoppingRule | None = None
) -> tuple[int, StopReason | None]:
    rule = rule or new_rule()
    for n in range(1, len(values) + 1):
        reason = rule.decide(values[:n], sum(values[:n]))
        if reason is not None:
            return n, reason
    return len(values), None


def test_equal_samples_converge_at_the_minimum() -> None:
    assert run_until_stopped([0.001] * 50) == (5, StopReason.CONVERGED)


def test_the_minimum_is_taken_even_when_the_budget_is_gone() -> None:
    assert run_until_stopped([2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (5, StopReason.BUDGET)


def test_wild_samples_end_at_the_most_samples() -> None:
    values = [0.0001, 0.0003] * 100
    assert run_until_stopped(values, new_rule(max_samples=25)) == (25, StopReason.MAX_SAMPLES)


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


def test_noise_that_no_budget_could_average_out_ends_early() -> None:
    # Half width ~ 1.96 * 1.25 * 0.6 / sqrt(n): 2 % would take 5,400 samples, 1,000 are allowed.
    rng = random.Random(5)
    early = 0
    for _ in range(20):
        values = [0.001 * rng.gauss(1.0, 0.6) for _ in range(1000)]
        n, reason = run_until_stopped(values, new_rule(max_samples=1000, budget_s=1e9))
        early += reason is StopReason.NOISE_STABLE and n < 200
    assert early >= 18


def test_noise_that_the_budget_can_average_out_is_sampled_to_the_end() -> None:
    # 10 %: about 150 samples are enough, and 1,000 are allowed.
    rng = random.Random(6)
    ends = [
        run_until_stopped(
            [0.001 * rng.gauss(1.0, 0.1) for _ in range(1000)],
            new_rule(max_samples=1000, budget_s=1e9),
        )[1]
        for _ in range(20)
    ]
    assert ends.count(StopReason.CONVERGED) >= 19


def test_a_budget_that_will_not_do_is_not_spent() -> None:
    rng = random.Random(7)
    spent = 0.0
    rule = new_rule(max_samples=10**6, budget_s=1.0)
    samples: list[float] = []
    reason = None
    while reason is None:
        samples.append(0.001 * rng.gauss(1.0, 0.5))  # about 3,800 samples for 2 %
        spent += 0.001
        reason = rule.decide(samples, spent)
    assert reason is StopReason.NOISE_STABLE
    assert spent < 0.8
