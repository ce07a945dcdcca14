"""Launches the kernels of `stamp_kernel.py`: stamps, and a kernel that does nothing."""

from __future__ import annotations

import torch

from attnbench.measure.gpu.clock import COARSEST_TIMER_STEP_NS
from attnbench.measure.gpu.runtime import Stamp
from attnbench.measure.gpu.stamp_kernel import (
    attnbench_empty,
    attnbench_stamp,
    attnbench_timer_step,
)

#: Name of the stamp's kernel in a trace.
STAMP_KERNEL = "attnbench_stamp"

#: Numbers of a slot: 1 + multiprocessor (0: not written), cycle counter, global timer in ns.
_NUMBERS = 3

#: Reads of the global timer in a row, to see its step: at 10 ns and more each, many steps of 1 µs.
_TIMER_READS = 4096


def has_stamps(device: torch.device) -> bool:
    """Whether stamps read clocks there: on NVIDIA's devices."""
    return device.type == "cuda" and torch.version.hip is None


class StampBuffer:
    """Slots in device memory that stamps are written to.

    Making one compiles and launches every kernel once: neither may happen inside a capture.

    Attributes:
        has_stamps: stamps read clocks; elsewhere `stamp` launches a mark for traces, and `read`
            has no stamps to give.
        timer_step_ns: step of the device's global timer, found by reading it in a row.
    """

    def __init__(self, device: torch.device, slots: int = 4096) -> None:
        self.has_stamps = has_stamps(device)
        self._slots = slots
        self._buffer = torch.zeros((slots, _NUMBERS), dtype=torch.int64, device=device)
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        self.stamp(0)
        empty_kernel()
        self.timer_step_ns = self._read_timer_step() if self.has_stamps else COARSEST_TIMER_STEP_NS
        self._buffer.zero_()

    def _read_timer_step(self) -> int:
        step = torch.zeros(1, dtype=torch.int64, device=self._buffer.device)
        attnbench_timer_step[(1,)](step, NUM_READS=_TIMER_READS, num_warps=1)
        return int(step.item()) or COARSEST_TIMER_STEP_NS

    def stamp(self, slot: int) -> None:
        """Enqueue a kernel that writes a stamp into `slot`.

        One program for each multiprocessor, of which one writes: a single program may land anywhere
        (the way of nvbench's `nvbench/detail/timestamps_kernel.cu`).

        Raises:
            IndexError: no such slot.
        """
        if not 0 <= slot < self._slots:
            raise IndexError(f"slot {slot} of {self._slots}; use 0 to {self._slots - 1}")
        attnbench_stamp[(self._programs,)](
            self._buffer, slot, HAS_CLOCKS=self.has_stamps, num_warps=1
        )

    def read(self, count: int) -> list[Stamp]:
        """The first `count` slots, which are empty afterwards. Waits for the device.

        A slot nobody has written since the last `read` gives a stamp of multiprocessor -1: an old
        stamp would give a wrong clock.
        """
        numbers = self._buffer[:count].tolist()
        self._buffer[:count].zero_()
        return [Stamp(sm - 1, cycles, time_ns) for sm, cycles, time_ns in numbers]


def empty_kernel() -> None:
    """Enqueue a kernel that does nothing, on the current device and stream."""
    attnbench_empty[(1,)](num_warps=1)
