"""A GPU whose every duration is known: virtual time, one stream, an L2 cache, a falling clock.

It keeps what timers get wrong on real devices: launches cost host time and return before the work
is done, the stream may run dry, a kernel is faster when its data is still in the L2 cache, events
cost device time, the queue of launches is finite, the clock throttles.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from attnbench.measure.gpu.runtime import Event, Graph, KernelRecord, Stamp

Effect = Callable[[], object]


@dataclass
class Operation:
    """Something in the stream. `duration_s(start_s)` is asked when it starts."""

    name: str
    duration_s: Callable[[float], float]
    effect: Callable[[float, float], None] = lambda start_s, end_s: None
    is_kernel: bool = True


class SimulatedEvent:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self._gpu = gpu
        self.time_s: float | None = None

    def record(self) -> None:
        def passed(start_s: float, end_s: float) -> None:
            self.time_s = end_s

        cost = self._gpu.event_cost_s
        self._gpu.enqueue(Operation("event", lambda start_s: cost, passed, is_kernel=False))

    def is_done(self) -> bool:
        return self.time_s is not None and self._gpu.host_s >= self.time_s

    def elapsed_s(self, since: Event) -> float:
        assert isinstance(since, SimulatedEvent)
        assert self.is_done(), "an event was read before the device passed it"
        assert since.is_done()
        assert self.time_s is not None
        assert since.time_s is not None
        return self.time_s - since.time_s


@dataclass
class SimulatedGraph:
    gpu: SimulatedGpu
    operations: list[Operation]

    def replay(self) -> None:
        self.gpu.launch()
        for operation in self.operations:
            self.gpu.execute(operation)


@dataclass
class SimulatedGpu:
    """`launch_s`: host time of a launch. `gap_s`: device time between two kernels."""

    l2_bytes: int = 60_000_000
    memory_bytes: int = 100 << 30
    rated_clock_hz: float = 2e9
    has_stamps: bool = True
    trace_missing: str = ""
    timer_step_ns: int = 32
    mark_name: str = "attnbench_stamp"
    launch_s: float = 5e-6
    gap_s: float = 1e-6
    event_cost_s: float = 5e-7
    empty_kernel_s: float = 1e-6
    write_bytes_per_s: float = 4e12
    flush_factor: int = 2
    queue_depth: int = 1024
    lose_every: int = 0  # of the records of a trace
    lose: str = ""  # name of a kernel of which records are lost, every second one
    clock_hz: Callable[[float], float] = lambda at_s: 2e9
    host_s: float = 0.0
    device_s: float = 0.0  # when the stream is empty again
    launches: int = 0
    log: list[KernelRecord] = field(default_factory=list)
    _cycles: float = 0.0
    _seen: int = 0
    _pending: deque[float] = field(default_factory=deque)
    _captured: list[Operation] | None = None
    _l2: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _stamps: dict[int, Stamp] = field(default_factory=dict)

    # --- the machine -------------------------------------------------------------------------
    def launch(self) -> None:
        """Host cost of one launch; waits while the queue is full."""
        self.launches += 1
        self.host_s += self.launch_s
        while self._pending and self._pending[0] <= self.host_s:
            self._pending.popleft()
        if len(self._pending) >= self.queue_depth:
            self.host_s = max(self.host_s, self._pending.popleft())

    def enqueue(self, operation: Operation) -> None:
        if self._captured is not None:
            self._captured.append(operation)
            return
        self.launch()
        self.execute(operation)

    def execute(self, operation: Operation) -> None:
        gap = self.gap_s if operation.is_kernel else 0.0
        start = max(self.host_s, self.device_s) + gap
        end = start + operation.duration_s(start)
        self._cycles += (start - self.device_s) * self.clock_hz(self.device_s)
        self._cycles += (end - start) * self.clock_hz(start)
        self.device_s = end
        self._pending.append(end)
        if operation.is_kernel:
            self.log.append(KernelRecord(operation.name, start, end))
        operation.effect(start, end)

    def _touch(self, data: Mapping[str, int]) -> float:
        """Fraction of the bytes that were not in the L2 cache; they are afterwards."""
        total = missing = 0
        for name, size in data.items():
            total += size
            missing += max(0, size - self._l2.pop(name, 0))
        for name, size in data.items():
            self._l2[name] = min(size, self.l2_bytes)
        excess = sum(self._l2.values()) - self.l2_bytes
        while excess > 0:
            name, size = next(iter(self._l2.items()))
            taken = min(size, excess)
            excess -= taken
            if taken == size:
                del self._l2[name]
            else:
                self._l2[name] = size - taken
        return missing / total if total else 0.0

    def kernel(
        self,
        name: str,
        hot_s: float,
        cold_s: float | None = None,
        data: Mapping[str, int] | None = None,
        effect: Effect = lambda: None,
    ) -> None:
        """Launch a kernel that takes `hot_s` with all its `data` in the L2 cache at the rated
        clock, `cold_s` with none of it."""
        slow = hot_s if cold_s is None else cold_s
        touched = dict(data or {})

        def duration(start_s: float) -> float:
            seconds = hot_s + (slow - hot_s) * self._touch(touched)
            return seconds * self.rated_clock_hz / self.clock_hz(start_s)

        def finished(start_s: float, end_s: float) -> None:
            effect()

        self.enqueue(Operation(name, duration, finished))

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    def sync_call(self) -> None:
        """What a call does that waits for its own result, e.g. `tensor.item()`."""
        assert self._captured is None, "operation not permitted when stream is capturing"
        self.synchronize()

    # --- GpuRuntime --------------------------------------------------------------------------
    def now_s(self) -> float:
        self.host_s += 1e-7
        return self.host_s

    def pause(self, seconds: float) -> None:
        self.host_s += seconds

    def synchronize(self) -> None:
        self.host_s = max(self.host_s, self.device_s)

    def new_event(self) -> Event:
        return SimulatedEvent(self)

    def delay(self, seconds: float) -> None:
        self.enqueue(Operation("spin", lambda start_s: seconds))

    def empty_kernel(self) -> None:
        self.enqueue(Operation("attnbench_empty", lambda start_s: self.empty_kernel_s))

    def flush_l2(self) -> int:
        size = self.flush_factor * self.l2_bytes

        def duration(start_s: float) -> float:
            self._touch({"flush": size})
            return size / self.write_bytes_per_s

        self.enqueue(Operation("memset", duration))
        return size

    def stamp(self, slot: int) -> None:
        def write(start_s: float, end_s: float) -> None:
            self._stamps[slot] = Stamp(0, round(self._cycles), round(end_s * 1e9))

        self.enqueue(Operation(self.mark_name, lambda start_s: 1e-6, write))

    def read_stamps(self, count: int) -> list[Stamp]:
        self.synchronize()
        return [self._stamps.pop(slot, Stamp(-1, 0, 0)) for slot in range(count)]

    def capture(self, enqueue: Callable[[], object]) -> Graph:
        self._captured = []
        try:
            enqueue()
            return SimulatedGraph(self, self._captured)
        except AssertionError as error:
            raise RuntimeError(str(error)) from None
        finally:
            self._captured = None

    @contextmanager
    def trace(self) -> Iterator[list[KernelRecord]]:
        records: list[KernelRecord] = []
        self.synchronize()
        first = len(self.log)
        yield records
        self.synchronize()
        for number, record in enumerate(self.log[first:], 1):
            self._seen += record.name == self.lose
            is_lost = record.name == self.lose and self._seen % 2 == 0
            if not is_lost and (not self.lose_every or number % self.lose_every):
                records.append(record)

    def free_bytes(self) -> int:
        return self.memory_bytes
