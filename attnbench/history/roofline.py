"""How close a time is to what the device allows: derived when read, never stored.

Attainable time (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009): the larger of moving
the workload's bytes at the memory ceiling and doing its FLOPs at the matrix ceiling of the query's
dtype. Bytes and FLOPs are the closed formulas of `attnbench.workload.cost`; the ceilings were
measured in the same run. A percentage above 100 is possible and says that the data came from a
cache, or that the kernel multiplies in another type than the query's (fp8, TF32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnbench.store.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Roofline:
    """What one call of a workload needs at least, on a device of known ceilings.

    Attributes:
        memory_s: seconds to move its bytes at the memory ceiling.
        compute_s: seconds to do its FLOPs at the matrix ceiling.
        intensity: FLOPs per byte.
    """

    memory_s: float
    compute_s: float
    intensity: float

    @property
    def attainable_s(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        """`memory` or `compute`: which ceiling the workload meets first."""
        return "memory" if self.memory_s >= self.compute_s else "compute"

    def percent(self, seconds: float) -> float:
        """100 is as fast as the ceilings allow."""
        return 100.0 * self.attainable_s / seconds


def roofline(row: Mapping[str, Any], ceilings: Ceilings | None) -> Roofline | None:
    """The roofline of a row of the store: its `bytes_moved`, `flops` and `dtype` are read.

    None for a row without FLOPs (another metric than `attention`), or where a ceiling is unknown.
    """
    bytes_moved, flops = row["bytes_moved"], row["flops"]
    if ceilings is None or not bytes_moved or not flops:
        return None
    bandwidth = ceilings.memory_bytes_per_s
    rate = ceilings.matmul_flops_per_s.get(row["dtype"], 0.0)
    if not bandwidth or not rate:
        return None
    return Roofline(bytes_moved / bandwidth, flops / rate, flops / bytes_moved)
