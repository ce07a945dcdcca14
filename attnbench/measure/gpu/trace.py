"""Which kernels of a trace belong to which sample."""

from __future__ import annotations

from collections.abc import Sequence

from attnbench.errors import TimerError
from attnbench.measure.gpu.runtime import KernelRecord


def sample_kernels(
    records: Sequence[KernelRecord], mark_name: str, count: int
) -> list[list[KernelRecord]]:
    """The records between the 1st and 2nd mark, between the 3rd and 4th, and so on.

    Raises:
        TimerError: the trace does not hold `2 * count` marks (records were lost), or a sample has
            no kernel (the call launched nothing, or on another stream after its end).
    """
    samples: list[list[KernelRecord]] = []
    inside = False
    for record in sorted(records, key=lambda r: r.start_s):
        if mark_name in record.name:
            inside = not inside
            if inside:
                samples.append([])
        elif inside:
            samples[-1].append(record)
    if len(samples) != count or inside:
        raise TimerError(
            f"the trace holds {len(samples)} of {count} samples: CUPTI lost records or another "
            "profiler is attached; use --timer event, or stop the other profiler"
        )
    if not all(samples):
        raise TimerError(
            "a call left no kernel in the trace: it ran on the host or on another stream; "
            "use --timer wall"
        )
    return samples


def kernel_names(kernels: Sequence[KernelRecord]) -> tuple[str, ...]:
    """Names in the order of their starts."""
    return tuple(k.name for k in sorted(kernels, key=lambda r: r.start_s))
