"""Timers: each named in the row it made, never silently replaced by another.

A timer is an object with a fake: `FakeTimer` ships in the package and makes everything behind it
exact, so that the whole line can be tested without a clock. The timers of GPUs are in
`attnbench.measure.gpu`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from attnbench.measure.options import MeasureOptions
from attnbench.measure.sampling import Block, Session, Target
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops
from attnbench.workload.model import step_bytes, step_flops

#: Seconds of calls before the first sample.
_WARM_UP_S = 0.05

#: Seconds of calls in one block, between two looks at the stopping rule and the output.
_BLOCK_S = 0.005


@dataclass(frozen=True, slots=True)
class Subject:
    """What is being timed, for timers that compute instead of measuring."""

    workload: Workload
    backend: str
    metric: str
    replicate: int


class Timer(Protocol):
    """Times calls. Making one touches no device: the first use does.

    Attributes:
        name, execution: as stored.
        l2_states: cache states it was asked for; the first is that of rows without a time.
    """

    name: str
    execution: str
    l2_states: tuple[str, ...]

    @property
    def host(self) -> Timer:
        """The timer of what the host does: launching, building metadata."""
        ...

    def floor_s(self) -> float:
        """Seconds this timer reads for a call that does nothing."""
        ...

    def open(self, target: Target, subject: Subject, l2_state: str) -> Session:
        """Warm up on `target`, ready for its first block.

        Raises:
            TimerError: it cannot time this call.
        """
        ...


def _nothing() -> None:
    return None


class WallTimer:
    """Monotonic host clock around each call. Honest for CPU backends, where a call is synchronous.

    Calls repeat over the same tensors: what fits in a cache is in it (`hot`). With `drain` (a GPU's
    synchronize) before each call it times what the host does until a call returns.
    """

    name = "wall"
    execution = "eager"
    l2_states: tuple[str, ...] = ("hot",)

    def __init__(
        self, warm_up_s: float = _WARM_UP_S, drain: Callable[[], object] = _nothing
    ) -> None:
        self._warm_up_s = warm_up_s
        self._drain = drain

    @property
    def host(self) -> WallTimer:
        return self

    def floor_s(self) -> float:
        samples = sorted(_wall_sample(_nothing) for _ in range(200))
        return samples[len(samples) // 2]

    def open(self, target: Target, subject: Subject, l2_state: str) -> WallSession:
        return WallSession(target, self._warm_up_s, self._drain)


def _wall_sample(call: Callable[[], object]) -> float:
    before = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - before) * 1e-9


class WallSession:
    """Calls by the host's clock; the garbage collector waits between blocks."""

    l2_state = "hot"
    reuse_distance_bytes: int | None = None
    kernel_names: tuple[str, ...] = ()

    def __init__(self, target: Target, warm_up_s: float, drain: Callable[[], object]) -> None:
        self._call = target.call
        self._drain = drain
        self._warm_up(warm_up_s)

    def now_s(self) -> float:
        return time.perf_counter()

    def _warm_up(self, seconds: float) -> None:
        """At least one call; for short ones enough that the clock and the caches have settled."""
        until = time.perf_counter() + seconds
        while True:
            self._call()
            self._drain()  # or calls of a slow kernel would queue up by the thousand
            if time.perf_counter() >= until:
                break

    def block(self) -> Block:
        samples: list[float] = []
        # A collection in the middle of a sample is the harness's time, not the kernel's.
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            until = time.perf_counter() + _BLOCK_S
            while not samples or time.perf_counter() < until:
                self._drain()
                samples.append(_wall_sample(self._call))
        finally:
            if was_enabled:
                gc.enable()
        return Block(tuple(samples))


class FakeTimer:
    """Exact times from a formula: no clock, the same on every machine.

    seconds = factor * (bytes / 100 GB/s + FLOPs / 1 TFLOP/s + 1 µs), where the factor is 1 for the
    metric `attention` and smaller for the others, times any `fake_slowdown` of the backend. A step
    takes that of its attention, `layers` times, and bytes and FLOPs of all else likewise. Five
    samples, spread by 0.1 % around that value, so that intervals are narrow but not empty;
    replicates differ by 0.1 % too.
    """

    name = "fake"
    execution = "eager"
    l2_states: tuple[str, ...] = ("hot",)
    _SPREAD = (0.0, -0.001, 0.001, -0.0005, 0.0005)
    _FACTOR = {"attention": 1.0, "page_gather": 0.5, "kv_cache_write": 0.1, "metadata_build": 0.01}

    def __init__(self, slowdown: tuple[tuple[str, float], ...] = ()) -> None:
        self._slowdown = dict(slowdown)

    @property
    def host(self) -> FakeTimer:
        return self

    def floor_s(self) -> float:
        return 0.0

    def seconds(self, subject: Subject) -> float:
        """The exact median the fake timer gives for `subject`."""
        workload = subject.workload
        moved, flops = attention_bytes(workload), attention_flops(workload)
        seconds = moved / 100e9 + flops / 1e12 + 1e-6
        seconds *= self._slowdown.get(subject.backend, 1.0)
        if subject.metric == "step":
            layers = workload.shape.num_layers
            seconds *= layers
            seconds += (step_bytes(workload) - layers * moved) / 100e9
            seconds += (step_flops(workload) - layers * flops) / 1e12
        else:
            seconds *= self._FACTOR[subject.metric]
        return seconds * (1.0 + self._SPREAD[subject.replicate % len(self._SPREAD)])

    def open(self, target: Target, subject: Subject, l2_state: str) -> FakeSession:
        exact = self.seconds(subject)
        return FakeSession(target, tuple(exact * (1.0 + spread) for spread in self._SPREAD))


class FakeSession:
    """One call and five samples a block, and no time passes."""

    l2_state = "hot"
    reuse_distance_bytes: int | None = None
    kernel_names: tuple[str, ...] = ()

    def __init__(self, target: Target, samples: tuple[float, ...]) -> None:
        self._call = target.call
        self._samples = samples

    def now_s(self) -> float:
        return 0.0

    def block(self) -> Block:
        self._call()
        return Block(self._samples)


def make_timer(options: MeasureOptions) -> Timer:
    """The timer `options` names. Touches no device yet."""
    if options.timer == "fake":
        return FakeTimer(options.fake_slowdown)
    if options.timer == "wall":
        return WallTimer(min(_WARM_UP_S, options.budget_s))
    from attnbench.measure.gpu.timers import GpuTimer

    return GpuTimer(
        options.timer, options.l2_states, options.locked_clock_hz or options.rated_clock_hz
    )
