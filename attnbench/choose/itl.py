"""What each backend gives a traffic: inter-token latency, time to first token, tokens per second.

The batches that stand for the trace are looked up among stored times (`choose.stored`: one device
class, protocol, timer, L2 state, execution). A backend with a time of every one of them becomes a
latency model, and the trace is served again with that model as the clock (`traffic.itl.serve`):
slower steps make other batches. A backend that lacks one time gets no answer, since what it lacks
may be what it is slow at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from attnbench.backends.registry import backend_entry, split_request
from attnbench.choose.itl_rest import Rest
from attnbench.choose.loads import Load, concurrency, curves
from attnbench.choose.stored import Ended, Measured, Point, Timed, unstable
from attnbench.choose.tries import Choice
from attnbench.store.record import Status
from attnbench.traffic.itl import ATTENTION_ONLY, serve
from attnbench.traffic.itl_interval import Interval, intervals
from attnbench.traffic.latency import StepModel
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.latency_rest import MeasuredRest
from attnbench.traffic.reduced import ReducedTrace
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.trace import scale_rate
from attnbench.traffic.types import StepBatches, Trace
from attnbench.workload import Workload

LINEAR_LAYERS = "linear layers at the roofline"
ROOFLINE = "roofline"
VALUES = (
    *("itl_p50_s", "itl_p90_s", "itl_p99_s", "ttft_p50_s", "ttft_p99_s"),
    *("ttft_attention_share", "tokens_per_s", "tokens_per_busy_s"),
)
MEASURED_AGAIN = (Status.NOISY, Status.THROTTLED)
"""Statuses that another run may mend; every other one stays until something else changes."""
_BEYOND = 1.05


@dataclass(frozen=True, slots=True)
class Answer:
    """What users of one backend feel.

    Attributes:
        choice: None: the roofline, a lower bound of every step's time.
        values: by the names of `VALUES`, seconds and shares; limits are NaN for the roofline.
        num_steps: of its own schedule.
        beyond: share of its time in steps that are larger, in some feature, than every measured
            batch: there its times are extrapolated.
        left_out_error: mean absolute error of a batch's time predicted from all others'.
        replicates: processes that timed the batch with the fewest.
        curves: see `loads.curves`.
        loads: the trace at other rates, where asked for, and at its own.
    """

    choice: Choice | None
    values: Mapping[str, Interval]
    num_steps: int
    beyond: float = 0.0
    left_out_error: float = 0.0
    replicates: int = 0
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    loads: tuple[Load, ...] = ()

    @property
    def name(self) -> str:
        return ROOFLINE if self.choice is None else self.choice.text


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A backend without a time of every batch.

    Attributes:
        request: as it was asked for, or as it is stored.
        reason: how many batches it lacks, and what they ended as.
        to_measure: what a run can mend.
    """

    request: str
    reason: str
    to_measure: tuple[Workload, ...]


@dataclass(frozen=True, slots=True)
class UserAnswer:
    """Every backend's answer, the fastest median inter-token latency first, the bound last."""

    answers: tuple[Answer, ...]
    unanswered: tuple[Unanswered, ...]
    scope: str
    num_batches: int


def answer(
    reduced: ReducedTrace,
    measured: Measured,
    requests: Sequence[str],
    *,
    with_rest: bool,
    steps: Rest | None = None,
    loads: Sequence[float] = (),
) -> UserAnswer:
    """Serve the trace with each backend's stored times.

    Args:
        requests: backends, `NAME` or `NAME:variant`; none: whoever has a time of every batch.
        with_rest: the linear layers at the roofline are part of a step.
        steps: the rest of a step as it was measured, in place of the roofline.
        loads: so many times its rate the trace is served at too; each is in `Answer.loads`.

    Raises:
        UnknownBackendError: a request for a backend that nobody registered.
        UsageError: a load that is not above zero.
    """
    workloads = reduced.reduction.workloads
    points, chosen, lacking = with_all_times(workloads, measured, requests)
    rest: StepModel | None = reduced.linear if with_rest else None
    rest = rest if steps is None else steps.model
    rates = [(load, scale_rate(reduced.trace, load)) for load in loads]
    found = [_answer(choice, reduced, points, rest, rates) for choice in chosen]
    found.sort(key=lambda one: (one.values["itl_p50_s"].value, one.name))
    scope = f"attention, and {LINEAR_LAYERS}" if with_rest else ATTENTION_ONLY
    if steps is not None:
        scope = f"attention, and the rest of {steps.text}"
    return UserAnswer((*found, _bound(reduced, rest, rates)), tuple(lacking), scope, len(workloads))


def with_all_times(
    workloads: Sequence[Workload], measured: Measured, requests: Sequence[str]
) -> tuple[list[Point], list[Choice], list[Unanswered]]:
    """(num_workloads,) what is stored, who has a time of every one, and who lacks what.

    Args:
        requests: as of `answer`.

    Raises:
        UnknownBackendError: a request for a backend that nobody registered.
    """
    for request in requests:
        backend_entry(split_request(request)[0])
    points = [measured.point(workload) for workload in workloads]
    stored = sorted({one for point in points for one in (*point.timed, *point.ended)})
    chosen: dict[Choice, None] = {}
    lacking: list[Unanswered] = []
    for request in requests or dict.fromkeys(choice.request for choice in stored):
        mine = [choice for choice in stored if _is_asked(choice, request)]
        whole = [choice for choice in mine if _is_whole(choice, points)]
        chosen.update(dict.fromkeys(whole))
        if not whole:
            lacking.append(_unanswered(request, mine, points, workloads))
    return points, list(chosen), lacking


def _is_whole(choice: Choice, points: Sequence[Point]) -> bool:
    """Whether it has a time of every batch, and they settled."""
    timed = [point.timed[choice] for point in points if choice in point.timed]
    return len(timed) == len(points) and not unstable(timed)


def _is_asked(choice: Choice, request: str) -> bool:
    backend, variant = split_request(request)
    return choice.backend == backend.upper() and variant in ("", choice.variant)


def _answer(
    choice: Choice,
    reduced: ReducedTrace,
    points: Sequence[Point],
    rest: StepModel | None,
    rates: Sequence[tuple[float, Trace]],
) -> Answer:
    timed: list[Timed] = [point.timed[choice] for point in points]
    seconds = np.array([one.seconds for one in timed])
    model = MeasuredLatency(reduced.reduction.workloads, seconds, reduced.attention.num_layers)
    settings = SchedulerSettings(block_size=choice.block_size)
    steps, latency = serve(reduced.trace, settings, model, rest, LINEAR_LAYERS)
    samples = [np.array(one.replicates) for one in timed]
    rest_s = None if rest is None else rest.of_steps(steps)
    drawn = partial(rest.drawn, steps) if isinstance(rest, MeasuredRest) else None
    values = intervals(reduced.trace, steps, model, samples, rest_s, drawn_rest=drawn)
    return Answer(
        choice=choice,
        values={name: values[name] for name in VALUES},
        num_steps=len(steps),
        beyond=_beyond(steps, model, reduced),
        left_out_error=float(np.abs(model.left_out_errors()).mean()),
        replicates=min(len(one.replicates) for one in timed),
        curves=curves(latency),
        loads=_loads(settings, model, rest, rates, lambda it: _beyond(it, model, reduced)),
    )


def _bound(
    reduced: ReducedTrace, rest: StepModel | None, rates: Sequence[tuple[float, Trace]]
) -> Answer:
    settings = SchedulerSettings(block_size=reduced.layer.block_size)
    steps, latency = serve(reduced.trace, settings, reduced.attention, rest, LINEAR_LAYERS)
    summary = latency.summary()
    nowhere = float("nan")
    return Answer(
        choice=None,
        values={name: Interval(nowhere, summary[name], nowhere) for name in VALUES},
        num_steps=len(steps),
        curves=curves(latency),
        loads=_loads(settings, reduced.attention, rest, rates, lambda it: 0.0),
    )


def _loads(
    settings: SchedulerSettings,
    attention: StepModel,
    rest: StepModel | None,
    rates: Sequence[tuple[float, Trace]],
    beyond: Callable[[StepBatches], float],
) -> tuple[Load, ...]:
    """The trace at other rates: the model's times are asked for, the batches are new."""
    found = []
    for load, trace in rates:
        steps, latency = serve(trace, settings, attention, rest, LINEAR_LAYERS)
        lasted = float(trace.arrival_s[-1]) or float("nan")
        rate = (len(trace) - 1) / lasted
        found.append(Load(load, rate, concurrency(steps), latency.summary(), beyond(steps)))
    return tuple(found)


def _beyond(steps: StepBatches, model: MeasuredLatency, reduced: ReducedTrace) -> float:
    between = model.between(steps.step_offsets, steps.query_len, steps.context_len)
    largest = reduced.reduction.features.max(axis=0)
    # The first column of `between` is a one; contexts of batches are rounded by up to 1/32.
    outside = (between.features[:, 1:] > _BEYOND * largest).any(axis=1)
    return float(steps.duration_s[outside].sum() / steps.duration_s.sum())


def _unanswered(
    request: str, mine: Sequence[Choice], points: Sequence[Point], workloads: Sequence[Workload]
) -> Unanswered:
    """What the choice with the most times lacks."""
    if not mine:
        return Unanswered(request, "not measured here", tuple(workloads))
    best = max(mine, key=lambda choice: sum(choice in point.timed for point in points))
    lacks: list[Workload] = []
    counts: dict[str, int] = {}
    restless = unstable(one.timed[best] for one in points if best in one.timed)
    for point, workload in zip(points, workloads, strict=True):
        if best in point.timed and not (restless and point.timed[best].num_noisy):
            continue
        ended = point.ended.get(best)
        why = "not measured"
        if best in point.timed:
            ended = Ended(best, Status.NOISY, f"in all {restless}")
        if ended is not None:
            why = f"{ended.status}: {ended.reason}" if ended.reason else str(ended.status)
        counts[why] = counts.get(why, 0) + 1
        if ended is None or ended.status in MEASURED_AGAIN:
            lacks.append(
                workload.replace(block_size=best.block_size, kv_cache_layout=best.kv_cache_layout)
            )
    said = "; ".join(f"{count} {why}" for why, count in counts.items())
    reason = f"of {len(points)} batches: {said}"
    return Unanswered(best.request, reason, tuple(lacks))
