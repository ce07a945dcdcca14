"""Numbers the reader derives; none of them is stored.

ITL here is the attention share of it only: seconds of attention per decode step times the layers of
the attention shape. A model's inter-token latency adds its linear layers, sampling and scheduling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: Phases in which one call makes one token per request.
_DECODING = frozenset({"decode"})


@dataclass(frozen=True, slots=True)
class QuantityInfo:
    """How a quantity is shown. `scale` brings it to `unit` from SI."""

    label: str
    unit: str
    scale: float
    lower_is_better: bool


class Quantity(StrEnum):
    """What a page or a table can show of a series."""

    LATENCY = "latency"
    TFLOP_S = "tflop_s"
    GB_S = "gb_s"
    TOKENS_S = "tokens_s"
    ITL = "itl"
    ROOFLINE = "roofline"


QUANTITIES: Mapping[Quantity, QuantityInfo] = {
    Quantity.LATENCY: QuantityInfo("latency of one layer", "µs", 1e6, lower_is_better=True),
    Quantity.TFLOP_S: QuantityInfo("arithmetic throughput", "TFLOP/s", 1e-12, False),
    Quantity.GB_S: QuantityInfo("memory throughput", "GB/s", 1e-9, False),
    Quantity.TOKENS_S: QuantityInfo("query tokens of one layer", "tokens/s", 1.0, False),
    Quantity.ITL: QuantityInfo("ITL, attention only", "ms", 1e3, lower_is_better=True),
    Quantity.ROOFLINE: QuantityInfo("of the roofline of its run", "%", 100.0, False),
}


def itl_s(seconds: float, identity: Mapping[str, Any]) -> float | None:
    """Attention's share of the time between two tokens of one request, in seconds.

    `seconds` is the median of one layer's call. None unless the workload is a decode step.
    """
    if identity["phase"] not in _DECODING:
        return None
    return seconds * int(identity["num_layers"])


def derive(quantity: Quantity, seconds: float, identity: Mapping[str, Any]) -> float | None:
    """`quantity` in SI units from the seconds of one layer's call; None where it means nothing.

    FLOPs and bytes are the record's, from closed formulas; tokens are the call's query tokens;
    `attainable_s` is there where the run's ceilings are known (`attnbench.history.roofline`).
    """
    if seconds <= 0:
        return None
    if quantity is Quantity.LATENCY:
        return seconds
    if quantity is Quantity.ITL:
        return itl_s(seconds, identity)
    amount = {
        Quantity.TFLOP_S: identity["flops"],
        Quantity.GB_S: identity["bytes_moved"],
        Quantity.TOKENS_S: identity["num_tokens"],
        Quantity.ROOFLINE: identity.get("attainable_s"),
    }[quantity]
    return amount / seconds if amount else None
