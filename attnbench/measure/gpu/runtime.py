"""What a GPU timer needs from a device, in few words, so that a simulated one can stand in for it.

Timers, coldness, throttling and self-tests are written against `GpuRuntime` and nothing else. Their
logic is tested on a simulated device, where the true duration of every kernel is known;
`attnbench.measure.gpu.cuda` is the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """One activity of the device, as CUPTI saw it. Device seconds since the first of its trace."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Stamp:
    """Two clocks read at once on one streaming multiprocessor.

    Attributes:
        sm: which multiprocessor: cycle counters of two are not comparable.
        cycles: its cycle counter.
        time_ns: the device's global timer, an integer: as a float, seconds since its epoch would
            keep no microseconds.
    """

    sm: int
    cycles: int
    time_ns: int


class Event(Protocol):
    """A point in the stream whose device time can be read."""

    def record(self) -> None: ...
    def is_done(self) -> bool:
        """Whether the device has passed it."""
        ...

    def elapsed_s(self, since: Event) -> float:
        """Device seconds since another event. Both must be done."""
        ...


class Graph(Protocol):
    """Captured work that is launched as one."""

    def replay(self) -> None: ...


class GpuRuntime(Protocol):
    """One device, one stream. Everything that is enqueued runs in order.

    Attributes:
        l2_bytes: size of the L2 cache.
        memory_bytes: the device's memory, whoever holds it.
        rated_clock_hz: highest clock of the multiprocessors; 0.0: not known.
        has_stamps: `stamp` reads clocks here; elsewhere it is a mark in a trace and nothing more.
        timer_step_ns: step of the global timer that stamps read.
        mark_name: name of the kernel of `stamp` in a trace.
        trace_missing: "" when `trace` works, else why not and what to install.
    """

    l2_bytes: int
    memory_bytes: int
    rated_clock_hz: float
    has_stamps: bool
    timer_step_ns: int
    mark_name: str
    trace_missing: str

    def now_s(self) -> float:
        """The host's monotonic clock."""
        ...

    def pause(self, seconds: float) -> None:
        """Let the device rest."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that was enqueued. Raises what a kernel did wrong."""
        ...

    def new_event(self) -> Event:
        """May be recorded inside `capture` too: each replay gives it a new time."""
        ...

    def delay(self, seconds: float) -> None:
        """Enqueue a kernel that keeps the stream busy for about `seconds`."""
        ...

    def empty_kernel(self) -> None:
        """Enqueue a kernel that does nothing."""
        ...

    def flush_l2(self) -> int:
        """Enqueue a write over at least twice the L2 cache. Returns the bytes written."""
        ...

    def stamp(self, slot: int) -> None:
        """Enqueue a kernel that writes a `Stamp` into `slot` (0 to 4095)."""
        ...

    def read_stamps(self, count: int) -> list[Stamp]:
        """The first `count` slots. Waits for the device."""
        ...

    def capture(self, enqueue: Callable[[], object]) -> Graph:
        """A graph of what `enqueue` enqueues. Raises RuntimeError if it cannot be captured."""
        ...

    def trace(self) -> AbstractContextManager[list[KernelRecord]]:
        """Records kernels, copies and fills; the list is filled, in order of start, at the exit.

        Raises InfrastructureError where `trace_missing` says why.
        """
        ...

    def free_bytes(self) -> int:
        """Device memory that can still be allocated."""
        ...
