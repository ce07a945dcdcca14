"""How a sweep is measured. One value, sent to every worker process."""

from __future__ import annotations

from dataclasses import dataclass

from attnbench.errors import UsageError

TIMERS = ("wall", "fake")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """Settings of the measuring rooms.

    Attributes:
        timer: `wall` (monotonic host clock; the only honest one on a CPU) or `fake` (exact times
            from a formula, for tests of everything behind the timer).
        replicates: fresh processes that measure every point.
        first_replicate: number of the first one; confirmations count on from where a run stopped.
        budget_s: seconds of samples per point and metric `attention`; other metrics get a fifth.
        target_rel_ci: stop when the interval of the median is this narrow, relative to the median.
        min_samples, max_samples: bounds on the number of samples.
        timeout_s: wall seconds one point may take before its worker is killed.
        fake_slowdown: (backend, factor) pairs the fake timer multiplies its times with.
    """

    timer: str = "wall"
    replicates: int = 1
    first_replicate: int = 0
    budget_s: float = 0.3
    target_rel_ci: float = 0.02
    min_samples: int = 5
    max_samples: int = 1000
    timeout_s: float = 120.0
    fake_slowdown: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.timer not in TIMERS:
            raise UsageError(f"--timer {self.timer!r} is not known; use one of {', '.join(TIMERS)}")
        if self.replicates < 1:
            raise UsageError(f"--replicates {self.replicates} measures nothing; use 1 or more")
        for name in ("budget_s", "target_rel_ci", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} = {getattr(self, name)} must be above 0")


def parse_slowdown(text: str) -> tuple[str, float]:
    """Read `CPU_ATTN=1.2`. Raises UsageError."""
    name, equals, factor = text.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not equals or value <= 0:
        raise UsageError(f"--fake-slowdown {text!r}: write BACKEND=FACTOR, e.g. CPU_ATTN=1.2")
    return name, value
