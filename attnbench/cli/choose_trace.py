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
    from attnbench.cli.model_layer import layer_of_cell
    from attnbench.measure.environment import class_of_name
    from attnbench.measure.peaks import PEAKS
    from attnbench.traffic.latency import DeviceRates
    from attnbench.traffic.reduced import TraceOptions, reduced_trace
    from attnbench.upgrade.batches import BatchShare
    from attnbench.workload import Workload

    peak = next((one for name, one in PEAKS.items() if class_of_name(name) == device_class), None)
    if peak is None:
        known = ", ".join(class_of_name(name) for name in PEAKS)
        raise UsageError(
            f"--trace: no published peaks of {device_class or 'this device'}, which would be the "
            f"schedule's clock; name a --device of {known}, or give --batch"
        )
    one = layer_of_cell(cell, model)
    rates = DeviceRates(peak.memory_bytes_per_s, peak.matmul_flops_per_s)
    options = TraceOptions(representatives=representatives)
    found = reduced_trace(trace, one.layer, one.sizes, tp, rates, options, one.num_layers)
    reduction = found.reduction
    note(
        f"{len(found.trace)} requests make {len(found.steps)} steps; {len(reduction)} batches "
        f"stand for them, their totals within {reduction.totals_error:.2%}"
    )
    shares: dict[str, BatchShare] = {}
    for workload, weight in zip(reduction.workloads, reduction.weights.tolist(), strict=True):
        if weight > 0:
            text = BatchShare(workload, weight).text
            before = shares[text].weight if text in shares else 0.0
            shares[text] = BatchShare(Workload.parse(text), before + weight)
    return tuple(shares.values())
