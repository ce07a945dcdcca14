"""The judge of a run: every series it measured against that series' runs before it.

One series is judged in `series_verdict.py`; here their verdicts become one, with what is missing,
what failed, and which software changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from attnbench.errors import ExitCode
from attnbench.history.night import has_comparable_runs, judge_panel
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.runs import NEEDED_COLUMNS as NEEDED_COLUMNS
from attnbench.history.runs import (
    EnvironmentChange,
    RunSummary,
    environment_change,
    find_run,
    newest_run,
)
from attnbench.history.series import GRAVITY, SeriesKey
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.store.record import Status

if TYPE_CHECKING:
    from attnbench.history.alarms import Alarms

#: Statuses that mean the run did not do what was planned, worst first.
INCOMPLETE_STATUSES = (Status.INCORRECT, Status.CRASH, Status.OOM, Status.TIMEOUT, Status.ERROR)

#: Which field keeps two series of one point apart, in the order they are named.
_INCOMPARABLE = {
    "timer": Reason.INCOMPARABLE_TIMER,
    "l2_state": Reason.INCOMPARABLE_L2_STATE,
    "execution": Reason.INCOMPARABLE_EXECUTION,
    "device_class": Reason.INCOMPARABLE_DEVICE_CLASS,
    "protocol_version": Reason.INCOMPARABLE_PROTOCOL_VERSION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is said of a run. `verdicts` are the worst first.

    `failures` are what ended in one of `INCOMPLETE_STATUSES`, of judged and other metrics, wrong
    outputs first. `missing` are points the run planned and did not store; `dropped` are titles of
    points that the run before it measured and this one did not plan. `shard`: the part of the plan
    the run measured, `2/4`; "": all of it. `alarms`: what broke with what people accepted of it
    (`alarms.alarms_of`), which then decides the exit code; None: nobody asked.
    """

    run: RunSummary
    previous: RunSummary | None
    environment: EnvironmentChange | None
    verdicts: tuple[SeriesVerdict, ...]
    failures: tuple[SeriesVerdict, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    shard: str = ""
    alarms: Alarms | None = None

    def is_known(self, verdict: SeriesVerdict) -> bool:
        """Whether somebody accepted what is said of the series, until a day."""
        return self.alarms is not None and self.alarms.is_known(verdict)

    def of(self, *verdicts: Verdict) -> tuple[SeriesVerdict, ...]:
        return tuple(v for v in self.verdicts if v.verdict in verdicts)

    def because(self, *reasons: Reason) -> tuple[SeriesVerdict, ...]:
        """The verdicts one of these reasons decided."""
        return tuple(v for v in self.verdicts if v.reasons[0] in reasons)

    def flagged_points(self) -> tuple[str, ...]:
        """Ids of the points to measure again in fresh processes: they look slower, and were not."""
        flagged = (v.series.key.point_id for v in self.verdicts if v.is_flagged)
        return tuple(dict.fromkeys(flagged))

    @property
    def incomplete(self) -> bool:
        """Something that was planned could not be measured, or gave a wrong output."""
        if self.alarms is not None:
            return self.alarms.incomplete
        return bool(self.missing or self.failures)

    @property
    def verdict(self) -> Verdict:
        """The join of all verdicts that nobody accepted: the gravest that holds."""
        found = {v.verdict for v in self.verdicts if not self.is_known(v)}
        for verdict in (Verdict.REGRESSION, Verdict.UNDECIDED, Verdict.INVALID):
            if verdict in found:
                return verdict
        return Verdict.IMPROVEMENT if Verdict.IMPROVEMENT in found else Verdict.UNCHANGED

    @property
    def exit_code(self) -> ExitCode:
        """INVALID is undecided too: something could not be compared."""
        if self.alarms is not None:
            return self.alarms.exit_code
        codes = [ExitCode.OK]
        if self.of(Verdict.REGRESSION):
            codes.append(ExitCode.REGRESSION)
        if self.of(Verdict.UNDECIDED, Verdict.INVALID):
            codes.append(ExitCode.UNDECIDED)
        if self.incomplete:
            codes.append(ExitCode.INCOMPLETE)
        return ExitCode.join(*codes)


def judge(
    history: Panel | pa.Table,
    subject_run: str | None = None,
    settings: VerdictSettings | None = None,
    *,
    planned: Collection[str] | None = None,
    published: Collection[str] = (),
    require_confirmation: bool = True,
) -> Judgement:
    """Judge the run `subject_run` (default: the newest own one) against own runs before it.

    `history` is a panel, or a table with the columns of the record and `published`, the ids of its
    published runs: they are a baseline of nothing. `planned` are the ids of the points the run set
    out to measure; those without a row are `missing`. Without `require_confirmation` a slow-down
    need not be measured twice. Raises DataError if nothing is stored or there is no such run.
    """
    settings = settings or VerdictSettings()
    panel = history if isinstance(history, Panel) else Panel.of_table(history, published)
    own = [run for run, theirs in zip(panel.runs, panel.is_published, strict=True) if not theirs]
    run = find_run(panel.runs, subject_run) if subject_run else newest_run(own or panel.runs)
    previous = _previous(panel, run, own)
    environment = environment_change(previous, run) if previous else None
    number = panel.run_number(run.run_id)
    judged = panel.with_metrics(settings.metrics)
    subjects = judged[panel.status[judged, number] != NOT_PLANNED]
    of_point: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index in judged.tolist():
        of_point[panel.keys[index][:2]].append(index)
    verdicts = []
    for verdict in _judged_in(panel, subjects, number, settings, require_confirmation):
        if verdict.reasons[0] is Reason.NO_BASELINE:
            others = of_point[verdict.series.key[:2]]
            verdict = _incomparable(panel, verdict, others, number) or verdict
        if environment and verdict.verdict in (Verdict.REGRESSION, Verdict.IMPROVEMENT):
            verdict = replace(verdict, reasons=(*verdict.reasons, Reason.ENVIRONMENT_CHANGED))
        verdicts.append(verdict)
    stored = {v.series.key.point_id for v in verdicts}
    return Judgement(
        run=run,
        previous=previous,
        environment=environment,
        verdicts=tuple(sorted(verdicts, key=_gravity)),
        failures=_failures(panel, number, settings, verdicts),
        missing=tuple(sorted(set(planned or ()) - stored)),
        dropped=_dropped(panel, judged, run, previous, stored | set(planned or ())),
    )


def _judged_in(
    panel: Panel,
    indices: NDArray[np.int64],
    number: int,
    settings: VerdictSettings,
    require_confirmation: bool = True,
) -> list[SeriesVerdict]:
    at = np.full(len(indices), number)
    return judge_panel(panel, indices, at, settings, require_confirmation)


def _failures(
    panel: Panel, number: int, settings: VerdictSettings, verdicts: Sequence[SeriesVerdict]
) -> tuple[SeriesVerdict, ...]:
    found = [v for v in verdicts if v.subject.status in INCOMPLETE_STATUSES]
    # A metric that is only shown fails the run as well: a wrong output is never only shown.
    failing = np.isin(panel.status[:, number], [GRAVITY.index(s) for s in INCOMPLETE_STATUSES])
    failing[panel.with_metrics(settings.metrics)] = False
    found += _judged_in(panel, np.flatnonzero(failing), number, settings)
    found.sort(key=lambda v: INCOMPLETE_STATUSES.index(v.subject.status))
    return tuple(found)


def _incomparable(
    panel: Panel, verdict: SeriesVerdict, of_point: Sequence[int], number: int
) -> SeriesVerdict | None:
    """INVALID if the point was measured before, but in another way that this run gave up.

    `of_point` are all series of the point and metric. Another device is not
    another way: two machines may share a results folder.
    """
    key = verdict.series.key
    for index in of_point:
        other = panel.keys[index]
        if other.device_class != key.device_class or panel.status[index, number] != NOT_PLANNED:
            continue
        if not has_comparable_runs(panel, index, verdict.subject, number):
            continue
        differing = differing_fields(other, key)
        note = ", ".join(
            f"{name} was {getattr(other, name) or 'none'} and is {getattr(key, name) or 'none'}"
            for name in differing
        )
        reasons = tuple(_INCOMPARABLE[name] for name in differing)
        return replace(verdict, verdict=Verdict.INVALID, reasons=reasons, note=note)
    return None


def differing_fields(a: SeriesKey, b: SeriesKey) -> tuple[str, ...]:
    """Fields that keep two series of one point and metric from being compared."""
    return tuple(name for name in _INCOMPARABLE if getattr(a, name) != getattr(b, name))


def _previous(panel: Panel, run: RunSummary, runs: Sequence[RunSummary]) -> RunSummary | None:
    """The run before `run` on the same device, of the same suites if there is one.

    Of these the newest that planned any of its points: the shards of a night planned none of each
    other's, and what changed since the last night changed for all of them.
    """
    mark = (run.started_at, run.run_id)
    earlier = [
        r for r in runs if (r.started_at, r.run_id) < mark and r.device_class == run.device_class
    ]
    found = [r for r in earlier if r.suites == run.suites] or earlier
    planned = panel.status[:, panel.run_number(run.run_id)] != NOT_PLANNED
    for one in reversed(found):
        if (planned & (panel.status[:, panel.run_number(one.run_id)] != NOT_PLANNED)).any():
            return one
    return found[-1] if found else None


def _dropped(
    panel: Panel,
    judged: NDArray[np.int64],
    run: RunSummary,
    previous: RunSummary | None,
    planned: Collection[str],
) -> tuple[str, ...]:
    if previous is None or previous.suites != run.suites:
        return ()
    measured = panel.status[judged, panel.run_number(previous.run_id)] != NOT_PLANNED
    return tuple(
        panel.outline(index).title
        for index in judged[measured].tolist()
        if panel.keys[index].device_class == run.device_class
        and panel.keys[index].point_id not in planned
    )


def _gravity(verdict: SeriesVerdict) -> tuple[int, float, str]:
    order = list(Verdict)
    ratio = verdict.estimate.ratio if verdict.estimate else math.inf
    if verdict.verdict is Verdict.IMPROVEMENT:
        ratio = -ratio
    return order.index(verdict.verdict), -ratio, verdict.series.title
