"""Timers of calls launched one by one: `event`, `cupti_span`, `cupti_sum`.

The host must never starve the stream, or an interval holds the host's time: a 4 µs kernel reads as
50. So a delay kernel keeps the device busy while the host enqueues a whole block; the host then
looks whether the device is still in it. If not, the block is thrown away and tried again with a
longer delay and fewer samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attnbench.errors import TimerError
from attnbench.measure.gpu.layout import Layout, enqueue_samples, plan_layout
from attnbench.measure.gpu.runtime import GpuRuntime, KernelRecord
from attnbench.measure.gpu.throttle import ThrottleGuard
from attnbench.measure.gpu.trace import kernel_names, sample_kernels
from attnbench.measure.sampling import Block, Target

#: Device seconds a block may last: long enough to be cheap, short enough to stop soon.
_BLOCK_S = 0.02
_MAX_SAMPLES = 64
#: Slots of stamps and launches in flight bound a block too; streams take about 1,000 launches.
_MAX_LAUNCHES = 700

#: The delay covers the host's time for the block this many times over, at first.
_MARGIN = 1.5
_MAX_DELAY_S = 0.25

_WARM_UP_CALLS = 3


class Reading(Protocol):
    """How one block's samples are read; one object for each session.

    `kernel_names`: of every sample, once a block was read by a way that sees them.
    """

    kernel_names: tuple[str, ...]

    def read(self, gpu: GpuRuntime, layout: Layout, count: int, delay_s: float) -> list[float]:
        """Enqueue a delay and `count` samples, wait, return their seconds.

        Raises: StreamStarvedError.
        """
        ...


class StreamStarvedError(Exception):
    """The device caught up with the host within a block; not a user's error, always handled."""


def run_behind_delay(gpu: GpuRuntime, delay_s: float, enqueue: Callable[[], object]) -> None:
    """Enqueue behind a delay kernel and wait. Raises StreamStarvedError if the delay was too short.

    If the delay is over when the last launch is enqueued, some kernel may have waited for the host.
    """
    delay_over = gpu.new_event()
    gpu.delay(delay_s)
    delay_over.record()
    enqueue()
    starved = delay_over.is_done()
    gpu.synchronize()
    if starved:
        raise StreamStarvedError


class EventReading:
    """A pair of events around each call."""

    kernel_names: tuple[str, ...] = ()

    def read(self, gpu: GpuRuntime, layout: Layout, count: int, delay_s: float) -> list[float]:
        starts = [gpu.new_event() for _ in range(count)]
        ends = [gpu.new_event() for _ in range(count)]
        run_behind_delay(
            gpu,
            delay_s,
            lambda: enqueue_samples(
                gpu, layout, count, [e.record for e in starts], [e.record for e in ends]
            ),
        )
        return [end.elapsed_s(start) for start, end in zip(starts, ends, strict=True)]


class TraceReading:
    """The kernels of each call in a CUPTI trace: `span` from first start to last end, gaps
    included; `sum` of their durations.

    Raises:
        TimerError: two samples hold different kernels: records were lost.
    """

    def __init__(self, way: str) -> None:
        self._seconds = {"span": _span_s, "sum": _sum_s}[way]
        self.kernel_names: tuple[str, ...] = ()

    def read(self, gpu: GpuRuntime, layout: Layout, count: int, delay_s: float) -> list[float]:
        with gpu.trace() as records:
            run_behind_delay(gpu, delay_s, lambda: enqueue_samples(gpu, layout, count))
        samples = sample_kernels(records, gpu.mark_name, count)
        self.kernel_names = self.kernel_names or kernel_names(samples[0])
        for kernels in samples:
            if (names := kernel_names(kernels)) != self.kernel_names:
                raise TimerError(
                    f"one call left {list(names)} in the trace, another {list(self.kernel_names)}: "
                    "CUPTI lost records, or the call does not do the same each time; use --timer "
                    "event"
                )
        return [self._seconds(kernels) for kernels in samples]


def _span_s(kernels: list[KernelRecord]) -> float:
    return max(k.end_s for k in kernels) - min(k.start_s for k in kernels)


def _sum_s(kernels: list[KernelRecord]) -> float:
    return sum(k.end_s - k.start_s for k in kernels)


class EagerSession:
    """Blocks of one target, each behind a delay long enough for the host.

    Raises:
        TimerError: the call waits for the device itself, so that no delay is ever long enough.
    """

    execution = "eager"

    def __init__(
        self,
        gpu: GpuRuntime,
        target: Target,
        l2_state: str,
        reading: Reading,
        throttle: ThrottleGuard,
    ) -> None:
        self._gpu = gpu
        self._reading = reading
        self._throttle = throttle
        self._layout = plan_layout(target, gpu, l2_state)
        self.l2_state = self._layout.l2_state
        self.reuse_distance_bytes = self._layout.reuse_distance_bytes
        self._host_s, device_s, launches = self._warm_up()
        self._count = max(
            1, min(_MAX_SAMPLES, int(_BLOCK_S / device_s), int(_MAX_LAUNCHES / launches))
        )
        self._margin = _MARGIN

    @property
    def kernel_names(self) -> tuple[str, ...]:
        return self._reading.kernel_names

    def now_s(self) -> float:
        return self._gpu.now_s()

    def _warm_up(self) -> tuple[float, float, float]:
        """Host and device seconds of a sample, and about how many launches it makes."""
        gpu = self._gpu
        for _ in range(_WARM_UP_CALLS):
            enqueue_samples(gpu, self._layout, 1)
        gpu.synchronize()
        started = gpu.now_s()
        gpu.empty_kernel()
        launch_s = max(gpu.now_s() - started, 1e-9)
        gpu.synchronize()
        started = gpu.now_s()
        enqueue_samples(gpu, self._layout, 1)
        host_s = gpu.now_s() - started
        gpu.synchronize()
        device_s = gpu.now_s() - started
        return host_s, max(device_s, 1e-6), max(1.0, host_s / launch_s)

    def block(self) -> Block:
        discarded = 0
        while True:
            delay_s = self._margin * self._host_s * self._count + 20e-6
            try:
                seconds = self._reading.read(self._gpu, self._layout, self._count, delay_s)
            except StreamStarvedError:
                discarded += self._count
                self._give_more_time(delay_s)
                continue
            return self._throttle.judge(seconds, discarded)

    def _give_more_time(self, delay_s: float) -> None:
        if delay_s > _MAX_DELAY_S:
            raise TimerError(
                "the call waits for the device (a copy to the host, `.item()`, a lock): this timer "
                "would read the host's time; use --timer wall"
            )
        # Fewer launches too: a full queue makes the host wait for the delay itself.
        self._count = max(1, self._count // 2)
        self._margin *= 3
