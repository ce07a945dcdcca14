"""One point: refuse, prepare, check, time, check again. It ends as rows, never as an exception."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.check import OutputCheck
from attnbench.backends.device import Device
from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.errors import AttnBenchError, SelectionError, TimerError
from attnbench.measure.environment import Environment, OtherLoad, read_conditions
from attnbench.measure.gpu.clock import THROTTLE_THRESHOLD
from attnbench.measure.gpu.nvml import invalidating_reasons, throttle_reasons
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.preparation import preparation
from attnbench.measure.sampling import Target, sample
from attnbench.measure.stopping import StoppingRule, StopReason
from attnbench.measure.timers import Subject, Timer
from attnbench.measure.truth import TruthCache
from attnbench.selection import config_of
from attnbench.store.record import Measurement, Metric, Status
from attnbench.workload.cost import attention_bytes, attention_flops
from attnbench.workload.model import step_bytes, step_flops

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
    host_floor_s: float
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
        self._metric = planned.metric
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
            "execution": timer.execution,
            "l2_state": timer.l2_states[0],
        }

    def row(self, status: Status, metric: Metric | None = None, **more: Any) -> Measurement:
        """A row of `metric`; None: of the point's own."""
        metric = metric or self._metric
        costs = {}
        if metric is Metric.ATTENTION:
            costs = {
                "bytes_moved": attention_bytes(self._workload),
                "flops": attention_flops(self._workload),
            }
        elif metric is Metric.STEP:
            costs = {
                "bytes_moved": step_bytes(self._workload),
                "flops": step_flops(self._workload),
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
    config = config_of(planned.workload)
    reasons = backend.validate_configuration(config, device)
    if not reasons and (refusal := backend.variant_refusal(planned.variant, config, device)):
        reasons.append(refusal)
    missing = backend_status(planned.backend, device, planned.variant)
    if missing and missing not in reasons:
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
    """Rows of one point; the first is of the point's own metric and carries the status.

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
    # Whatever a kernel library raises costs this point only; the row keeps the reason.
    except Exception as error:
        return [maker.row(failure_status(error), reasons=(_one_line(error),))]


def other_kernels(patterns: Sequence[str], row: Measurement) -> str:
    """Why the kernels of `row` are not those its variant promises, naming both; "": they are, or
    nothing is promised, or the timer saw no names."""
    names = row.kernel_names
    if not names or not patterns or any(re.search(p, name) for p in patterns for name in names):
        return ""
    variant = f"{row.backend}:{row.variant}".rstrip(":")
    return (
        f"{variant} promises a kernel named like {' or '.join(patterns)}; it launched "
        f"{', '.join(dict.fromkeys(names))}: a fallback, whose time is not this variant's"
    )


def untimed_reason(backend: type[AttentionBackend], device: Device, timer: Timer) -> str:
    """Why a correct point gets no time here; "": it can be timed."""
    if is_interpreted(backend, device):
        return "Triton's interpreter: correct here, but not a time"
    if device.kind != "cpu" and timer.name == "wall":
        # A launch returns before its kernel ends: the clock would read the launch.
        return f"the wall clock cannot time kernels of {device.kind}; use --timer event"
    return ""


def _measure(
    planned: PlannedPoint,
    context: PointContext,
    maker: RowMaker,
    truth_known: Callable[[], None],
) -> Iterator[Measurement]:
    backend = get_backend_class(planned.backend)
    is_graph = context.timer.execution == "graph"
    make = preparation(planned, context.truths, context.device, is_graph)
    truth_known()
    look = partial(
        read_conditions, context.environment.device_uuid, context.options.locked_clock_hz
    )
    conditions_before = look()
    try:
        ready = make()
    except SelectionError as refusal:
        yield maker.row(Status.UNSUPPORTED, reasons=(str(refusal),))
        return

    point, check_of, twin = ready.point, ready.check, ready.twin
    every = [point]  # and its twins, when a timer asks for some

    def facts(found: OutputCheck, *checked: str) -> dict[str, Any]:
        return {
            "max_abs_error": found.max_abs_error,
            "rel_error": found.rel_error,
            "checked": checked,
            "conditions_before": conditions_before,
        }

    point.poison()
    point.attend()
    before = check_of(point)
    if not before.ok:
        yield maker.row(Status.INCORRECT, reasons=(before.reason,), **facts(before, "before"))
        return
    if untimed := untimed_reason(backend, context.device, context.timer):
        yield maker.row(Status.UNTIMED, reasons=(untimed,), **facts(before, "before"))
        return

    def twins(count: int) -> list[Callable[[], object]]:
        every.extend([twin() for _ in range(count)] if twin is not None else [])
        return [one.attend for one in every[1:]]

    def poison() -> None:
        for one in every:
            one.poison()

    metric = planned.metric
    target = Target(
        point.attend,
        (step_bytes if metric is Metric.STEP else attention_bytes)(planned.workload),
        twins if twin is not None else None,
        poison,
        ready.twin_bytes,
    )
    timed = _Timed(planned, context, maker)
    checked = ("before", "after_graph_replay" if is_graph else "after")
    conditions_after: Mapping[str, float] = {}
    for l2_state in context.timer.l2_states:
        del every[1:]
        others = OtherLoad()
        try:
            row = timed.row(metric, target, l2_state, facts(before, *checked))
        except TimerError as error:
            reasons = (str(error),)
            yield maker.row(
                Status.UNTIMED, reasons=reasons, l2_state=l2_state, **facts(before, "before")
            )
            continue
        row = _doubt_if_shared(row, others.cores(), context)
        conditions_after = {**look(), **row.conditions_after}
        # What the last timed block left behind, not what one more call would write.
        found = [check_of(one) for one in every]
        wrong = next((one for one in found if not one.ok), None)
        if wrong is not None:
            # Right once and wrong after timing: the time is of something else, and is not kept.
            reasons = (f"after timing: {wrong.reason}",)
            yield maker.row(
                Status.INCORRECT, reasons=reasons, l2_state=l2_state, **facts(wrong, *checked)
            )
            return
        promised = backend.promised_kernels(planned.workload, planned.variant, context.device)
        if other := next(filter(None, (other_kernels(group, row) for group in promised)), ""):
            # Right, and not what the row says it is: an ERROR, since no number is wrong.
            yield maker.row(
                Status.ERROR,
                reasons=(other,),
                l2_state=l2_state,
                kernel_names=row.kernel_names,
                **facts(before, *checked),
            )
            return
        held_back = throttle_reasons(conditions_before, conditions_after)
        row = replace(row, conditions_after=conditions_after, throttle_reasons=held_back)
        yield _doubt_if_held_back(row)
    del every[1:]
    more = {"conditions_before": conditions_before, "conditions_after": conditions_after}
    parts = dict(point.timed_calls())
    if context.timer.host is not context.timer:
        parts[Metric.HOST] = point.attend
    for part, call in parts.items():
        try:
            yield timed.row(part, Target(call), context.timer.l2_states[0], more)
        # A part that cannot be timed alone costs that part, not the whole.
        except TimerError as error:
            yield maker.row(Status.UNTIMED, part, reasons=(str(error),))
        except Exception as error:
            yield maker.row(Status.ERROR, part, reasons=(_one_line(error),))


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


def _doubt_if_held_back(row: Measurement) -> Measurement:
    """A time of a device that is too hot or short of power is NOISY, at whatever clock."""
    bad = invalidating_reasons(row.throttle_reasons)
    if not bad or row.status != Status.OK:
        return row
    reason = f"the device was held back while it was timed: {', '.join(bad)}"
    return replace(row, status=str(Status.NOISY), reasons=(reason,))


#: Metrics that are the host's work, whatever the device.
_HOST_METRICS = (Metric.HOST, Metric.METADATA_BUILD)


class _Timed:
    """Rows of one point's metrics, each by the timer it is for."""

    def __init__(self, planned: PlannedPoint, context: PointContext, maker: RowMaker) -> None:
        self._planned = planned
        self._context = context
        self._maker = maker

    def row(
        self, metric: Metric, target: Target, l2_state: str, more: Mapping[str, Any]
    ) -> Measurement:
        context, options = self._context, self._context.options
        timer = context.timer.host if metric in _HOST_METRICS else context.timer
        floor_s = context.host_floor_s if metric in _HOST_METRICS else context.timer_floor_s
        rule = StoppingRule(
            options.target_rel_ci,
            options.budget_s * (1.0 if metric is self._planned.metric else _PART_BUDGET),
            options.min_samples,
            options.max_samples,
        )
        subject = Subject(self._planned.workload, self._planned.backend, metric, context.replicate)
        timing = sample(timer.open(target, subject, l2_state), rule, target)
        how = {
            "timer": timer.name,
            # Metadata for a graph is other work than metadata for a call, and a series of its own.
            "execution": (
                context.timer.execution if metric is Metric.METADATA_BUILD else timer.execution
            ),
            "l2_state": timing.l2_state,
            "reuse_distance_bytes": timing.reuse_distance_bytes,
            "timer_floor_s": floor_s,
            "stop_reason": str(timing.stop_reason),
            "discarded": timing.discarded,
            "kernel_names": timing.kernel_names,
        }
        if timing.stop_reason is StopReason.THROTTLED:
            reason = (
                f"{timing.discarded} samples were below {THROTTLE_THRESHOLD:.0%} of the rated "
                "clock; let the device cool, see `attnbench doctor`, or, if its clocks were "
                "lowered on purpose, give them with --rated-clock"
            )
            return self._maker.row(Status.THROTTLED, metric, reasons=(reason,), **how, **more)
        bad = next((s for s in timing.samples if not (math.isfinite(s) and s > 0)), None)
        if bad is not None:
            reason = f"the timer {timer.name} gave a time of {bad:g} s; see `attnbench doctor`"
            return self._maker.row(Status.ERROR, metric, reasons=(reason,), **how, **more)
        return self._maker.row(
            Status.NOISY if timing.is_noisy else Status.OK,
            metric,
            samples=timing.samples,
            sm_clock_hz=timing.sm_clock_hz,
            **how,
            **more,
        )


def failure_status(error: Exception) -> Status:
    """OOM or ERROR."""
    return Status.OOM if _is_out_of_memory(error) else Status.ERROR


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in text
        or "out of memory" in text.lower()
    )


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    return first if isinstance(error, AttnBenchError) else f"{name}: {first}"[:500]
