"""The alarms of a run: what broke, and which of it people already know of and accept.

`alarms_of` takes a judgement, the panel it was made on and the entries of the acknowledgements
file. An alarm that an entry covers does not decide the exit code; it is shown, with who accepted
it and until when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from attnbench.errors import ExitCode
from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.gate import LEVEL_RUNS
from attnbench.history.night import comparable
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Reason, Verdict
from attnbench.history.stale import STALE_NIGHTS, stale_points
from attnbench.store.record import Status

if TYPE_CHECKING:
    from attnbench.history.series import SeriesKey
    from attnbench.history.series_verdict import SeriesVerdict
    from attnbench.history.verdict import Judgement

_WORKS = (Status.OK, Status.NOISY, Status.UNTIMED)

_CODES = {
    Verdict.REGRESSION: ExitCode.REGRESSION,
    Verdict.UNDECIDED: ExitCode.UNDECIDED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One thing that is not as it should be.

    Attributes:
        fields: what entries are matched with, see `point_fields`.
        exit_code: what it makes of a run where nobody has acknowledged it.
        is_incomplete: the run did not do what it set out to do.
        verdict: that of the series; None for what has no value in this run.
        ratio: of kind `slower` the larger of tonight's ratio and that to the level before the
            acknowledged one.
        entry: what accepts it; None: nothing does.
        refused: entries about it that do not accept it (any more), each with why not.
        nights: of kind `stale`, how many nights it was not measured.
        last_run: of kind `stale`, the run it was measured in last.
        run_id: the run this is an alarm of.
    """

    kind: AlarmKind
    fields: Mapping[str, str]
    exit_code: ExitCode
    is_incomplete: bool = False
    verdict: SeriesVerdict | None = None
    ratio: float | None = None
    entry: Acknowledgement | None = None
    refused: tuple[tuple[Acknowledgement, str], ...] = ()
    nights: int = 0
    last_run: str = ""
    run_id: str = ""

    @property
    def title(self) -> str:
        return self.fields["title"]


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """All alarms of a run. `warnings` are about entries, one line each."""

    alarms: tuple[Alarm, ...] = ()
    warnings: tuple[str, ...] = ()
    has_invalid: bool = False

    def of(self, *kinds: AlarmKind) -> tuple[Alarm, ...]:
        """The open ones of these kinds."""
        return tuple(a for a in self.alarms if a.entry is None and a.kind in kinds)

    @cached_property
    def known(self) -> tuple[Alarm, ...]:
        """Those that somebody accepted."""
        return tuple(a for a in self.alarms if a.entry is not None)

    @cached_property
    def refused(self) -> tuple[Alarm, ...]:
        """Open ones that were accepted once: expired, or worse than was accepted."""
        return tuple(a for a in self.alarms if a.entry is None and a.refused)

    @cached_property
    def _known_keys(self) -> frozenset[SeriesKey]:
        return frozenset(a.verdict.series.key for a in self.known if a.verdict is not None)

    def is_known(self, verdict: SeriesVerdict) -> bool:
        """Whether somebody accepted what is said of the series."""
        return verdict.series.key in self._known_keys

    @property
    def incomplete(self) -> bool:
        """Something planned has no row or failed, or is not measured any more."""
        kinds = self.of(AlarmKind.MISSING, AlarmKind.STALE, AlarmKind.STATUS)
        return any(alarm.is_incomplete for alarm in kinds)

    @property
    def exit_code(self) -> ExitCode:
        """Of what is open; what could not be compared is undecided."""
        codes = {a.exit_code for a in self.alarms if a.entry is None}
        if self.incomplete:
            codes.add(ExitCode.INCOMPLETE)
        if self.has_invalid:
            codes.add(ExitCode.UNDECIDED)
        return ExitCode.join(*codes)


def alarms_of(
    judgement: Judgement,
    panel: Panel,
    entries: Sequence[Acknowledgement] = (),
    *,
    stale_nights: int = STALE_NIGHTS,
    points: Mapping[str, Mapping[str, str]] | None = None,
) -> Alarms:
    """The alarms of the run `judgement` is of, each with the entry that accepts it.

    `panel` is what was judged. `points` describes planned points that may never have been stored:
    id -> workload, backend and variant; without it such a point can be acknowledged by its id only.
    """
    found = _from_verdicts(judgement)
    metrics = {v.series.key.metric for v in judgement.verdicts}
    number = panel.run_number(judgement.run.run_id)
    found += _missing(judgement, panel, points or {})
    found += _stale(panel, number, metrics, stale_nights, {a.fields["point"] for a in found})
    return _acknowledged(found, judgement, panel, number, entries)


def point_fields(
    identity: Mapping[str, Any], key: SeriesKey, title: str, series_id: str = ""
) -> dict[str, str]:
    """What patterns of an entry are held against: `acknowledge.PATTERNS`, `point` and `title`."""
    return {
        "series": series_id or key.id,
        "point": key.point_id,
        "title": title,
        "backend": str(identity["backend"]),
        "variant": str(identity["variant"] or ""),
        "phase": str(identity["phase"]),
        "workload": str(identity["workload"]),
        "shape": str(identity["shape"] or ""),
        "device": key.device_class,
        "metric": key.metric,
    }


def _fields_of(panel: Panel, index: int) -> dict[str, str]:
    outline = panel.outline(index)
    return point_fields(outline.identity, outline.key, outline.title, panel.ids[index])


def _from_verdicts(judgement: Judgement) -> list[Alarm]:
    failing = {v.series.key for v in judgement.failures}
    found = []
    seen = set()
    for verdict in (*judgement.verdicts, *judgement.failures):
        key = verdict.series.key
        if key in seen:
            continue
        seen.add(key)
        code = _CODES.get(verdict.verdict, ExitCode.OK)
        if key in failing and code is not ExitCode.REGRESSION:
            code = ExitCode.INCOMPLETE
        if code is ExitCode.OK:
            continue
        status_reasons = (Reason.STATUS_CHANGED, Reason.STATUS_UNSTABLE)
        is_status = key in failing or verdict.reasons[0] in status_reasons
        found.append(
            Alarm(
                kind=AlarmKind.STATUS if is_status else AlarmKind.SLOWER,
                fields=point_fields(verdict.series.identity, key, verdict.series.title),
                exit_code=code,
                is_incomplete=key in failing,
                verdict=verdict,
                ratio=verdict.estimate.ratio if verdict.estimate and not is_status else None,
            )
        )
    return found


def _missing(
    judgement: Judgement, panel: Panel, points: Mapping[str, Mapping[str, str]]
) -> list[Alarm]:
    if not judgement.missing:
        return []
    wanted = set(judgement.missing)
    known: dict[str, dict[str, str]] = {}
    device = judgement.run.device_class
    for index, key in enumerate(panel.keys):
        if key.point_id in wanted and (key.device_class == device or key.point_id not in known):
            known[key.point_id] = {**_fields_of(panel, index), "device": device}
    alarms = []
    for point in judgement.missing:
        planned = points.get(point, {})
        name = planned.get("backend", "")
        if planned.get("variant"):
            name += f"[{planned['variant']}]"
        blank = dict.fromkeys(("series", "phase", "shape", "metric"), "")
        described = {
            **blank,
            "point": point,
            "title": f"{name} {planned['workload']}" if planned else f"point {point}",
            "device": device,
            **{part: planned.get(part, "") for part in ("backend", "variant", "workload")},
        }
        alarms.append(
            Alarm(
                kind=AlarmKind.MISSING,
                fields=known.get(point, described),
                exit_code=ExitCode.INCOMPLETE,
                is_incomplete=True,
            )
        )
    return alarms


def _stale(
    panel: Panel, number: int, metrics: set[str], nights: int, alarming: set[str]
) -> list[Alarm]:
    return [
        Alarm(
            kind=AlarmKind.STALE,
            fields=fields,
            exit_code=ExitCode.INCOMPLETE,
            is_incomplete=True,
            nights=one.nights,
            last_run=one.last_run,
        )
        for one in stale_points(panel, number, metrics, nights)
        if (fields := _fields_of(panel, one.series))["point"] not in alarming
    ]


def _acknowledged(
    found: Sequence[Alarm],
    judgement: Judgement,
    panel: Panel,
    number: int,
    entries: Sequence[Acknowledgement],
) -> Alarms:
    day = judgement.run.started_at.date()
    device = judgement.run.device_class
    since = [_run_of(entry.since, panel, device) for entry in entries]
    used = [False] * len(entries)
    alarms = []
    for alarm in found:
        refused: list[tuple[Acknowledgement, str]] = []
        for position, entry in enumerate(entries):
            run = since[position]
            if entry.kind is not alarm.kind or not entry.matches(alarm.fields):
                continue
            used[position] = True
            if run is None or run > number:
                continue
            alarm, why_not = _held_against(alarm, entry, panel, run, number, day)
            if not why_not:
                alarm = replace(alarm, entry=entry, refused=())
                break
            refused.append((entry, why_not))
        else:
            alarm = replace(alarm, refused=tuple(refused))
        alarms.append(replace(alarm, run_id=judgement.run.run_id))
    # Of all series, where an entry was not used: one may be about a series that is well.
    every = [_fields_of(panel, i) for i in range(panel.num_series)] if not all(used) else []
    warnings = [
        text
        for entry, run, is_used in zip(entries, since, used, strict=True)
        if (text := _warning(entry, run, is_used, panel, every, number, day, device))
    ]
    has_invalid = bool(judgement.of(Verdict.INVALID))
    return Alarms(alarms=tuple(alarms), warnings=tuple(warnings), has_invalid=has_invalid)


def _held_against(
    alarm: Alarm, entry: Acknowledgement, panel: Panel, run: int, number: int, day: date
) -> tuple[Alarm, str]:
    """Why `entry`, which is about `alarm`, does not accept it; "" if it does."""
    reasons = [] if entry.holds(day) else [f"expired on {entry.expires}"]
    if alarm.kind is AlarmKind.SLOWER:
        ratio = _anchored_ratio(alarm, panel, run, number)
        if ratio > entry.up_to:
            accepted = f"{(entry.up_to - 1) * 100:+.1f} % was accepted"
            reasons.insert(0, f"{(ratio - 1) * 100:+.1f} %, and {accepted}")
        alarm = replace(alarm, ratio=ratio)
    if alarm.kind is AlarmKind.STATUS:
        assert alarm.verdict is not None
        seen = {alarm.verdict.subject.status, *alarm.verdict.subject.statuses}
        others = sorted(seen - {*entry.statuses, *_WORKS})
        if others:
            accepted = f"{', '.join(entry.statuses)} was accepted"
            reasons.insert(0, f"{', '.join(others)}, and {accepted}")
    return alarm, "; ".join(reasons)


def _anchored_ratio(alarm: Alarm, panel: Panel, run: int, number: int) -> float:
    """Tonight over the level before `run`, if that is more than over tonight's own level.

    The level follows a slow-down within some nights: without an anchor the next one of the same
    size would be accepted again.
    """
    assert alarm.verdict is not None
    tonight = alarm.ratio or 0.0
    index = panel.index_of(alarm.verdict.series.key)
    before = comparable(panel, np.array([index]), np.array([number]))[0]
    before[run:] = False
    level = panel.log_s[index, before]
    level = level[~np.isnan(level)][-LEVEL_RUNS:]
    subject = alarm.verdict.subject
    seconds = subject.confirmations or subject.replicates
    if not len(level) or not seconds:
        return tonight
    return max(tonight, float(np.median(seconds) / np.exp(np.median(level))))


def _run_of(since: str, panel: Panel, device: str) -> int | None:
    """The first run on the device that `since` names; None: it names none."""
    is_day = len(since) == 10 and since[4] == since[7] == "-"
    for number, run in enumerate(panel.runs):
        if run.device_class != device or panel.is_published[number]:
            continue
        if is_day:
            if run.started_at.date().isoformat() >= since:
                return number
        elif run.run_id.startswith(since) or run.commit.startswith(since):
            return number
    return None


def _warning(
    entry: Acknowledgement,
    run: int | None,
    is_used: bool,
    panel: Panel,
    every: Sequence[Mapping[str, str]],
    number: int,
    day: date,
    device: str,
) -> str:
    """What to tell of an entry that accepted nothing because it is not as it should be."""
    if is_used and run is None:
        return (
            f"{entry.place}: since = {entry.since!r} names no stored run, commit or day of "
            f"{device}, so the entry accepts nothing; write the id of a run"
        )
    if is_used:
        return ""
    about = [i for i, fields in enumerate(every) if entry.matches(fields)]
    if not about:
        if entry.kind is AlarmKind.MISSING:
            return f"{entry.place}: matches no stored or missing point; mend or remove it"
        return f"{entry.place}: matches no series; mend or remove it"
    if not (panel.status[about, number] != NOT_PLANNED).any():
        return ""  # the run says nothing of it: another device, suite or shard
    ended = f" and expired on {entry.expires}" if not entry.holds(day) else ""
    return f"{entry.place}: matches no alarm of this run{ended}; remove it if that is over"
