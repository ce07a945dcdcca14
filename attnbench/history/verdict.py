"""The judge of a run: every series it measured against that series' runs before it.

One series is judged in `series_verdict.py`; here their verdicts become one, with what is missing,
what failed, and which software changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import ExitCode
from attnbench.history.rule import Reason, Verdict, VerdictSettings
from attnbench.history.runs import (
    RUN_COLUMNS,
    EnvironmentChange,
    RunSummary,
    environment_change,
    find_run,
    newest_run,
    runs_of,
)
from attnbench.history.series import SERIES_COLUMNS, RunValue, Series, series_of
from attnbench.history.series_verdict import SeriesVerdict, comparable_runs, judge_series
from attnbench.store.record import Status

#: The columns of the record that judging and comparing read: `folder.table(NEEDED_COLUMNS)`.
NEEDED_COLUMNS = tuple(dict.fromkeys((*SERIES_COLUMNS, *RUN_COLUMNS)))

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
    the run measured, `2/4`; "": all of it.
    """

    run: RunSummary
    previous: RunSummary | None
    environment: EnvironmentChange | None
    verdicts: tuple[SeriesVerdict, ...]
    failures: tuple[SeriesVerdict, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    shard: str = ""

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
        return bool(self.missing or self.failures)

    @property
    def verdict(self) -> Verdict:
        """The join of all verdicts: the gravest that holds."""
        found = {v.verdict for v in self.verdicts}
        for verdict in (Verdict.REGRESSION, Verdict.UNDECIDED, Verdict.INVALID):
            if verdict in found:
                return verdict
        return Verdict.IMPROVEMENT if Verdict.IMPROVEMENT in found else Verdict.UNCHANGED

    @property
    def exit_code(self) -> ExitCode:
        """INVALID is undecided too: something could not be compared."""
        codes = [ExitCode.OK]
        if self.of(Verdict.REGRESSION):
            codes.append(ExitCode.REGRESSION)
        if self.of(Verdict.UNDECIDED, Verdict.INVALID):
            codes.append(ExitCode.UNDECIDED)
        if self.incomplete:
            codes.append(ExitCode.INCOMPLETE)
        return ExitCode.join(*codes)


def judge(
    table: pa.Table,
    subject_run: str | None = None,
    settings: VerdictSettings | None = None,
    *,
    planned: Collection[str] | None = None,
    published: Collection[str] = (),
    require_confirmation: bool = True,
) -> Judgement:
    """Judge the run `subject_run` (default: the newest own one) against own runs before it.

    `table` has the columns of the record. `planned` are the ids of the points the run set out to
    measure; those without a row are `missing`. `published` are ids of published runs
    (`ResultsFolder.published_runs`): they are a baseline of nothing. Without `require_confirmation`
    a slow-down need not be measured twice. Raises DataError if nothing is stored or there is no
    such run.
    """
    settings = settings or VerdictSettings()
    runs = runs_of(table)
    own = [run for run in runs if run.run_id not in published]
    run = find_run(runs, subject_run) if subject_run else newest_run(own or runs)
    previous = _previous(run, own)
    environment = environment_change(previous, run) if previous else None
    every = series_of(table, settings.metrics, published)
    of_point: dict[tuple[object, ...], list[Series]] = defaultdict(list)
    for series in every:
        of_point[series.key[:2]].append(series)
    verdicts = []
    for series, subject in _subjects(every, run):
        verdict = judge_series(series, subject, settings, require_confirmation)
        if verdict.reasons[0] is Reason.NO_BASELINE:
            verdict = _incomparable(verdict, of_point[series.key[:2]], run) or verdict
        if environment and verdict.verdict in (Verdict.REGRESSION, Verdict.IMPROVEMENT):
            verdict = replace(verdict, reasons=(*verdict.reasons, Reason.ENVIRONMENT_CHANGED))
        verdicts.append(verdict)
    stored = {v.series.key.point_id for v in verdicts}
    return Judgement(
        run=run,
        previous=previous,
        environment=environment,
        verdicts=tuple(sorted(verdicts, key=_gravity)),
        failures=_failures(table, run, settings, verdicts, published),
        missing=tuple(sorted(set(planned or ()) - stored)),
        dropped=_dropped(every, run, previous, stored | set(planned or ())),
    )


def _failures(
    table: pa.Table,
    run: RunSummary,
    settings: VerdictSettings,
    verdicts: Sequence[SeriesVerdict],
    published: Collection[str],
) -> tuple[SeriesVerdict, ...]:
    found = [v for v in verdicts if v.subject.status in INCOMPLETE_STATUSES]
    # A metric that is only shown fails the run as well: a wrong output is never only shown.
    own = pc.equal(table["run_id"], run.run_id)
    failing = pc.is_in(table["status"], pa.array([str(s) for s in INCOMPLETE_STATUSES]))
    others = pc.invert(pc.is_in(table["metric"], pa.array(list(settings.metrics), pa.string())))
    points = table.filter(pc.and_(pc.and_(own, failing), others))["point_id"].combine_chunks()
    rows = table.filter(pc.and_(others, pc.is_in(table["point_id"], points)))
    found += [
        judge_series(series, value, settings)
        for series, value in _subjects(series_of(rows, published=published), run)
        if value.status in INCOMPLETE_STATUSES
    ]
    found.sort(key=lambda v: INCOMPLETE_STATUSES.index(v.subject.status))
    return tuple(found)


def _subjects(every: Sequence[Series], run: RunSummary) -> list[tuple[Series, RunValue]]:
    return [(series, value) for series in every if (value := series.at(run.run_id)) is not None]


def _incomparable(
    verdict: SeriesVerdict, of_point: Sequence[Series], run: RunSummary
) -> SeriesVerdict | None:
    """INVALID if the point was measured before, but in another way that this run gave up.

    `of_point` are all series of the point and metric. Another device is not
    another way: two machines may share a results folder.
    """
    key = verdict.series.key
    for other in of_point:
        if other.key.device_class != key.device_class or other.at(run.run_id) is not None:
            continue
        if not comparable_runs(other, verdict.subject):
            continue
        differing = differing_fields(other, verdict.series)
        note = ", ".join(
            f"{name} was {getattr(other.key, name) or 'none'} and is {getattr(key, name) or 'none'}"
            for name in differing
        )
        reasons = tuple(_INCOMPARABLE[name] for name in differing)
        return replace(verdict, verdict=Verdict.INVALID, reasons=reasons, note=note)
    return None


def differing_fields(a: Series, b: Series) -> tuple[str, ...]:
    """Fields that keep two series of one point and metric from being compared."""
    return tuple(name for name in _INCOMPARABLE if getattr(a.key, name) != getattr(b.key, name))


def _previous(run: RunSummary, runs: Sequence[RunSummary]) -> RunSummary | None:
    """The run before `run` on the same device, of the same suites if there is one."""
    mark = (run.started_at, run.run_id)
    earlier = [
        r for r in runs if (r.started_at, r.run_id) < mark and r.device_class == run.device_class
    ]
    alike = [r for r in earlier if r.suites == run.suites]
    found = alike or earlier
    return found[-1] if found else None


def _dropped(
    every: Sequence[Series],
    run: RunSummary,
    previous: RunSummary | None,
    planned: Collection[str],
) -> tuple[str, ...]:
    if previous is None or previous.suites != run.suites:
        return ()
    return tuple(
        series.title
        for series in every
        if series.key.device_class == run.device_class
        and series.key.point_id not in planned
        and series.at(previous.run_id) is not None
    )


def _gravity(verdict: SeriesVerdict) -> tuple[int, float, str]:
    order = list(Verdict)
    ratio = verdict.estimate.ratio if verdict.estimate else math.inf
    if verdict.verdict is Verdict.IMPROVEMENT:
        ratio = -ratio
    return order.index(verdict.verdict), -ratio, verdict.series.title
