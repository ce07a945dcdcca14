"""How a sweep is measured. One value, sent to every worker process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnbench.errors import UsageError

#: Timers of a GPU: events around a call, events in a captured graph, kernels in a CUPTI trace.
GPU_TIMERS = ("event", "graph", "cupti_span", "cupti_sum")
TIMERS = ("wall", "fake", *GPU_TIMERS)
L2_STATES = ("cold", "hot")


def default_timer(device_kind: str) -> str:
    """What times a device when nobody asks: events work wherever a GPU does."""
    return "wall" if device_kind == "cpu" else "event"


#: Replicates from 100 on are confirmations (`history/series.py`).
MAX_REPLICATES = 99


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """Settings of the measuring rooms.

    Attributes:
        timer: `wall` (monotonic host clock; the only honest one on a CPU), one of `GPU_TIMERS`, or
            `fake` (exact times from a formula, for tests of everything behind the timer).
        l2_states: states of the L2 cache a GPU timer measures metric `attention` in.
        locked_clock_hz: clock the GPU is held at while this runs; 0.0: it is left alone.
        rated_clock_hz: clock samples are judged by where nothing is locked; 0.0: the device's own.
        replicates: fresh processes that measure every point.
        first_replicate: number of the first one; confirmations count on from where a run stopped.
        budget_s: seconds of samples per point and metric `attention`; other metrics get a fifth.
        target_rel_ci: stop when the interval of the median is this narrow, relative to the median.
        min_samples, max_samples: bounds on the number of samples.
        timeout_s: wall seconds one point may take before its worker is killed.
        fake_slowdown: (backend, factor) pairs the fake timer multiplies its times with.
        shard: the part of the plan that is measured, `2/4`; "": all of it (`measure/shard.py`).
        reference: the Python of the build before, for the second look (`measure/reference.py`);
            "": there is none.
        confirm_points: at most so many points get a second look.
    """

    timer: str = "wall"
    l2_states: tuple[str, ...] = ("cold",)
    locked_clock_hz: float = 0.0
    rated_clock_hz: float = 0.0
    replicates: int = 1
    first_replicate: int = 0
    budget_s: float = 0.5
    target_rel_ci: float = 0.02
    min_samples: int = 5
    max_samples: int = 1000
    timeout_s: float = 120.0
    fake_slowdown: tuple[tuple[str, float], ...] = ()
    shard: str = ""
    reference: str = ""
    confirm_points: int = 200

    def __post_init__(self) -> None:
        if self.timer not in TIMERS:
            raise UsageError(f"--timer {self.timer!r} is not known; use one of {', '.join(TIMERS)}")
        if not self.l2_states or set(self.l2_states) - set(L2_STATES):
            raise UsageError(f"--l2 {' '.join(self.l2_states)!r}: use cold, hot, or both")
        if not 1 <= self.replicates <= MAX_REPLICATES:
            raise UsageError(f"--replicates {self.replicates}: use 1 to {MAX_REPLICATES}")
        if self.confirm_points < 1:
            raise UsageError(f"--confirm-at-most {self.confirm_points}: use 1 or more, e.g. 200")
        if self.locked_clock_hz < 0 or (self.locked_clock_hz and self.timer not in GPU_TIMERS):
            raise UsageError(
                f"--lock-clocks {self.locked_clock_hz / 1e6:g}: it is for GPU timers and needs a "
                "clock in MHz, e.g. 1500; leave it out"
            )
        if self.rated_clock_hz < 0 or (self.rated_clock_hz and self.timer not in GPU_TIMERS):
            raise UsageError(
                f"--rated-clock {self.rated_clock_hz / 1e6:g}: it is for GPU timers and needs a "
                "clock in MHz, e.g. 1200; leave it out"
            )
        if self.fake_slowdown and self.timer != "fake":
            raise UsageError(
                f"--fake-slowdown is for --timer fake, and the timer is {self.timer}; leave it "
                "out, or rehearse with --timer fake"
            )
        for name in ("budget_s", "target_rel_ci", "timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)}: use a number above 0, e.g. 0.5")


def parse_slowdown(text: str) -> tuple[str, float]:
    """Read `CPU_ATTN=1.2`. Raises UsageError."""
    name, equals, factor = text.partition("=")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not (name and equals and 0 < value < math.inf):
        raise UsageError(f"--fake-slowdown {text!r}: write BACKEND=FACTOR, e.g. CPU_ATTN=1.2")
    return name, value
