"""One point: refuse, prepare, check, time, check again. It ends as rows, never as an exception."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.check import OutputCheck, check_output
from attnbench.backends.device import Device
from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.errors import AttnBenchError
from attnbench.measure.environment import Environment, OtherLoad, read_conditions
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.prepare import PreparedPoint, prepare
from attnbench.measure.stopping import StoppingRule
from attnbench.measure.timers import Subject, Timer
from attnbench.measure.truth import TruthCache
from attnbench.selection import config_of
from attnbench.store.record import Measurement, Metric, Status
from attnbench.workload.cost import attention_bytes, attention_flops

#: Share of the budget the smaller metrics get each.
_PART_BUDGET = 0.2

#: Cores other processes may use while the wall clock runs, before the time is doubted.
_MAX_OTHER_CORES = 0.25


@dataclass(frozen=True, slots=True)
class PointContext:
    """What every point of one worker shares."""

    run_id: str
    replicate: int
    device: Device
    environment: Environment
    options: MeasureOptions
    timer: Timer
    timer_floor_s: float
    truths: TruthCache


class RowMaker:
    """Rows of one point: the columns they share are filled in once."""

    def __init__(
        self,
        planned: PlannedPoint,
        run_id: str,
        replicate: int,
        environment: Environment,
        timer: Timer,
    ) -> None:
        self._workload = planned.workload
        self._started = time.perf_counter()
        self._shared: dict[str, Any] = {
            **planned.workload.columns(),
            **environment.columns(),
            "run_id": run_id,
            "replicate": replicate,
            "point_id": planned.point_id,
            "backend": planned.backend,
            "variant": planned.variant,
            "suite": planned.suite,
            "started_at": datetime.now(UTC),
            # Refused and failed rows too: a series is the same whether it can be timed or not.
            "timer": timer.name,
            "l2_state": timer.l2_state,
        }

    def row(self, status: Status, metric: Metric = Metric.ATTENTION, **more: Any) -> Measurement:
        costs = {}
        if metric is Metric.ATTENTION:
            costs = {
                "bytes_moved": attention_bytes(self._workload),
                "flops": attention_flops(self._workload),
            }
        columns = {
            **self._shared,
            **costs,
            "status": str(status),
            "metric": str(metric),
            "duration_s": time.perf_counter() - self._started,
            **more,
        }
        return Measurement(**columns)


def refusals(planned: PlannedPoint, device: Device) -> list[str]:
    """Every reason why this point cannot run here; empty: it can."""
    backend = get_backend_class(planned.backend)
    reasons = backend.validate_configuration(config_of(planned.workload), device)
    if missing := backend_status(planned.backend, device):
        reasons.append(missing)
    if is_interpreted(backend, device) and (
        refusal := backend.interpreter_refusal(planned.workload)
    ):
        reasons.append(refusal)
    return reasons


def is_interpreted(backend: type[AttentionBackend], device: Device) -> bool:
    """Whether this backend's kernels run under Triton's interpreter here: correct, never timed."""
    return device.kind == "cpu" and backend.interpreted_on_cpu


def measure_point(
    planned: PlannedPoint,
    context: PointContext,
    truth_known: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Rows of one point; the first is metric `attention` and carries the status.

    `truth_known` is called when the reference is there and the backend's own work begins.
    """
    maker = RowMaker(planned, context.run_id, context.replicate, context.environment, context.timer)
    try:
        reasons = refusals(planned, context.device)
        if reasons:
            return [maker.row(Status.UNSUPPORTED, reasons=tuple(reasons))]
        # One grad mode from check to timing: torch.compile guards on it and would compile twice.
        with torch.no_grad():
            return list(_measure(planned, context, maker, truth_known))
    except MemoryError as error:
        return [maker.row(Status.OOM, reasons=(_one_line(error),))]
    # Whatever a kernel library raises costs this point only; the row keeps the reason.
    except Exception as error:
        status = Status.OOM if _is_out_of_memory(error) else Status.ERROR
        return [maker.row(status, reasons=(_one_line(error),))]


def untimed_reason(backend: type[AttentionBackend], device: Device, timer: Timer) -> str:
    """Why a correct point gets no time here; "": it can be timed."""
    if is_interpreted(backend, device):
        return "Triton's interpreter: correct here, but not a time"
    if device.kind != "cpu" and timer.name == "wall":
        # A launch returns before its kernel ends: the clock would read the launch.
        return f"the wall clock cannot time kernels of {device.kind}; a GPU timer is not built yet"
    return ""


def _measure(
    planned: PlannedPoint,
    context: PointContext,
    maker: RowMaker,
    truth_known: Callable[[], None],
) -> Iterator[Measurement]:
    backend = get_backend_class(planned.backend)
    batch, truth = context.truths.get(planned, backend, context.device)
    truth_known()
    conditions_before = read_conditions()
    point = prepare(planned, batch)

    def check() -> OutputCheck:
        point.poison()
        point.attend()
        return check_output(
            point.output(),
            truth,
            planned.workload.dtype,
            planned.workload.resolved_kv_cache_dtype,
        )

    def facts(found: OutputCheck, *checked: str) -> dict[str, Any]:
        return {
            "max_abs_error": found.max_abs_error,
            "rel_error": found.rel_error,
            "checked": checked,
            "conditions_before": conditions_before,
        }

    before = check()
    if not before.ok:
        yield maker.row(Status.INCORRECT, reasons=(before.reason,), **facts(before, "before"))
        return
    if untimed := untimed_reason(backend, context.device, context.timer):
        yield maker.row(Status.UNTIMED, reasons=(untimed,), **facts(before, "before"))
        return

    others = OtherLoad()
    main = _time(Metric.ATTENTION, point, context, planned, maker, facts(before, "before", "after"))
    main = _doubt_if_shared(main, others.cores(), context)
    conditions_after = {**read_conditions(), **main.conditions_after}
    after = check()
    if not after.ok:
        # Right once and wrong after timing: the time is of something else, and is not kept.
        reasons = (f"after timing: {after.reason}",)
        yield maker.row(Status.INCORRECT, reasons=reasons, **facts(after, "before", "after"))
        return
    yield replace(main, conditions_after=conditions_after)
    more = {"conditions_before": conditions_before, "conditions_after": conditions_after}
    for metric in point.timed_calls():
        try:
            yield _time(metric, point, context, planned, maker, more)
        # A part that cannot be timed alone costs that part, not the whole.
        except Exception as error:
            yield maker.row(Status.ERROR, metric, reasons=(_one_line(error),))


def _doubt_if_shared(
    row: Measurement, other_cores: float | None, context: PointContext
) -> Measurement:
    """A wall-clock time taken while others used the CPU is NOISY, and says why."""
    if other_cores is None or context.timer.name != "wall":
        return row
    row = replace(row, conditions_after={"other_processes_cores": other_cores})
    if other_cores <= _MAX_OTHER_CORES:
        return row
    reason = f"other processes kept {other_cores:.1f} cores busy while it was timed"
    return replace(row, status=str(Status.NOISY), reasons=(reason,))


def _time(
    metric: Metric,
    point: PreparedPoint,
    context: PointContext,
    planned: PlannedPoint,
    maker: RowMaker,
    more: Mapping[str, Any],
) -> Measurement:
    options = context.options
    is_main = metric is Metric.ATTENTION
    call = point.attend if is_main else point.timed_calls()[metric]
    rule = StoppingRule(
        options.target_rel_ci,
        options.budget_s if is_main else options.budget_s * _PART_BUDGET,
        options.min_samples,
        options.max_samples,
    )
    subject = Subject(planned.workload, planned.backend, metric, context.replicate)
    timing = context.timer.time(call, rule, subject)
    return maker.row(
        Status.NOISY if timing.is_noisy else Status.OK,
        metric,
        samples=timing.samples,
        stop_reason=str(timing.stop_reason),
        timer_floor_s=context.timer_floor_s,
        **more,
    )


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "out of memory" in text.lower()
    )


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    return first if isinstance(error, AttnBenchError) else f"{name}: {first}"[:500]
