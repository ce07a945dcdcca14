"""Triton kernels that read the clocks of a GPU. Host code that launches them: `stamps.py`.

Functions here are Triton's language, not Python. Their names are what a trace shows.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The multiprocessor whose stamp is kept: cycle counters of two are not comparable.
STAMPED_SM = tl.constexpr(0)


@triton.jit(do_not_specialize=["slot"])
def attnbench_stamp(buffer_ptr, slot, HAS_CLOCKS: tl.constexpr):
    """Write (1 + multiprocessor, cycle counter, global timer in ns) into `buffer_ptr[slot]`.

    One program for each multiprocessor; the one that lands on `STAMPED_SM` writes. All three
    registers are read in one block of assembly marked as having side effects: it is neither merged
    with another, nor moved across one, nor taken apart. It needs no memory clobber, since the
    kernel touches memory only afterwards, with what was read; between kernels the stream orders.
    Without `HAS_CLOCKS` (ROCm) it is a name in a trace and nothing more.
    """
    if HAS_CLOCKS:
        sm, cycles, nanoseconds = tl.inline_asm_elementwise(
            asm="mov.u32 $0, %smid; mov.u64 $1, %clock64; mov.u64 $2, %globaltimer;",
            constraints="=r,=l,=l",
            args=[],
            dtype=(tl.int32, tl.int64, tl.int64),
            is_pure=False,
            pack=1,
        )
        if sm == STAMPED_SM:
            slot_ptr = buffer_ptr + slot * 3
            tl.store(slot_ptr, sm.to(tl.int64) + 1)
            tl.store(slot_ptr + 1, cycles)
            tl.store(slot_ptr + 2, nanoseconds)


@triton.jit
def attnbench_timer_step(step_ptr, NUM_READS: tl.constexpr):
    """Write the smallest step, in ns, by which the global timer was seen to advance; 0: none."""
    smallest = tl.full((), 0, tl.int64)
    before = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    for _ in range(NUM_READS):
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        step = now - before
        is_smaller = (step > 0) & ((smallest == 0) | (step < smallest))
        smallest = tl.where(is_smaller, step, smallest)
        before = now
    tl.store(step_ptr, smallest)


@triton.jit
def attnbench_empty():
    """Do nothing."""
    return
