"""The GPU timers by name, and the floor of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

from attnbench.measure.gpu.clock import ThrottleRule
from attnbench.measure.gpu.eager import EagerSession, EventReading, TraceReading
from attnbench.measure.gpu.graph import GraphSession
from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.measure.gpu.throttle import ThrottleGuard
from attnbench.measure.sampling import Session, Target
from attnbench.measure.timers import Subject, WallTimer

_Open = Callable[[GpuRuntime, Target, str, ThrottleGuard], Session]


def _event(gpu: GpuRuntime, target: Target, l2_state: str, guard: ThrottleGuard) -> Session:
    return EagerSession(gpu, target, l2_state, EventReading(), guard)


def _cupti_span(gpu: GpuRuntime, target: Target, l2_state: str, guard: ThrottleGuard) -> Session:
    return EagerSession(gpu, target, l2_state, TraceReading("span"), guard)


def _cupti_sum(gpu: GpuRuntime, target: Target, l2_state: str, guard: ThrottleGuard) -> Session:
    return EagerSession(gpu, target, l2_state, TraceReading("sum"), guard)


_SESSIONS: Mapping[str, _Open] = {
    "event": _event,
    "graph": GraphSession,
    "cupti_span": _cupti_span,
    "cupti_sum": _cupti_sum,
}


def _cuda() -> GpuRuntime:
    from attnbench.measure.gpu.cuda import CudaRuntime

    return CudaRuntime()


class GpuTimer:
    """One of `event`, `graph`, `cupti_span`, `cupti_sum`. The device is touched on first use."""

    def __init__(
        self,
        name: str,
        l2_states: tuple[str, ...] = ("cold",),
        rated_clock_hz: float = 0.0,
        make_gpu: Callable[[], GpuRuntime] = _cuda,
    ) -> None:
        self.name = name
        self.execution = "graph" if name == "graph" else "eager"
        self.l2_states = l2_states
        self._rated_clock_hz = rated_clock_hz
        self._make_gpu = make_gpu

    @cached_property
    def gpu(self) -> GpuRuntime:
        return self._make_gpu()

    @cached_property
    def host(self) -> WallTimer:
        """Host seconds until a call returns, the device idle at its start.

        Warmed up by one call: the timing of the kernel has made many before.
        """
        return WallTimer(warm_up_s=0.0, drain=self.gpu.synchronize)

    def floor_s(self) -> float:
        """Median of an empty kernel by this timer, hot: part of every sample it takes.

        At whatever clock the device runs: a throttled one has a floor too.
        """
        session = self._session(Target(self.gpu.empty_kernel), "hot", ThrottleGuard(self.gpu, None))
        samples = sorted(s for _ in range(3) for s in session.block().samples)
        return samples[len(samples) // 2]

    def open(self, target: Target, subject: Subject, l2_state: str) -> Session:
        rule = ThrottleRule(self._rated_clock_hz or self.gpu.rated_clock_hz)
        return self._session(target, l2_state, ThrottleGuard(self.gpu, rule))

    def _session(self, target: Target, l2_state: str, guard: ThrottleGuard) -> Session:
        return _SESSIONS[self.name](self.gpu, target, l2_state, guard)
