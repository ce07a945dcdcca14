"""Timers: each named in the row it made, never silently replaced by another.

A timer is an object with a fake: `FakeTimer` ships in the package and makes everything behind it
exact, so that the whole line can be tested without a clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attnbench.measure.options import MeasureOptions
from attnbench.measure.stopping import StoppingRule, StopReason
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops

#: Seconds of calls before the first sample.
_WARM_UP_S = 0.05


@dataclass(frozen=True, slots=True)
class Timing:
    """Samples in seconds, in the order taken, and why sampling ended."""

    samples: tuple[float, ...]
    stop_reason: StopReason

    @property
    def is_noisy(self) -> bool:
        """Sampling ended before the median was known to the target."""
        return self.stop_reason is not StopReason.CONVERGED


@dataclass(frozen=True, slots=True)
class Subject:
    """What is being timed, for timers that compute instead of measuring."""

    workload: Workload
    backend: str
    metric: str
    replicate: int


class Timer(Protocol):
    """Times one call again and again until the rule says stop."""

    name: str
    l2_state: str

    def floor_s(self) -> float:
        """Seconds this timer reads for a call that does nothing."""
        ...

    def time(self, call: Callable[[], object], rule: StoppingRule, subject: Subject) -> Timing:
        """Sample `call`. Calls before the first sample are warm-up."""
        ...


class WallTimer:
    """Monotonic host clock around each call. Honest for CPU backends, where a call is synchronous.

    Calls repeat over the same tensors: what fits in a cache is in it (`hot`).
    """

    name = "wall"
    l2_state = "hot"

    def floor_s(self) -> float:
        def nothing() -> None:
            return None

        samples = sorted(self._sample(nothing) for _ in range(200))
        return samples[len(samples) // 2]

    def time(self, call: Callable[[], object], rule: StoppingRule, subject: Subject) -> Timing:
        self._warm_up(call, min(_WARM_UP_S, rule.budget_s))
        samples: list[float] = []
        # A collection in the middle of a sample is the harness's time, not the kernel's.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            started = time.perf_counter()
            while True:
                samples.append(self._sample(call))
                reason = rule.decide(samples, time.perf_counter() - started)
                if reason is not None:
                    return Timing(tuple(samples), reason)
        finally:
            if was_enabled:
                gc.enable()

    @staticmethod
    def _warm_up(call: Callable[[], object], seconds: float) -> None:
        """At least one call; for short ones enough that the clock and the caches have settled."""
        until = time.perf_counter() + seconds
        while True:
            call()
            if time.perf_counter() >= until:
                return

    @staticmethod
    def _sample(call: Callable[[], object]) -> float:
        before = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - before) * 1e-9


class FakeTimer:
    """Exact times from a formula: no clock, the same on every machine.

    seconds = factor * (bytes / 100 GB/s + FLOPs / 1 TFLOP/s + 1 µs), where the factor is 1 for the
    metric `attention` and smaller for the others, times any `fake_slowdown` of the backend. Five
    samples, spread by 0.1 % around that value, so that intervals are narrow but not empty;
    replicates differ by 0.1 % too.
    """

    name = "fake"
    l2_state = "hot"
    _SPREAD = (0.0, -0.001, 0.001, -0.0005, 0.0005)
    _FACTOR = {"attention": 1.0, "page_gather": 0.5, "kv_cache_write": 0.1, "metadata_build": 0.01}

    def __init__(self, slowdown: tuple[tuple[str, float], ...] = ()) -> None:
        self._slowdown = dict(slowdown)

    def floor_s(self) -> float:
        return 0.0

    def seconds(self, subject: Subject) -> float:
        """The exact median the fake timer gives for `subject`."""
        roofline = (
            attention_bytes(subject.workload) / 100e9
            + attention_flops(subject.workload) / 1e12
            + 1e-6
        )
        replicate = 1.0 + self._SPREAD[subject.replicate % len(self._SPREAD)]
        return (
            roofline
            * self._FACTOR[subject.metric]
            * self._slowdown.get(subject.backend, 1.0)
            * replicate
        )

    def time(self, call: Callable[[], object], rule: StoppingRule, subject: Subject) -> Timing:
        call()
        exact = self.seconds(subject)
        return Timing(tuple(exact * (1.0 + s) for s in self._SPREAD), StopReason.CONVERGED)


def make_timer(options: MeasureOptions) -> Timer:
    """The timer `options` names."""
    if options.timer == "fake":
        return FakeTimer(options.fake_slowdown)
    return WallTimer()
