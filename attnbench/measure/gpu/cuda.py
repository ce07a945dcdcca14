"""The real device: `GpuRuntime` over torch's CUDA (or HIP) stream, events, graphs and profiler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from attnbench.errors import DeviceError, InfrastructureError
from attnbench.measure.gpu.layout import COLD_FACTOR
from attnbench.measure.gpu.nvml import max_sm_clock_hz
from attnbench.measure.gpu.runtime import Event, Graph, KernelRecord, Stamp
from attnbench.measure.gpu.stamps import STAMP_KERNEL, StampBuffer, empty_kernel

#: Written beyond the bytes that are needed, so that rounding never costs the proof.
_FLUSH_MARGIN = 1 << 20

_ON_DEVICE = torch._C._autograd.DeviceType.CUDA


class CudaEvent:
    """A torch event that may also be recorded inside a captured graph."""

    def __init__(self) -> None:
        # `external`: recorded anew by every replay of a graph, and readable from outside.
        self._plain = torch.cuda.Event(enable_timing=True)
        self._captured: torch.cuda.Event | None = None

    @property
    def event(self) -> torch.cuda.Event:
        return self._captured or self._plain

    def record(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            self._captured = torch.cuda.Event(enable_timing=True, external=True)
        self.event.record()

    def is_done(self) -> bool:
        return self.event.query()

    def elapsed_s(self, since: Event) -> float:
        assert isinstance(since, CudaEvent)
        return since.event.elapsed_time(self.event) * 1e-3


class CudaGraph:
    """A captured graph; it keeps what was captured alive."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()


class CudaRuntime:
    """The current CUDA device and its current stream.

    Raises:
        DeviceError: torch finds no such device.
    """

    mark_name = STAMP_KERNEL

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "torch finds no GPU here; check `nvidia-smi` and that torch is a CUDA build, or "
                "use --timer wall for CPU backends"
            )
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes = int(properties.L2_cache_size)
        self.memory_bytes = int(properties.total_memory)
        # Torch tells it from some version on only; NVML's highest clock is the same number.
        rated_hz = float(getattr(properties, "clock_rate", 0)) * 1e3
        self.rated_clock_hz = rated_hz or max_sm_clock_hz(str(getattr(properties, "uuid", "")))
        self.trace_missing = _trace_missing()
        self._flush = torch.empty(
            COLD_FACTOR * self.l2_bytes + _FLUSH_MARGIN, dtype=torch.uint8, device="cuda"
        )
        self._stamps = StampBuffer(torch.device("cuda"))
        self.has_stamps = self._stamps.has_stamps
        self.timer_step_ns = self._stamps.timer_step_ns
        self._cycles_per_s = self.rated_clock_hz or 1.5e9

    def now_s(self) -> float:
        return time.perf_counter()

    def pause(self, seconds: float) -> None:
        self.synchronize()
        time.sleep(seconds)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def new_event(self) -> Event:
        return CudaEvent()

    def delay(self, seconds: float) -> None:
        # A kernel that counts cycles: at a lower clock it only lasts longer.
        torch.cuda._sleep(int(seconds * self._cycles_per_s))

    def empty_kernel(self) -> None:
        empty_kernel()

    def flush_l2(self) -> int:
        self._flush.zero_()
        return self._flush.nbytes

    def stamp(self, slot: int) -> None:
        self._stamps.stamp(slot)

    def read_stamps(self, count: int) -> list[Stamp]:
        return self._stamps.read(count)

    def capture(self, enqueue: Callable[[], object]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                enqueue()
        except RuntimeError:
            # Torch leaves its capture stream current when the end of a capture fails, and an error
            # behind that belongs to nobody else.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            raise
        return CudaGraph(graph)

    @contextmanager
    def trace(self) -> Iterator[list[KernelRecord]]:
        if self.trace_missing:
            raise InfrastructureError(self.trace_missing)
        records: list[KernelRecord] = []
        self.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            yield records
            self.synchronize()
        events = [
            event
            for event in profile.profiler.kineto_results.events()
            if event.device_type() == _ON_DEVICE
        ]
        # Nanoseconds since 1970: as a float of seconds they would keep a quarter of a microsecond.
        epoch = min((event.start_ns() for event in events), default=0)
        for event in sorted(events, key=lambda event: event.start_ns()):
            start = event.start_ns() - epoch
            end = start + event.duration_ns()
            records.append(KernelRecord(event.name(), start * 1e-9, end * 1e-9))

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        return int(free)


def _trace_missing() -> str:
    if torch.profiler.ProfilerActivity.CUDA in torch.profiler.supported_activities():
        return ""
    return (
        "this torch cannot trace kernels (no CUPTI); install a CUDA build of torch, or use "
        "--timer event"
    )
