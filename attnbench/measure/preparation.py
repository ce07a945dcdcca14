"""Preparing a point in two parts: its truth, which is ours to wait for, then the backend's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnbench.backends.check import OutputCheck, check_output
from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.measure.model_step import PreparedStep
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.prepare import PreparedPoint, TimedPoint, prepare
from attnbench.measure.truth import TruthCache


@dataclass(frozen=True, slots=True)
class Ready:
    """A point, how its output is checked, and how it is copied; twin None: it is not."""

    point: TimedPoint
    check: Callable[[Any], OutputCheck]
    twin: Callable[[], TimedPoint] | None = None
    twin_bytes: int = 0


def preparation(
    planned: PlannedPoint, truths: TruthCache, device: Device, for_graph: bool
) -> Callable[[], Ready]:
    """What prepares the point, its truth known when this returns.

    The call raises SelectionError: `for_graph`, and the backend cannot be captured for this batch.
    """
    backend = get_backend_class(planned.backend)
    workload = planned.workload
    if workload.is_step:
        step_batch, weights, step_truth = truths.get_step(planned, backend, device)

        def make_step() -> Ready:
            step = PreparedStep(planned, step_batch, weights, step_truth, device, for_graph)
            # No twins: a step's weights alone are more than a cache, and a small model is flushed
            # out of it.
            return Ready(step, PreparedStep.check)

        return make_step
    batch, truth = truths.get(planned, backend, device)

    def check(whose: PreparedPoint) -> OutputCheck:
        return check_output(
            whose.output(), truth, workload.dtype, workload.resolved_kv_cache_dtype, whose.lse()
        )

    def make() -> Ready:
        point = prepare(planned, batch, for_graph)
        return Ready(point, check, point.twin, point.twin_bytes)

    return make
