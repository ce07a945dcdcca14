"""How samples are laid out in the stream, the same for every GPU timer.

    [flush or another copy's turn]  stamp  <the timer's own mark>  call  <mark>  stamp

The stamps give the clock of the multiprocessors during the sample and mark its kernels in a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from attnbench.errors import UsageError
from attnbench.measure.gpu.runtime import GpuRuntime
from attnbench.measure.sampling import Target

#: Bytes between two uses of the same data, in L2 caches, for a sample to count as cold. One would
#: do for a cache that evicts the oldest line; real ones hash and keep what was read often.
COLD_FACTOR = 2

#: At most this part of the device's memory (of all of it: a choice that hung on what is free would
#: differ from point to point of one series), and this many copies, for a rotation.
_MAX_MEMORY_SHARE = 0.25
_MAX_COPIES = 64

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which copy each sample uses, and whether a flush precedes it.

    Attributes:
        l2_state: `cold` only where `reuse_distance_bytes` proves it.
    """

    calls: tuple[Call, ...]
    flush: bool
    l2_state: str
    reuse_distance_bytes: int | None


def plan_layout(
    target: Target, gpu: GpuRuntime, l2_state: str, prefer_rotation: bool = False
) -> Layout:
    """How to time `target` with its data `cold` or `hot` in the L2 cache.

    A flush costs one write of twice the cache before every sample and leaves dirty lines behind,
    whose eviction the kernel pays for. A rotation over copies costs memory and neither; it is for
    small data and `prefer_rotation`, and the flush takes over where the copies would not fit.

    Raises:
        UsageError: another `l2_state`.
    """
    if l2_state not in ("cold", "hot"):
        raise UsageError(f"L2 state {l2_state!r} is not known; use cold or hot")
    if l2_state == "hot":
        return Layout((target.call,), flush=False, l2_state="hot", reuse_distance_bytes=0)
    needed = COLD_FACTOR * gpu.l2_bytes
    if prefer_rotation and target.copies is not None and target.bytes_touched > 0:
        more = -(-needed // target.bytes_touched)
        fits = more * target.copy_bytes <= _MAX_MEMORY_SHARE * gpu.memory_bytes
        if needed > 0 and more < _MAX_COPIES and fits:
            # Others may hold the memory that the device has.
            with suppress(torch.OutOfMemoryError):
                calls = (target.call, *target.copies(more))
                return Layout(calls, False, "cold", more * target.bytes_touched)
    written = gpu.flush_l2()
    gpu.synchronize()
    proved = 0 < needed <= written
    return Layout((target.call,), True, "cold" if proved else "unknown", written)


def enqueue_samples(
    gpu: GpuRuntime,
    layout: Layout,
    count: int,
    before: Sequence[Call] = (),
    after: Sequence[Call] = (),
) -> None:
    """Enqueue `count` samples; `before[i]` and `after[i]` stand directly around call i."""
    for index in range(count):
        if layout.flush:
            gpu.flush_l2()
        gpu.stamp(2 * index)
        if before:
            before[index]()
        layout.calls[index % len(layout.calls)]()
        if after:
            after[index]()
        gpu.stamp(2 * index + 1)
