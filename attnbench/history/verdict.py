"""The judge: the newest run of each series against earlier runs of the same series.

The rule is in `rule.py` and docs/verdict.md. Nothing here compares two series.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import ExitCode
from attnbench.history.rule import (
    Estimate,
    Reason,
    TimerNoise,
    Verdict,
    VerdictSettings,
    decide,
    estimate,
)
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
from attnbench.store.record import Status

#: The columns of the record that judging and comparing read: `folder.table(NEEDED_COLUMNS)`.
NEEDED_COLUMNS = tuple(dict.fromkeys((*SERIES_COLUMNS, *RUN_COLUMNS)))

#: Statuses of a point that ran and was right.
_WORKS = frozenset({Status.OK, Status.NOISY, Status.UNTIMED})

#: Statuses that mean the run did not do what was planned, worst first.
INCOMPLETE_STATUSES = (Status.INCORRECT, Status.CRASH, Status.OOM, Status.TIMEOUT, Status.ERROR)

#: What ends the commit of a run whose tree had local edits (`measure.environment` writes it).
_DIRTY = "+dirty"

#: Which field keeps two series of one point apart, in the order they are named.
_INCOMPARABLE = {
    "timer": Reason.INCOMPARABLE_TIMER,
    "l2_state": Reason.INCOMPARABLE_L2_STATE,
    "execution": Reason.INCOMPARABLE_EXECUTION,
    "device_class": Reason.INCOMPARABLE_DEVICE_CLASS,
    "protocol_version": Reason.INCOMPARABLE_PROTOCOL_VERSION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesVerdict:
    """What is said of one series in one run. `reasons[0]` decided it."""

    series: Series
    subject: RunValue
    verdict: Verdict
    reasons: tuple[Reason, ...]
    estimate: Estimate | None = None
    baseline_runs: int = 0
    status_before: Status | None = None
    since: RunValue | None = None
    note: str = ""
    is_flagged: bool = False  # looks slower and was not measured again

    @property
    def is_support_change(self) -> bool:
        return self.reasons[0] in (Reason.STATUS_CHANGED, Reason.STATUS_RECOVERED)


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
    require_confirmation: bool = True,
) -> Judgement:
    """Judge the run `subject_run` (default: the newest) against the runs before it.

    `table` has the columns of the record. `planned` are the ids of the points the run set out to
    measure; those without a row are `missing`. Without `require_confirmation` a slow-down need not
    be measured twice. Raises DataError if nothing is stored or there is no such run.
    """
    settings = settings or VerdictSettings()
    runs = runs_of(table)
    run = find_run(runs, subject_run) if subject_run else newest_run(runs)
    previous = _previous(run, runs)
    environment = environment_change(previous, run) if previous else None
    every = series_of(table, settings.metrics)
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
        failures=_failures(table, run, settings, verdicts),
        missing=tuple(sorted(set(planned or ()) - stored)),
        dropped=_dropped(every, run, previous, stored | set(planned or ())),
    )


def judge_series(
    series: Series,
    subject: RunValue,
    settings: VerdictSettings,
    require_confirmation: bool = True,
) -> SeriesVerdict:
    """Judge one value of a series against the runs before it."""
    earlier = _comparable_runs(series, subject)
    base = SeriesVerdict(
        series=series, subject=subject, verdict=Verdict.UNCHANGED, reasons=(Reason.NO_BASELINE,)
    )
    if subject.status is Status.THROTTLED:
        note = "the device throttled; cool it or lock its clocks, then measure again"
        return replace(base, verdict=Verdict.INVALID, reasons=(Reason.THROTTLED,), note=note)
    known = [v for v in earlier if v.status is not Status.THROTTLED][-settings.window :]
    if not known:
        return base
    if changed := _judge_status(base, known):
        return changed
    baseline = [v for v in earlier if v.is_timed][-settings.window :]
    return _judge_time(base, baseline, settings, require_confirmation)


def _comparable_runs(series: Series, subject: RunValue) -> list[RunValue]:
    """Earlier runs `subject` may be judged by, oldest first.

    A tree with local edits is nobody's level but its own: a clean commit is not judged by it.
    """
    earlier = series.before(subject)
    if subject.commit.endswith(_DIRTY):
        return list(earlier)
    return [value for value in earlier if not value.commit.endswith(_DIRTY)]


def _failures(
    table: pa.Table,
    run: RunSummary,
    settings: VerdictSettings,
    verdicts: Sequence[SeriesVerdict],
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
        for series, value in _subjects(series_of(rows), run)
        if value.status in INCOMPLETE_STATUSES
    ]
    found.sort(key=lambda v: INCOMPLETE_STATUSES.index(v.subject.status))
    return tuple(found)


def _judge_status(base: SeriesVerdict, known: Sequence[RunValue]) -> SeriesVerdict | None:
    """A verdict from statuses alone, None if they say nothing."""
    now = base.subject.status
    before = _usual_status(known)
    since = _first_of_level(
        base.subject, known, lambda v: is_supported(v.status) == is_supported(now)
    )
    changed = replace(base, status_before=before, since=since, baseline_runs=len(known))
    if is_supported(now) and not is_supported(before):
        return replace(changed, verdict=Verdict.IMPROVEMENT, reasons=(Reason.STATUS_RECOVERED,))
    # A wrong output is never "still unsupported": a refusal that became one is a loss too.
    newly_wrong = now is Status.INCORRECT and before is not Status.INCORRECT
    if newly_wrong or (is_supported(before) and not is_supported(now)):
        if not newly_wrong and any(is_supported(status) for status in base.subject.statuses):
            note = "some processes of this run succeeded and others did not; measure it again"
            return replace(
                changed, verdict=Verdict.UNDECIDED, reasons=(Reason.STATUS_UNSTABLE,), note=note
            )
        return replace(changed, verdict=Verdict.REGRESSION, reasons=(Reason.STATUS_CHANGED,))
    if now.is_timed:
        return None
    note = f"{before} before, {now} now" if now is not before else ""
    return replace(base, reasons=(Reason.STATUS_SAME,), status_before=before, note=note)


def is_supported(status: Status) -> bool:
    return status in _WORKS


def _usual_status(known: Sequence[RunValue]) -> Status:
    """The status of most of the window, the newest of equals: what a median is for numbers."""
    counts = Counter(is_supported(v.status) for v in known)
    newest = is_supported(known[-1].status)
    usual = newest if counts[newest] * 2 >= len(known) else not newest
    return next(v.status for v in reversed(known) if is_supported(v.status) == usual)


def _judge_time(
    base: SeriesVerdict,
    baseline: Sequence[RunValue],
    settings: VerdictSettings,
    require_confirmation: bool,
) -> SeriesVerdict:
    if not baseline:
        return base
    subject = base.subject
    noise = settings.noise(base.series.key.timer)
    groups = [v.replicates for v in baseline]
    found = estimate(groups, subject.replicates, noise, settings.confidence)
    verdict, reason = decide(found, noise)
    result = replace(
        base,
        verdict=verdict,
        reasons=(reason,),
        estimate=found,
        baseline_runs=len(baseline),
        status_before=baseline[-1].status,
    )
    if verdict in (Verdict.REGRESSION, Verdict.IMPROVEMENT):
        result = replace(result, since=_since(subject, baseline, found))
    suspicious = reason is Reason.INTERVAL_TOO_WIDE and found.ratio > noise.limit
    if not require_confirmation or not (verdict is Verdict.REGRESSION or suspicious):
        return result
    if not subject.confirmations:
        if verdict is Verdict.REGRESSION:
            reasons = (Reason.NOT_CONFIRMED_YET, reason)
            return replace(result, verdict=Verdict.UNDECIDED, reasons=reasons, is_flagged=True)
        return replace(result, is_flagged=True)
    again = estimate(groups, subject.confirmations, noise, settings.confidence)
    return _confirmed(result, again, noise)


def _confirmed(flagged: SeriesVerdict, again: Estimate, noise: TimerNoise) -> SeriesVerdict:
    """`flagged` after fresh processes were judged alone: `again` is free of why it was chosen."""
    verdict, reason = decide(again, noise)
    if flagged.verdict is Verdict.REGRESSION and verdict is Verdict.REGRESSION:
        return replace(flagged, reasons=(Reason.CONFIRMED, *flagged.reasons), estimate=again)
    if flagged.verdict is Verdict.REGRESSION:
        reasons = (Reason.NOT_CONFIRMED, reason)
        return replace(
            flagged, verdict=Verdict.UNDECIDED, reasons=reasons, estimate=again, since=None
        )
    # It was only a suspicion: a second look within the floor ends it.
    if again.ratio <= noise.limit:
        reasons = (Reason.WITHIN_NOISE, Reason.NOT_CONFIRMED)
        return replace(flagged, verdict=Verdict.UNCHANGED, reasons=reasons, estimate=again)
    return replace(flagged, reasons=(Reason.INTERVAL_TOO_WIDE,), estimate=again)


def _since(subject: RunValue, baseline: Sequence[RunValue], found: Estimate) -> RunValue:
    """The first run of the level the subject is on: nearer to it than to the baseline."""
    assert subject.median_s is not None
    level = math.log(subject.median_s)
    old = level - math.log(found.ratio)

    def is_near(value: RunValue) -> bool:
        own = math.log(statistics.median(value.replicates))
        return abs(own - level) < abs(own - old)

    return _first_of_level(subject, baseline, is_near)


def _first_of_level(
    subject: RunValue, earlier: Sequence[RunValue], same: Callable[[RunValue], bool]
) -> RunValue:
    first = subject
    for value in reversed(earlier):
        if not same(value):
            break
        first = value
    return first


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
        if not _comparable_runs(other, verdict.subject):
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
