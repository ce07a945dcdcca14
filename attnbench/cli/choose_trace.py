"""`attnbench choose --trace`: the batch mix of a trace, as `attnbench traffic` reduces it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnbench.cli.output import note

if TYPE_CHECKING:
    from attnbench.traffic.reduced import TraceOptions
    from attnbench.upgrade.batches import BatchShare
    from attnbench.upgrade.cells import Cell


def shares_of_trace(
    trace: Path, model: str, cell: Cell, tp: int, device: str, options: TraceOptions
) -> tuple[BatchShare, ...]:
    """Representative batches and the steps each stands for.

    Scheduled by a clock at the roofline of the device's published peaks, the linear layers
    included, and reduced as `attnbench traffic` does: its suite has these batches.

    Raises:
        UsageError: a trace or a model that cannot be scheduled, a device without published peaks.
    """
    from attnbench.cli.model_layer import layer_of_cell
    from attnbench.cli.trace_options import device_rates, requests_text
    from attnbench.traffic.reduced import reduced_trace
    from attnbench.upgrade.batches import BatchShare
    from attnbench.workload import Workload

    _, rates = device_rates(device, "--trace: --device")
    one = layer_of_cell(cell, model)
    found = reduced_trace(trace, one.layer, one.sizes, tp, rates, options, one.num_layers)
    reduction = found.reduction
    note(
        f"{requests_text(found.trace)} make {len(found.steps)} steps; {len(reduction)} batches "
        f"stand for them, their totals within {reduction.totals_error:.2%}"
    )
    shares: dict[str, BatchShare] = {}
    for workload, weight in zip(reduction.workloads, reduction.weights.tolist(), strict=True):
        if weight > 0:
            text = BatchShare(workload, weight).text
            before = shares[text].weight if text in shares else 0.0
            shares[text] = BatchShare(Workload.parse(text), before + weight)
    return tuple(shares.values())
