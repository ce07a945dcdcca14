"""The alarms of a night as the overview tells them: one cause is one entry, with its suspects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnbench.history.acknowledge import AlarmKind
from attnbench.history.alarm_lines import alarm_state
from attnbench.history.alarms import Alarm, Alarms
from attnbench.history.attribution import Attribution, attribute_since
from attnbench.history.groups import AlarmGroup, group_alarms
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Reason, Verdict
from attnbench.history.runs import RunSummary
from attnbench.history.series import GRAVITY, RunValue, Series
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.verdict import Judgement
from attnbench.history.wording import (
    interval_text,
    level_text,
    percent,
    point_text,
    repro_command,
    status_reasons,
)

#: Members of a group that are named; all series are in the searchable list.
_NAMED = 40

#: Groups whose suspects are looked up.
_ATTRIBUTED = 50

#: Groups told in the head of the page.
_LEADING = 3


def open_groups(judgement: Judgement, alarms: Alarms) -> tuple[AlarmGroup, ...]:
    """The regressions nobody has accepted, grouped; the worst group first."""
    return group_alarms(
        [
            v
            for v in judgement.verdicts
            if v.verdict is not Verdict.REGRESSION or not alarms.is_known(v)
        ]
    )


def group_entries(
    groups: Sequence[AlarmGroup],
    panel: Panel,
    clocks: Mapping[str, str],
    repository: Path | None,
) -> list[dict[str, Any]]:
    """Entries of the overview, one per group, in their order."""
    runs = {run.run_id: run for run in panel.runs}
    return [
        _group_entry(
            group, _suspects(group, panel, runs, clocks, repository) if i < _ATTRIBUTED else None
        )
        for i, group in enumerate(groups)
    ]


def leading(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that are told in the head of the page."""
    return list(entries[:_LEADING])


def entry(
    verdict: SeriesVerdict, change: str, detail: str, since: RunValue | None = None
) -> dict[str, Any]:
    """The entry of one series."""
    since = since or verdict.since
    return {
        "id": verdict.series.id,
        "point": point_text(verdict),
        "tally": "",
        "change": change,
        "worst": "",
        "detail": detail,
        "since": level_text(since) if since else "",
        "since_at": f"{since.started_at:%Y-%m-%d}" if since else "",
        "suspects": "",
        "again": repro_command(verdict.series.identity),
        "bisect": "",
        "members": [],
        "unnamed": 0,
    }


def timed_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    """Of one that got slower or faster."""
    assert verdict.estimate is not None
    detail = ", ".join(str(reason).replace("_", " ") for reason in verdict.reasons)
    return entry(verdict, interval_text(verdict.estimate), detail)


def status_entry(verdict: SeriesVerdict) -> dict[str, Any]:
    """Of one whose status changed or is bad."""
    return entry(verdict, _status_change(verdict), "; ".join(status_reasons(verdict.subject)))


def absent_entries(alarms: Alarms, run_of: Mapping[str, RunSummary]) -> list[dict[str, Any]]:
    """Points that were planned and have no row, and those that fell silent; unacknowledged ones."""
    rows = []
    for alarm in alarms.of(AlarmKind.MISSING, AlarmKind.STALE):
        last = run_of.get(alarm.last_run)
        rows.append(
            {
                "id": alarm.fields["series"],
                "point": alarm.title,
                "state": alarm_state(alarm),
                "last": f"{last.started_at:%Y-%m-%d}" if last else "",
                "advice": "attnbench nightly --resume last"
                if alarm.kind is AlarmKind.MISSING
                else "attnbench backends",
            }
        )
    return rows


def known_entries(alarms: Alarms) -> list[dict[str, Any]]:
    """What somebody accepted, and until when."""
    return [_known_entry(alarm) for alarm in alarms.known]


def refused_entries(alarms: Alarms) -> list[dict[str, str]]:
    """What was accepted once, and why it is not any more."""
    rows = []
    for alarm in alarms.refused:
        accepted, why_not = alarm.refused[0]
        rows.append(
            {
                "id": alarm.fields["series"],
                "point": alarm.title,
                "why": why_not,
                "by": accepted.by,
                "place": accepted.place,
            }
        )
    return rows


def _known_entry(alarm: Alarm) -> dict[str, Any]:
    accepted = alarm.entry
    assert accepted is not None
    is_slower = alarm.kind is AlarmKind.SLOWER
    return {
        "id": alarm.fields["series"],
        "point": alarm.title,
        "state": alarm_state(alarm),
        "limit": f"up to {percent(accepted.up_to)}" if is_slower else "",
        "since": accepted.since,
        "by": accepted.by,
        "expires": accepted.expires.isoformat(),
        "reason": accepted.reason,
    }


def _group_entry(group: AlarmGroup, suspects: Attribution | None) -> dict[str, Any]:
    worst = group.worst
    made = status_entry(worst) if group.is_support_change else timed_entry(worst)
    if suspects is not None:
        made["suspects"] = suspects.text
        made["bisect"] = suspects.bisect
    if len(group.members) > 1:
        since = group.since
        made["point"] = group.title
        made["tally"] = f"{len(group.members)} of {group.judged} points"
        if group.ratio is not None:
            made["worst"] = f"worst {made['change']}"
            made["change"] = f"{percent(group.ratio)} median"
        if since is not None:
            made["since"] = level_text(since)
            made["since_at"] = f"{since.started_at:%Y-%m-%d}"
        made["members"] = [
            {"id": v.series.id, "point": point_text(v), "change": _change(v)}
            for v in group.members[:_NAMED]
        ]
        made["unnamed"] = max(0, len(group.members) - _NAMED)
    return made


def _change(verdict: SeriesVerdict) -> str:
    if verdict.is_support_change or verdict.estimate is None:
        return _status_change(verdict)
    return interval_text(verdict.estimate)


def _status_change(verdict: SeriesVerdict) -> str:
    before, now = verdict.status_before, verdict.subject.status
    return f"{before} → {now}" if before and before is not now else str(now)


def is_slower(group: AlarmGroup) -> bool:
    return group.worst.reasons[0] is not Reason.STATUS_CHANGED


def _suspects(
    group: AlarmGroup,
    panel: Panel,
    runs: Mapping[str, RunSummary],
    clocks: Mapping[str, str],
    repository: Path | None,
) -> Attribution | None:
    verdict = group.worst
    series = outline_of(panel, panel.index_of(verdict.series.key))
    begin = verdict.since or group.since or verdict.subject
    since = series.at(begin.run_id)
    if since is None:
        return None
    return attribute_since(series, since, runs, repository, clocks)


def outline_of(panel: Panel, index: int) -> Series:
    """The series with as much of its values as the arrays have: no file is read for it."""
    seconds = np.exp(panel.log_s[index]).tolist()
    values = [
        RunValue(
            run_id=run.run_id,
            started_at=run.started_at,
            status=GRAVITY[panel.status[index, number]],
            replicates=() if math.isnan(seconds[number]) else (seconds[number],),
            commit=run.commit,
            stack_id=run.stack_id,
            is_published=bool(panel.is_published[number]),
        )
        for number, run in enumerate(panel.runs)
        if panel.status[index, number] != NOT_PLANNED
    ]
    whole = panel.outline(index)
    return Series(key=whole.key, identity=whole.identity, values=tuple(values))
