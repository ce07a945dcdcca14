"""What one check of the self-test says, and how numbers are said in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from attnbench.store.ceilings import Ceilings


class CheckResult(StrEnum):
    """How a check ended. Only `fail` means that this machine cannot measure."""

    OK = "ok"
    WARN = "warn"  # measuring works, and something makes it worse than it could be
    FAIL = "fail"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding, in plain words.

    Attributes:
        measured: what was seen.
        meaning: what follows from it for whoever measures here.
        mend: what to type or change; "": nothing needs mending.
        values: the numbers behind the words, the unit in each key.
    """

    name: str
    result: CheckResult
    measured: str
    meaning: str = ""
    mend: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """For `--format json|csv|markdown`."""
        return {
            "check": self.name,
            "result": str(self.result),
            "measured": self.measured,
            "meaning": self.meaning,
            "mend": self.mend,
            "values": dict(self.values),
        }


def can_measure(checks: Iterable[Check]) -> bool:
    """Whether everything that measuring needs works."""
    return all(check.result is not CheckResult.FAIL for check in checks)


def seconds_text(seconds: float) -> str:
    """`83 ns`, `4.21 µs`, `12.5 ms`, `3.1 s`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def rate_text(rate: float, unit: str) -> str:
    """`4.24 TB/s`, `198 GFLOP/s`."""
    for prefix, scale in (("T", 1e12), ("G", 1e9)):
        if rate >= scale:
            return f"{rate / scale:.3g} {prefix}{unit}/s"
    return f"{rate / 1e6:.3g} M{unit}/s"


def rates_text(found: Ceilings) -> str:
    """`copy 4.24 TB/s, read 4.3 TB/s, bf16 product 800 TFLOP/s`."""
    words = [
        f"copy {rate_text(found.copy_bytes_per_s, 'B')}",
        f"read {rate_text(found.read_bytes_per_s, 'B')}",
    ]
    for dtype, rate in found.matmul_flops_per_s.items():
        words.append(f"{dtype} product {rate_text(rate, 'FLOP')}")
    return ", ".join(words)


def rate_values(found: Ceilings) -> dict[str, float]:
    """The rates for `Check.values`."""
    return {
        "copy_bytes_per_s": found.copy_bytes_per_s,
        "read_bytes_per_s": found.read_bytes_per_s,
        **{f"matmul_{d}_flops_per_s": rate for d, rate in found.matmul_flops_per_s.items()},
    }


def percent_text(ratio: float) -> str:
    """`+0.3 %` of a ratio of 1.003."""
    return f"{(ratio - 1) * 100:+.1f} %"
