"""The rates a machine reached in a run: what percentages of roofline are percentages of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates measured on the device, in the same run as the rows they are compared with.

    Attributes:
        copy_bytes_per_s: a copy of memory no cache holds, bytes read and bytes written both
            counted; 0.0: not measured.
        read_bytes_per_s: a reduction over memory no cache holds; 0.0: not measured.
        matmul_flops_per_s: dtype name (`bf16`, ...) -> rate of a large square matrix product.
    """

    copy_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    matmul_flops_per_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def memory_bytes_per_s(self) -> float:
        """The better of copying and reading: attention reads far more than it writes."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "copy_bytes_per_s": self.copy_bytes_per_s,
            "read_bytes_per_s": self.read_bytes_per_s,
            "matmul_flops_per_s": dict(self.matmul_flops_per_s),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ceilings:
        """What `to_json` gave. A rate that is missing, or is no rate, is not known."""
        rates = value.get("matmul_flops_per_s", {})
        return cls(
            copy_bytes_per_s=_rate(value.get("copy_bytes_per_s")),
            read_bytes_per_s=_rate(value.get("read_bytes_per_s")),
            matmul_flops_per_s={name: _rate(rate) for name, rate in rates.items() if _rate(rate)},
        )


def _rate(value: object) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value) and value > 0:
        return float(value)
    return 0.0
