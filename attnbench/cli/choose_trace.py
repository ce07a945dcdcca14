"""`attnbench choose --trace`: the batch mix of a trace, as `attnbench traffic` reduces it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.cli.output import note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.upgrade.batches import BatchShare
    from attnbench.upgrade.cells import Cell


def shares_of_trace(
    trace: Path, model: str, cell: Cell, tp: int, device_class: str, representatives: int
) -> tuple[BatchShare, ...]:
    """Representative batches and the steps each stands for.

    Scheduled by a clock at the roofline of the device's published peaks, the linear layers
    included, and reduced as `attnbench traffic` does: its suite has these batches.

    Raises:
        UsageError: a trace or a model that cannot be scheduled, a device without published peaks.
    """
    from attnbench.measure.environment import class_of_name
    from attnbench.measure.peaks import PEAKS
    from attnbench.traffic.latency import (
        AttentionRoofline,
        DeviceRates,
        LinearRoofline,
        SumOfParts,
    )
    from attnbench.traffic.latency_linear import linear_sizes
    from attnbench.traffic.reduce import reduce_steps, window_to_hold_back
    from attnbench.traffic.schedule import schedule
    from attnbench.traffic.schedule_settings import SchedulerSettings
    from attnbench.traffic.trace import load_trace
    from attnbench.upgrade.batches import BatchShare, workload_of
    from attnbench.workload import Workload

    peak = next((one for name, one in PEAKS.items() if class_of_name(name) == device_class), None)
    if peak is None:
        known = ", ".join(class_of_name(name) for name in PEAKS)
        raise UsageError(
            f"--trace: no published peaks of {device_class or 'this device'}, which would be the "
            f"schedule's clock; name a --device of {known}, or give --batch"
        )
    layer = workload_of(cell, BatchShare(Workload.parse("q1"), 1.0))
    rates = DeviceRates(peak.memory_bytes_per_s, peak.matmul_flops_per_s)
    clock = SumOfParts(
        [
            AttentionRoofline(layer, rates),
            LinearRoofline(linear_sizes(cell.hf_config or model, tp), rates),
        ]
    )
    loaded = load_trace(trace)
    steps = schedule(loaded, SchedulerSettings(block_size=layer.block_size), clock)
    reduction = reduce_steps(steps, layer, representatives, window_to_hold_back(steps))
    note(
        f"{len(loaded)} requests make {len(steps)} steps; {len(reduction)} batches stand for them, "
        f"their totals within {reduction.totals_error:.2%}"
    )
    shares: dict[str, BatchShare] = {}
    for workload, weight in zip(reduction.workloads, reduction.weights.tolist(), strict=True):
        if weight > 0:
            text = BatchShare(workload, weight).text
            before = shares[text].weight if text in shares else 0.0
            shares[text] = BatchShare(Workload.parse(text), before + weight)
    return tuple(shares.values())
