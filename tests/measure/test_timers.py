"""Timers: the fake is exact, the wall clock counts calls and takes the collector out of the way."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest

from attnbench.errors import UsageError
from attnbench.measure.options import MeasureOptions, parse_slowdown
from attnbench.measure.sampling import Target, Timing, sample
from attnbench.measure.stopping import StoppingRule, StopReason
from attnbench.measure.timers import FakeTimer, Subject, Timer, WallTimer, make_timer
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops

SUBJECT = Subject(Workload.parse("8q1s4k"), "CPU_ATTN", "attention", 0)


def timed(timer: Timer, call: Callable[[], object]) -> Timing:
    rule = StoppingRule(target_rel_ci=0.05, budget_s=0.2, min_samples=5, max_samples=20)
    target = Target(call)
    return sample(timer.open(target, SUBJECT, "hot"), rule, target)


def test_fake_times_are_the_formula_and_run_the_call_once() -> None:
    calls: list[int] = []
    timing = timed(FakeTimer(), lambda: calls.append(1))
    workload = SUBJECT.workload
    exact = attention_bytes(workload) / 100e9 + attention_flops(workload) / 1e12 + 1e-6
    assert calls == [1]
    assert sorted(timing.samples)[2] == exact
    assert timing.stop_reason is StopReason.CONVERGED
    assert not timing.is_noisy


def test_fake_slowdown_multiplies_one_backend() -> None:
    slow = FakeTimer((parse_slowdown("CPU_ATTN=1.5"),))
    other = Subject(SUBJECT.workload, "TORCH_SDPA", "attention", 0)
    assert slow.seconds(SUBJECT) == pytest.approx(1.5 * FakeTimer().seconds(SUBJECT), rel=1e-12)
    assert slow.seconds(other) == FakeTimer().seconds(other)


@pytest.mark.parametrize(
    "text",
    [
        *("CPU_ATTN", "CPU_ATTN=", "CPU_ATTN=fast", "CPU_ATTN=-1", "CPU_ATTN=0"),
        *("CPU_ATTN=nan", "CPU_ATTN=inf", "=2"),
    ],
)
def test_a_wrong_slowdown_says_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match=r"CPU_ATTN=1\.2"):
        parse_slowdown(text)


def test_wall_time_is_at_least_the_call_and_warm_up_is_no_sample() -> None:
    calls: list[bool] = []

    def call() -> None:
        calls.append(gc.isenabled())
        time.sleep(0.002)

    timing = timed(WallTimer(), call)
    assert len(calls) > len(timing.samples)  # warm-up calls are no samples
    assert all(sample >= 0.002 for sample in timing.samples)
    assert not any(calls[-len(timing.samples) :])  # no collection inside a sample
    assert gc.isenabled()


def test_the_collector_comes_back_after_a_failing_call() -> None:
    def fail() -> None:
        if not gc.isenabled():
            raise RuntimeError("kernel failed")

    with pytest.raises(RuntimeError):
        timed(WallTimer(), fail)
    assert gc.isenabled()


def test_floor_is_small_and_named_timers_are_made() -> None:
    assert 0 <= WallTimer().floor_s() < 1e-3
    assert make_timer(MeasureOptions(timer="fake")).name == "fake"
    assert make_timer(MeasureOptions()).name == "wall"
    with pytest.raises(UsageError, match="wall, fake, event, graph"):
        MeasureOptions(timer="cupti")
