"""Which backend is best for a workload, and by how much: backends of one run against each other.

Only values of one run, with one timer, L2 state and execution mode, are ever put side by side, so
that nothing but the backend differs. The margin has the interval of `compare`
(`attnbench.history.rule`), and is called clear where `compare` would say slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.history.rule import Estimate, Verdict, VerdictSettings, decide, estimate_groups
from attnbench.history.series import RunValue, Series
from attnbench.history.wording import interval_text
from attnbench.store.record import Metric, Status
from attnbench.workload import Workload

#: What `best_row` gives, in its order.
BEST_COLUMNS = (
    "device",
    "timer",
    "l2_state",
    "execution",
    "phase",
    "batch",
    "query",
    "context",
    "workload",
    "best",
    "best_us",
    "next",
    "next_us",
    "margin",
    "clear",
    "noisy",
    "no_time",
    "run_id",
)

#: The order people think in.
_PHASES = ("decode", "extend", "mixed", "prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What must be the same for two times to stand side by side."""

    device_class: str
    timer: str
    l2_state: str
    execution: str

    @property
    def text(self) -> str:
        """`nvidia-h200, timer graph, L2 cold, graph`."""
        parts = (
            self.device_class,
            f"timer {self.timer}",
            f"L2 {self.l2_state}" if self.l2_state else "",
            self.execution,
        )
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A backend that was timed. `seconds` is the median over its replicates of one layer's call."""

    backend: str  # `NAME` or `NAME:variant`
    seconds: float
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """One workload of one run: `contenders` from fastest on, at least one.

    Attributes:
        batch: number of requests.
        query_len, seq_len: tokens of the longest query, and of the longest sequence with it.
        margin: seconds of the second contender over the first's; None where there is one only.
        is_clear: the margin is beyond the timer's noise, and neither was noisy.
        untimed: backends that ended without a time, with what they ended as.
    """

    how: How
    phase: str
    workload: str
    batch: int
    query_len: int
    seq_len: int
    run_id: str
    contenders: tuple[Contender, ...]
    margin: Estimate | None
    is_clear: bool
    untimed: tuple[tuple[str, Status], ...] = ()

    @property
    def winner(self) -> Contender:
        return self.contenders[0]


def best_backends(
    every: Sequence[Series],
    device_class: str | None = None,
    timer: str | None = None,
    l2_state: str | None = None,
    settings: VerdictSettings | None = None,
) -> list[Best]:
    """The best backend of every workload, metric `attention`; by device, phase, batch and context.

    None means every device class, timer or L2 state, each for itself. Of each workload the newest
    run counts that timed two backends of it; where no run did, the newest that timed one.
    """
    settings = settings or VerdictSettings()
    timed: dict[tuple[How, str], dict[str, list[tuple[Series, RunValue]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    untimed: dict[tuple[str, str, str], dict[str, Status]] = defaultdict(dict)
    for series in every:
        key = series.key
        if key.metric != Metric.ATTENTION or device_class not in (None, key.device_class):
            continue
        workload = str(series.identity["workload"])
        for value in series.values:
            if not value.is_timed:
                name = _backend_name(series)
                untimed[key.device_class, workload, value.run_id][name] = value.status
            elif timer in (None, key.timer) and l2_state in (None, key.l2_state):
                how = How(
                    device_class=key.device_class,
                    timer=key.timer,
                    l2_state=key.l2_state,
                    execution=key.execution,
                )
                timed[how, workload][value.run_id].append((series, value))
    found = []
    for (how, workload), by_run in timed.items():
        run_id = max(by_run, key=lambda r: (len(by_run[r]) > 1, by_run[r][0][1].started_at, r))
        others = untimed[how.device_class, workload, run_id]
        found.append(_best(how, workload, run_id, by_run[run_id], others, settings))
    found.sort(key=_order)
    return found


def best_row(best: Best) -> dict[str, Any]:
    """A line of `BEST_COLUMNS`. Context is what lies in the KV cache before the longest query."""
    following = best.contenders[1] if len(best.contenders) > 1 else None
    return {
        "device": best.how.device_class,
        "timer": best.how.timer,
        "l2_state": best.how.l2_state,
        "execution": best.how.execution,
        "phase": best.phase,
        "batch": best.batch,
        "query": best.query_len,
        "context": best.seq_len - best.query_len,
        "workload": best.workload,
        "best": best.winner.backend,
        "best_us": best.winner.seconds * 1e6,
        "next": following.backend if following else "",
        "next_us": following.seconds * 1e6 if following else None,
        "margin": interval_text(best.margin) if best.margin else "",
        "clear": best.is_clear,
        "noisy": [c.backend for c in best.contenders[:2] if c.status is Status.NOISY],
        "no_time": [f"{name} {status}" for name, status in best.untimed],
        "run_id": best.run_id,
    }


def _best(
    how: How,
    workload: str,
    run_id: str,
    values: Sequence[tuple[Series, RunValue]],
    untimed: dict[str, Status],
    settings: VerdictSettings,
) -> Best:
    ranked = sorted(
        ((value.median_s or 0.0, _backend_name(series), value) for series, value in values),
        key=lambda entry: entry[:2],
    )
    contenders = tuple(
        Contender(backend=name, seconds=seconds, status=value.status)
        for seconds, name, value in ranked
    )
    margin, is_clear = None, False
    if len(ranked) > 1:
        first, second = ranked[0][2], ranked[1][2]
        noise = settings.noise(how.timer)
        margin = estimate_groups(
            [first.replicates], [second.replicates], noise, settings.confidence
        )
        is_slower = decide(margin, noise)[0] is Verdict.REGRESSION
        is_clear = is_slower and Status.NOISY not in (first.status, second.status)
    requests = Workload.parse(workload).requests
    return Best(
        how=how,
        phase=str(values[0][0].identity["phase"]),
        workload=workload,
        batch=len(requests),
        query_len=max(request.query_len for request in requests),
        seq_len=max(request.seq_len for request in requests),
        run_id=run_id,
        contenders=contenders,
        margin=margin,
        is_clear=is_clear,
        untimed=tuple(
            sorted((n, s) for n, s in untimed.items() if n not in {c.backend for c in contenders})
        ),
    )


def _backend_name(series: Series) -> str:
    variant = series.identity["variant"]
    return f"{series.identity['backend']}{f':{variant}' if variant else ''}"


def _order(best: Best) -> tuple[object, ...]:
    phase = _PHASES.index(best.phase) if best.phase in _PHASES else len(_PHASES)
    how = (best.how.device_class, best.how.timer, best.how.l2_state, best.how.execution)
    return (how, phase, best.batch, best.seq_len, best.query_len, best.workload)
