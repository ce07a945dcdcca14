"""The smallest batch that still fails: requests, lengths, heads, steps and features taken away.

Greedy: of the smaller neighbours of a failing workload, largest cut first, the first one that fails
in the same way takes its place, until none does. Every workload draws its own data (its text seeds
them), so a failure that needs rare numbers may be lost on the way, and is not shrunk past there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan

from attnbench.errors import WorkloadError
from attnbench.measure.verify_worker import VerifyOutcome
from attnbench.store.record import Status
from attnbench.workload import Workload
from attnbench.workload.types import AttentionShape, BatchSpec, Request

#: Seconds after which no new try is begun.
BUDGET_S = 60.0

#: Tries one at a time, request by request, only where there are this few.
_FEW = 6


@dataclass(frozen=True, slots=True)
class Smallest:
    """The smallest failing batch that was found.

    is_final: nothing smaller fails; False: the time or number of tries ran out before that was
    known. is_stopped: that was because somebody pressed Ctrl-C.
    """

    workload: Workload
    steps: int
    outcome: VerifyOutcome
    tries: int
    is_final: bool
    is_stopped: bool = False


def shrink(
    workload: Workload,
    steps: int,
    outcome: VerifyOutcome,
    ask: Callable[[Workload, int], VerifyOutcome],
    *,
    budget_s: float = BUDGET_S,
    max_tries: int = 200,
    now_s: Callable[[], float] = time.monotonic,
) -> Smallest:
    """Cut `workload` down while `ask` says that it fails as in `outcome`.

    A Ctrl-C ends the search, not the program: what was found so far is worth a report.

    Args:
        steps: decode steps it fails within.
        outcome: how it fails.
        ask: runs a candidate; a refusal is no failure.
        budget_s, max_tries: no new try is begun after this many seconds or tries.
    """
    best = Smallest(workload, steps, outcome, 0, is_final=False)
    # Only steps that were run can matter.
    if outcome.checks and len(outcome.checks) - 1 < steps:
        best = replace(best, steps=max(0, len(outcome.checks) - 1))
    tried: set[tuple[str, int]] = set()
    started, tries = now_s(), 0
    while True:
        for smaller, fewer in neighbours(best.workload, best.steps):
            if (smaller.text, fewer) in tried:
                continue
            if tries >= max_tries or now_s() - started >= budget_s:
                return replace(best, tries=tries)
            tried.add((smaller.text, fewer))
            tries += 1
            try:
                found = ask(smaller, fewer)
            except KeyboardInterrupt:
                return replace(best, tries=tries, is_stopped=True)
            if _way(found) == _way(outcome):
                best = Smallest(smaller, fewer, found, tries, is_final=False)
                break
        else:
            return replace(best, tries=tries, is_final=True)


def _way(outcome: VerifyOutcome) -> tuple[str, ...]:
    """How it failed. Another exception, signal or kind of wrong output may be another bug."""
    reason = outcome.reasons[0] if outcome.reasons else ""
    if outcome.status == Status.INCORRECT and outcome.checks:
        last = outcome.checks[-1]
        return str(outcome.status), "LSE" if "LSE is off" in reason else str(isnan(last.rel_error))
    if outcome.status in (Status.CRASH, Status.ERROR):
        return str(outcome.status), reason.partition(":")[0]
    return (str(outcome.status),)


def neighbours(workload: Workload, steps: int) -> Iterator[tuple[Workload, int]]:
    """Smaller (workload, steps), the largest cuts first. Invalid ones are left out."""
    for fewer in _cuts(steps, 0):
        yield workload, fewer
    for requests in _fewer_requests(workload.requests):
        yield from _valid(workload, steps, requests=requests)
    for requests in _shorter_requests(workload.requests):
        yield from _valid(workload, steps, requests=requests)
    for shape in _fewer_heads(workload.shape):
        yield from _valid(workload, steps, shape=shape)
    for shape in _plainer(workload.shape):
        yield from _valid(workload, steps, shape=shape)
    if workload.common_prefix_len:
        yield from _valid(workload, steps, prefix=0)


def _valid(
    workload: Workload,
    steps: int,
    requests: Sequence[Request] | None = None,
    shape: AttentionShape | None = None,
    prefix: int | None = None,
) -> Iterator[tuple[Workload, int]]:
    """The changed workload with its lengths written out, unless it contradicts itself."""
    requests = workload.requests if requests is None else tuple(requests)
    context = min(request.seq_len - request.query_len for request in requests)
    wanted = workload.common_prefix_len if prefix is None else prefix
    block = workload.block_size
    try:
        yield (
            workload.replace(
                batch_spec=BatchSpec(tuple(requests)),
                lengths="",
                shape=shape or workload.shape,
                common_prefix_len=min(wanted, context // block * block),
            ),
            steps,
        )
    except WorkloadError:
        return


def _cuts(value: int, least: int) -> list[int]:
    """Smaller numbers to try: all of the way to the least, half of it, a quarter, ... one less."""
    cut, cuts = value - least, []
    while cut > 0:
        cuts.append(value - cut)
        cut //= 2
    return cuts


def _fewer_requests(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    count = len(requests)
    if count > 1:
        yield requests[: count // 2]
        yield requests[count // 2 :]
    if 2 < count <= _FEW:
        for index in range(count):
            yield [*requests[:index], *requests[index + 1 :]]


def _shorter_requests(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    """All contexts, all queries, then those of each request."""
    context = max(r.seq_len - r.query_len for r in requests)
    query = max(r.query_len for r in requests)
    for length in _cuts(context, 0):
        yield [_with(r, context=min(r.seq_len - r.query_len, length)) for r in requests]
    for length in _cuts(query, 1):
        yield [_with(r, query=min(r.query_len, length)) for r in requests]
    if 1 < len(requests) <= _FEW:
        for index, request in enumerate(requests):
            for length in _cuts(request.seq_len - request.query_len, 0):
                yield _replaced(requests, index, _with(request, context=length))
            for length in _cuts(request.query_len, 1):
                yield _replaced(requests, index, _with(request, query=length))


def _with(request: Request, query: int | None = None, context: int | None = None) -> Request:
    query = request.query_len if query is None else query
    context = request.seq_len - request.query_len if context is None else context
    return Request(query, query + context)


def _replaced(requests: Sequence[Request], index: int, by: Request) -> list[Request]:
    return [*requests[:index], by, *requests[index + 1 :]]


def _fewer_heads(shape: AttentionShape) -> Iterator[AttentionShape]:
    group = shape.num_heads // shape.num_kv_heads
    pairs = [(kv * group, kv) for kv in _cuts(shape.num_kv_heads, 1)]
    pairs += [(shape.num_kv_heads * g, shape.num_kv_heads) for g in _cuts(group, 1)]
    for num_heads, num_kv_heads in pairs:
        yield replace(
            shape,
            name="",
            tensor_parallel_size=1,
            num_layers=1,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )


def _plainer(shape: AttentionShape) -> Iterator[AttentionShape]:
    """Without one feature."""
    if shape.sliding_window:
        yield replace(shape, sliding_window=0)
    if shape.logits_soft_cap:
        yield replace(shape, logits_soft_cap=0.0)
    if shape.has_sink:
        yield replace(shape, has_sink=False)
    if shape.use_alibi:
        yield replace(shape, use_alibi=False)
