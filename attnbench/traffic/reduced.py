"""From a trace file to the batches that stand for it: the same whoever asks.

`attnbench traffic` writes a suite of these batches, and `attnbench itl` looks for their times: both
reduce here. The clock is the roofline of a device's published peaks, linear layers included:
what has been measured does not change which batches are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError
from attnbench.traffic.latency import AttentionRoofline, DeviceRates, LinearRoofline, SumOfParts
from attnbench.traffic.latency_linear import linear_sizes
from attnbench.traffic.latency_measured import MIN_BATCHES
from attnbench.traffic.reduce import (
    Reduction,
    reduce_steps,
    window_to_hold_back,
    with_larger,
)
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.trace import first_requests, load_trace, scale_rate
from attnbench.traffic.types import StepBatches, Trace
from attnbench.workload import Workload


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is read and reduced. `max_model_len`, `requests` 0: no limit.

    `request_rate`: of the Poisson arrivals of a trace without times; 0: it has its own.

    `headroom`: above 1, the trace is also scheduled at so many times its rate, and batches that are
    larger than all others are added; 1: none. A backend that is slower than the roofline piles up
    such batches at the trace's own rate.
    """

    trace_format: str = ""
    sort_arrivals: bool = False
    request_rate: float = 0.0
    max_model_len: int = 0
    requests: int = 0
    rate_scale: float = 1.0
    representatives: int = 512
    headroom: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class ReducedTrace:
    """A trace, its schedule by the roofline's clock, and the batches that stand for it.

    Attributes:
        layer: the attention layer, as a workload; its batch is not looked at.
        attention, linear: the two parts of the clock.
        reduction: `reduction.held_back` is the window that chose nothing.
    """

    trace: Trace
    layer: Workload
    attention: AttentionRoofline
    linear: LinearRoofline
    steps: StepBatches
    reduction: Reduction


def reduced_trace(
    path: Path,
    layer: Workload,
    model: str | Mapping[str, Any],
    tensor_parallel_size: int,
    rates: DeviceRates,
    options: TraceOptions,
    num_layers: int | None = None,
) -> ReducedTrace:
    """Read, schedule and reduce a trace.

    Args:
        model: whose linear layers are around `layer`: as `linear_sizes` takes it.
        num_layers: of the model that are as `layer`; None: as many as its shape says.

    Raises:
        UsageError: a trace that cannot be read, or has too few or too equal steps; a model without
            known sizes; a headroom below 1.
    """
    if not 1.0 <= options.headroom < float("inf"):
        raise UsageError(
            f"--headroom {options.headroom}: batches at so many times the rate; give 1 for none, "
            "or more, e.g. 2"
        )
    attention = AttentionRoofline(layer, rates, num_layers)
    linear = LinearRoofline(linear_sizes(model, tensor_parallel_size), rates)
    trace = load_trace(
        path,
        options.trace_format or None,
        options.max_model_len or None,
        sort_arrivals=options.sort_arrivals,
        request_rate=options.request_rate or None,
    )
    trace = first_requests(trace, options.requests or len(trace))
    trace = scale_rate(trace, options.rate_scale)
    clock = SumOfParts([attention, linear])
    settings = SchedulerSettings(block_size=layer.block_size)
    steps = schedule(trace, settings, clock)
    window = window_to_hold_back(steps)
    reduction = reduce_steps(steps, layer, options.representatives, window)
    if len(reduction) < MIN_BATCHES:
        raise UsageError(
            f"{options.representatives} representatives of this trace are {len(reduction)} "
            f"different batches, and a latency model takes {MIN_BATCHES}; allow more of them, or "
            "give a longer trace"
        )
    if options.headroom > 1.0:
        denser = schedule(scale_rate(trace, options.headroom), settings, clock)
        reduction = with_larger(reduction, denser, layer, options.representatives)
    return ReducedTrace(trace, layer, attention, linear, steps, reduction)
