"""One backend run for `attnbench verify`, in a worker: what it gave, and how far it is off."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attnbench.backends.batch import AttentionBatch, batch_order, make_batch
from attnbench.backends.check import OutputCheck, check_output
from attnbench.backends.decode_steps import DecodeSteps
from attnbench.backends.kv_cache import fill_fresh_blocks
from attnbench.backends.reference import reference_attention
from attnbench.backends.registry import get_backend_class
from attnbench.errors import SelectionError
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import PointContext, failure_status, refusals
from attnbench.measure.prepare import prepare
from attnbench.measure.worker import TRUTH_KNOWN, describe
from attnbench.store.record import Status
from attnbench.workload.types import AttentionType

if TYPE_CHECKING:
    from attnbench.workload import Workload

#: A worker's answer when the backend has done its part; comparing is ours.
HAS_RUN = "has run"


@dataclass(frozen=True, slots=True)
class VerifyTask:
    """What a worker is asked.

    Attributes:
        planned: backend "" is the float64 reference by itself.
        steps: decode steps after the call (`decode_steps.py`).
        keep: file the outputs are saved to, in the workload's order of requests; None: nowhere.
    """

    planned: PlannedPoint
    steps: int
    keep: Path | None = None


@dataclass(frozen=True, slots=True)
class VerifyOutcome:
    """How one backend did.

    Attributes:
        status: OK, INCORRECT, UNSUPPORTED, ERROR, OOM, CRASH or TIMEOUT.
        checks: the call, then each step, against the reference for the same inputs, up to the
            first that is wrong.
        trace: where an ERROR was raised, for people.
    """

    status: Status
    reasons: tuple[str, ...] = ()
    checks: tuple[OutputCheck, ...] = ()
    trace: str = ""

    @property
    def has_failed(self) -> bool:
        return self.status not in (Status.OK, Status.UNSUPPORTED)


def possible_steps(workload: Workload, steps: int) -> int:
    """`steps`, or none where nothing is generated."""
    return steps if workload.attn_type is AttentionType.DECODER else 0


def verify_point(
    task: VerifyTask, context: PointContext, tell: Callable[[str], object] = lambda word: None
) -> VerifyOutcome:
    """Run, compare, save. `tell` gets TRUTH_KNOWN before the backend runs and HAS_RUN after."""
    try:
        with torch.no_grad():
            if not task.planned.backend:
                return _run_reference(task, context)
            if reasons := refusals(task.planned, context.device):
                return VerifyOutcome(Status.UNSUPPORTED, tuple(reasons))
            return _verify(task, context, tell)
    # Some batches are refused by the kernel only, whatever the predicates say.
    except SelectionError as error:
        return VerifyOutcome(Status.UNSUPPORTED, (describe(error),))
    # Whatever a kernel library raises is the answer about that backend.
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        return VerifyOutcome(failure_status(error), (describe(error),), trace=trace)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a chain: its inputs and what came out."""

    batch: AttentionBatch
    output: torch.Tensor
    lse: torch.Tensor | None


def _verify(
    task: VerifyTask, context: PointContext, tell: Callable[[str], object]
) -> VerifyOutcome:
    workload, backend = task.planned.workload, get_backend_class(task.planned.backend)
    batch, truth = context.truths.get(task.planned, backend, context.device)
    tell(TRUTH_KNOWN)
    calls = _run(task, batch)
    tell(HAS_RUN)
    order = batch_order(workload.requests, backend.get_builder_cls().reorder_batch_threshold)
    if task.keep is not None:
        _save([call.output for call in calls], batch, order, task.keep)
    checks: list[OutputCheck] = []
    for number, call in enumerate(calls):
        expected = reference_attention(call.batch) if number else truth
        kv_cache_dtype = workload.resolved_kv_cache_dtype
        check = check_output(call.output, expected, workload.dtype, kv_cache_dtype, call.lse)
        checks.append(check)
        if not check.ok:
            where = f"step {number}: " if number else ""
            note = "" if order == sorted(order) else f" (requests in the batch's order, {order})"
            reason = f"{where}{check.reason}{note}"
            return VerifyOutcome(Status.INCORRECT, (reason,), tuple(checks))
    return VerifyOutcome(Status.OK, (), tuple(checks))


def _run(task: VerifyTask, batch: AttentionBatch) -> list[_Call]:
    """The call and its steps, each fed by the one before, until an output is not finite."""
    steps = DecodeSteps(batch, task.steps) if task.steps else None
    point = prepare(task.planned, steps.first if steps else batch)
    if steps is not None:
        backend = get_backend_class(task.planned.backend)
        # One cache lives through all steps, as an engine's does.
        kv_cache: torch.Tensor = point.kv_cache
        fill_fresh_blocks(backend, batch.spec, kv_cache, steps.fresh_blocks)
    calls: list[_Call] = []
    while True:
        point.poison()
        point.attend()
        calls.append(_Call(point.batch, point.output().clone(), point.lse()))
        if steps is None or len(calls) > task.steps:
            return calls
        if not bool(torch.isfinite(calls[-1].output).all()):
            return calls
        point = point.next_step(steps.feed(calls[-1].output))


def _run_reference(task: VerifyTask, context: PointContext) -> VerifyOutcome:
    workload = task.planned.workload
    batch = make_batch(workload, context.device.torch_device)
    outputs = [reference_attention(batch).output]
    if task.steps:
        steps = DecodeSteps(batch, task.steps)
        for _ in range(task.steps):
            outputs.append(reference_attention(steps.feed(outputs[-1])).output)
    if task.keep is not None:
        _save(outputs, batch, list(range(len(batch.requests))), task.keep)
    return VerifyOutcome(Status.OK)


def _save(
    outputs: Sequence[torch.Tensor], batch: AttentionBatch, order: Sequence[int], path: Path
) -> None:
    """Outputs on the host, tokens in the workload's order of requests."""
    saved = []
    for number, output in enumerate(outputs):
        sizes = [1 if number else request.query_len for request in batch.requests]
        pieces = dict(zip(order, torch.split(output.cpu(), sizes), strict=True))
        saved.append(torch.cat([pieces[request] for request in sorted(pieces)]))
    torch.save(saved, path)
