"""The judge of one series: its value in one run against its own runs before that.

The rule is in `rule.py` and docs/verdict.md. Nothing here compares two series.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from attnbench.history.confirm import LARGEST_P_UNPICKED, SecondLook
from attnbench.history.gate import LEVEL_RUNS
from attnbench.history.looks import (
    FirstLook,
    alarm_limit,
    first_looks,
    is_beside,
    is_candidate,
    look_again,
)
from attnbench.history.rule import (
    Estimate,
    Reason,
    TimerNoise,
    Verdict,
    VerdictSettings,
    decide,
    estimate,
    estimate_again,
)
from attnbench.history.series import DIRTY, RunValue, Series
from attnbench.store.record import Status

#: Statuses of a point that ran and was right.
_WORKS = frozenset({Status.OK, Status.NOISY, Status.UNTIMED})


_NOT_BESIDE = "the build before did not time it; held against the runs before instead"


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


@dataclass(frozen=True, slots=True)
class Night:
    """What one series' verdict needs of the night it belongs to.

    `first` is the first look, which picks over all series together; `alarm_limit` the largest p of
    a second look that is an alarm, which depends on how much was picked. `has_reference`: the build
    before can be, or was, measured beside the new one that night.
    """

    first: FirstLook | None
    alarm_limit: float
    has_reference: bool


def judge_night(
    pairs: Sequence[tuple[Series, RunValue]],
    settings: VerdictSettings,
    require_confirmation: bool = True,
) -> list[SeriesVerdict]:
    """Judge one value of each series against the runs before it, all of a night together.

    A night that timed the build before in any of the series had it at hand for all of them.
    """
    beside = {v.run_id for series, _ in pairs for v in series.values if v.references}
    timed = [timed_runs(series, subject) for series, subject in pairs]
    timers = [series.key.timer for series, _ in pairs]
    firsts = first_looks(
        [runs if s.is_timed else [] for (_, s), runs in zip(pairs, timed, strict=True)],
        timers,
        settings,
    )
    looks = [
        (first, look_of_night(first, subject, runs, settings))
        for (_, subject), runs, first in zip(pairs, timed, firsts, strict=True)
        if is_candidate(first, subject, settings.has_reference or subject.run_id in beside)
    ]
    limit = alarm_limit(looks)
    return [
        judge_series(
            series,
            subject,
            settings,
            Night(first, limit, settings.has_reference or subject.run_id in beside),
            require_confirmation,
        )
        for (series, subject), first in zip(pairs, firsts, strict=True)
    ]


def look_of_night(
    first: FirstLook | None,
    subject: RunValue,
    timed: Sequence[RunValue],
    settings: VerdictSettings,
) -> SecondLook | None:
    """The second look that counts among the night's; `timed` is of `timed_runs`.

    A series of one or two earlier runs has one only beside the build before: else its processes
    are compared, and share the run with the first look.
    """
    if not subject.is_timed or len(timed) < 2 or not (first or is_beside(subject)):
        return None
    return look_again(subject, timed[:-1][-LEVEL_RUNS:], settings)


def timed_runs(series: Series, subject: RunValue) -> list[RunValue]:
    """The runs with a time that `subject` may be judged by, oldest first, and `subject` last."""
    return [*(v for v in comparable_runs(series, subject) if v.is_timed), subject]


def judge_series(
    series: Series,
    subject: RunValue,
    settings: VerdictSettings,
    night: Night,
    require_confirmation: bool = True,
) -> SeriesVerdict:
    """Judge one value of a series, given the look at its night."""
    earlier = comparable_runs(series, subject)
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
    return _judge_time(base, baseline, settings, night, require_confirmation)


def comparable_runs(series: Series, subject: RunValue) -> list[RunValue]:
    """Earlier runs `subject` may be judged by, oldest first.

    A published run may be a stranger's: of the same device class, and of another machine with
    other clocks, cooling and neighbours. It is shown beside one's own and judges none.
    A tree with local edits is nobody's level but its own: a clean commit is not judged by it.
    """
    earlier = [value for value in series.before(subject) if not value.is_published]
    if subject.commit.endswith(DIRTY):
        return earlier
    return [value for value in earlier if not value.commit.endswith(DIRTY)]


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
    night: Night,
    require_confirmation: bool,
) -> SeriesVerdict:
    if not baseline:
        return base
    subject = base.subject
    noise = settings.noise(base.series.key.timer)
    found, verdict, reason = _first_verdict(subject, baseline, noise, settings, night)
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
    # Picked, and the build before did not time it then: too much of a change to say "noise" of.
    is_picked = night.first is not None and night.first.is_picked and bool(subject.confirmations)
    suspicious = is_picked or (reason is Reason.INTERVAL_TOO_WIDE and found.ratio > noise.limit)
    if not require_confirmation or not (verdict is Verdict.REGRESSION or suspicious):
        return result
    if not subject.confirmations:
        if verdict is Verdict.REGRESSION:
            reasons = (Reason.NOT_CONFIRMED_YET, reason)
            return replace(result, verdict=Verdict.UNDECIDED, reasons=reasons, is_flagged=True)
        return replace(result, is_flagged=True)
    if night.has_reference and not is_beside(subject):
        result = replace(result, note=_NOT_BESIDE)
    if night.first is None and not is_beside(subject):
        groups = [v.replicates for v in baseline]
        again = estimate_again(groups, subject.confirmations, noise, settings.confidence)
        return _confirmed(result, again, decide(again, noise)[0], noise, baseline)
    second = look_again(subject, baseline, settings)
    assert second is not None
    is_open = second.is_open(noise)
    then = Verdict.UNDECIDED if is_open else Verdict.UNCHANGED
    if verdict is not Verdict.REGRESSION and is_beside(subject):
        # Not picked, for the series' own past is too restless to tell, or has a step in it; but
        # the build before had the same night.
        if second.is_slower(noise, LARGEST_P_UNPICKED):
            result, then = replace(result, verdict=Verdict.REGRESSION), Verdict.REGRESSION
    elif second.is_slower(noise, night.alarm_limit):
        then = Verdict.REGRESSION
    return _confirmed(result, second.estimate, then, noise, baseline)


def _first_verdict(
    subject: RunValue,
    baseline: Sequence[RunValue],
    noise: TimerNoise,
    settings: VerdictSettings,
    night: Night,
) -> tuple[Estimate, Verdict, Reason]:
    """What the first look says: of the night where there is a level, else of the replicates."""
    if night.first is None:
        groups = [v.replicates for v in baseline]
        found = estimate(groups, subject.replicates, noise, settings.confidence)
        return found, *decide(found, noise)
    # What was measured again says itself how: so that a night judged later is judged alike.
    beside = is_beside(subject) if subject.confirmations else night.has_reference
    return night.first.estimate, *first_verdict(night.first, noise, beside)


def first_verdict(first: FirstLook, noise: TimerNoise, beside: bool) -> tuple[Verdict, Reason]:
    """What the first look alone says; `beside`: the build before is measured beside the new."""
    verdict, reason = decide(first.estimate, noise)
    if first.is_sure or (first.is_picked and beside):
        return Verdict.REGRESSION, Reason.SLOWER_THAN_FLOOR
    # One series alone would be called changed; among so many series of a night it is chance.
    if verdict is Verdict.REGRESSION or (verdict is Verdict.IMPROVEMENT and not first.is_faster):
        return Verdict.UNCHANGED, Reason.WITHIN_NOISE
    # A step that everybody knows of is among the past changes for weeks: the level is calm again.
    if reason is Reason.INTERVAL_TOO_WIDE and 1 / noise.limit <= first.estimate.ratio:
        is_calm = first.calm_high <= noise.blind_spot(first.estimate.ratio)
        if is_calm and first.estimate.ratio <= noise.limit:
            return Verdict.UNCHANGED, Reason.WITHIN_FLOOR
    return verdict, reason


def _confirmed(
    flagged: SeriesVerdict,
    again: Estimate,
    verdict: Verdict,
    noise: TimerNoise,
    baseline: Sequence[RunValue],
) -> SeriesVerdict:
    """`flagged` after fresh processes were judged alone: `again` is free of why it was chosen."""
    if flagged.verdict is Verdict.REGRESSION and verdict is Verdict.REGRESSION:
        # Some nights after a step the level is the new one: only `again` knows of the old.
        since = _since(flagged.subject, baseline, again)
        reasons = (Reason.CONFIRMED, *flagged.reasons)
        return replace(flagged, reasons=reasons, estimate=again, since=since)
    result = replace(flagged, estimate=again, since=None)
    if verdict in (Verdict.UNCHANGED, Verdict.IMPROVEMENT) or again.ratio <= noise.limit:
        reasons = (Reason.NOT_CONFIRMED, Reason.WITHIN_NOISE)
        return replace(result, verdict=Verdict.UNCHANGED, reasons=reasons)
    reasons = (Reason.NOT_CONFIRMED, Reason.INTERVAL_TOO_WIDE)
    return replace(result, verdict=Verdict.UNDECIDED, reasons=reasons)


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
