"""The ten lines a tired person understands: what is wrong, how bad, since when, what to type.

Ten at most, whatever a night was: of the least important things less is said first, and of what
does not fit how much there is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnbench.history.acknowledge import AlarmKind
from attnbench.history.alarm_lines import alarm_lines
from attnbench.history.attribution import Attribution, attribute_since
from attnbench.history.groups import AlarmGroup, group_alarms
from attnbench.history.rule import Reason, Verdict
from attnbench.history.runs import RunSummary
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.summary_fit import LISTED, Section, SummaryLine, fitted
from attnbench.history.verdict import Judgement
from attnbench.history.wording import (
    duration_text,
    interval_text,
    one_line,
    percent,
    point_text,
    repro_command,
    short_commit,
    since_text,
    status_reasons,
)

#: So many lines has a summary at most, its headline among them: a phone shows no more.
_MOST_LINES = 10

_LABEL_WIDTH = 10


def summary_lines(
    judgement: Judgement,
    *,
    pages: str = "",
    duration_s: float | None = None,
    commits_since: int | None = None,
    reference: str = "",
    causes: Mapping[str, Attribution] | None = None,
) -> list[SummaryLine]:
    """The summary without its headline. `pages` is where the dashboard lies, `reference` what the
    build before was that took turns, or why there was none; `causes` is what changed with the
    regressions, by series id (`causes_of`)."""
    ends = [SummaryLine("reference", reference)] if reference else []
    ends += [SummaryLine("pages", pages)] if pages else []
    return [
        SummaryLine("verdict", _verdict_text(judgement), _STYLES[judgement.verdict]),
        SummaryLine("measured", _measured_text(judgement.run, duration_s)),
        *fitted(_sections(judgement, causes or {}), _MOST_LINES - 3 - len(ends)),
        *ends,
    ]


def _sections(judgement: Judgement, causes: Mapping[str, Attribution]) -> list[Section]:
    """What there is to say, the most important first."""
    groups = group_alarms(_open(judgement, judgement.verdicts))
    slower = [group for group in groups if not group.is_support_change]
    lost = [group for group in groups if group.is_support_change]
    missing = len(_missing(judgement))
    waiting = len(judgement.flagged_points())
    new = len(judgement.because(Reason.NO_BASELINE))
    told = _alarm_sections(judgement)
    sections = [
        Section("slower", [_slower_lines(group, causes) for group in slower], "red"),
        Section("changed", [_lost_lines(group, causes) for group in lost], "yellow"),
        Section("failed", [[_failed_text(v)] for v in _open(judgement, judgement.failures)]),
        Section(
            "missing",
            [[f"{missing} planned points have no row; go on: attnbench nightly --resume last"]]
            * (missing > 0),
            count=missing,
        ),
        *(told[label] for label in ("refused", "stale") if label in told),
        Section("stack", _stack_lines(judgement), "", ""),
        Section(
            "undecided",
            [_undecided_lines(v) for v in _open(judgement, judgement.of(Verdict.UNDECIDED))],
        ),
        Section(
            "waiting",
            [[f"{waiting} points may be slower and were not measured again"]] * (waiting > 0),
            count=waiting,
        ),
        Section("invalid", [_invalid_lines(v) for v in judgement.of(Verdict.INVALID)]),
        Section(
            "works" if lost else "changed",
            [_changed_lines(v) for v in judgement.because(Reason.STATUS_RECOVERED)],
        ),
        Section(
            "faster",
            [[_ratio_text(v)] for v in judgement.because(Reason.FASTER_THAN_FLOOR)],
            "green",
        ),
        Section("dropped", _dropped_lines(judgement), "", count=len(judgement.dropped)),
        *(told[label] for label in ("known", "warning") if label in told),
        Section("new", [[_new_text(new, len(judgement.verdicts))]] * (new > 0), "", count=new),
    ]
    return [section for section in sections if section.entries]


def headline(judgement: Judgement, commits_since: int | None = None) -> str:
    """`attnbench nightly · date · device · commit (n commits since the last run)`.

    Of one shard of several it says which: the verdict is not that of the night.
    """
    run = judgement.run
    commit = short_commit(run.commit) or "commit unknown"
    if commits_since is not None:
        plural = "" if commits_since == 1 else "s"
        commit += f" ({commits_since} commit{plural} since the last run)"
    elif judgement.previous is None:
        commit += " (first run)"
    elif run.commit and judgement.previous.commit == run.commit:
        commit += " (same commit as the last run)"
    elif judgement.previous.commit:
        commit += f" (last run: {short_commit(judgement.previous.commit)})"
    words = ["attnbench nightly", f"{run.started_at:%Y-%m-%d}", run.device_class, commit]
    if judgement.shard:
        words.append(f"shard {judgement.shard} of the plan only")
    return " · ".join(words)


def summary_text(
    judgement: Judgement,
    *,
    pages: str = "",
    duration_s: float | None = None,
    commits_since: int | None = None,
    reference: str = "",
    causes: Mapping[str, Attribution] | None = None,
    color: bool = False,
) -> str:
    """The summary as plain text, each line at most once; with `color`, ANSI colours in it."""
    rows = [headline(judgement, commits_since)]
    for line in summary_lines(
        judgement, pages=pages, duration_s=duration_s, reference=reference, causes=causes
    ):
        label = f"{line.label:<{_LABEL_WIDTH}}"
        if color and line.label and line.style:
            label = f"\x1b[{_ANSI[line.style]}m{label}\x1b[0m"
        rows.append((label + one_line(line.text)).rstrip())
    return "\n".join(rows)


def summary_markdown(
    judgement: Judgement,
    *,
    pages: str = "",
    duration_s: float | None = None,
    commits_since: int | None = None,
    reference: str = "",
    causes: Mapping[str, Attribution] | None = None,
) -> str:
    """The summary for a CI page. Names and reasons cannot become markup."""
    rows = [f"### {_md(headline(judgement, commits_since))}", "", "| | |", "|---|---|"]
    label = ""
    for line in summary_lines(
        judgement, pages=pages, duration_s=duration_s, reference=reference, causes=causes
    ):
        name = line.label if line.label != label else ""
        label = line.label or label
        text = one_line(line.text)
        word, _, command = text.partition(": ")
        if word in ("again", "find"):
            cell = f"{word}: {_md_code(command)}"
        else:
            cell = _md(text)
        rows.append(f"| {'**' + name + '**' if name else ''} | {cell} |")
    return "\n".join(rows) + "\n"


_STYLES = {
    Verdict.REGRESSION: "red",
    Verdict.UNDECIDED: "yellow",
    Verdict.INVALID: "yellow",
    Verdict.UNCHANGED: "green",
    Verdict.IMPROVEMENT: "green",
}
_ANSI = {"red": "1;31", "yellow": "1;33", "green": "1;32"}


def verdict_counts(judgement: Judgement) -> str:
    """`1 confirmed, 2 undecided, 1 support change`."""
    alarms = judgement.alarms
    counts = [
        (len(_open(judgement, judgement.because(Reason.CONFIRMED))), "confirmed"),
        (len(_open(judgement, judgement.because(Reason.SLOWER_THAN_FLOOR))), "slower"),
        (len(_open(judgement, judgement.of(Verdict.UNDECIDED))), "undecided"),
        (len(judgement.of(Verdict.INVALID)), "invalid"),
        (len(_open(judgement, judgement.because(Reason.STATUS_CHANGED))), "support change"),
        (len(alarms.of(AlarmKind.STALE)) if alarms else 0, "stale"),
        (len(alarms.known) if alarms else 0, "known"),
        (len(judgement.because(Reason.STATUS_RECOVERED)), "recovered"),
        (len(judgement.because(Reason.FASTER_THAN_FLOOR)), "faster"),
    ]
    parts = []
    for count, word in counts:
        if count:
            plural = "s" if word == "support change" and count > 1 else ""
            parts.append(f"{count} {word}{plural}")
    if not parts:
        compared = sum(1 for v in judgement.verdicts if v.estimate)
        parts = [f"{compared} points compared" if compared else "nothing to compare with yet"]
    if judgement.incomplete:
        parts.append("incomplete")
    return ", ".join(parts)


def _verdict_text(judgement: Judgement) -> str:
    text = f"{judgement.verdict}: {verdict_counts(judgement)}"
    return f"{text}     exit {int(judgement.exit_code)}"


def _measured_text(run: RunSummary, duration_s: float | None) -> str:
    counts = sorted(run.points.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {status}" for status, count in counts)
    took = duration_text(run.duration_s if duration_s is None else duration_s)
    return f"{run.num_points} points: {listed}  {took}"


def _ratio_text(verdict: SeriesVerdict) -> str:
    assert verdict.estimate is not None
    since = f"   since {since_text(verdict.since)}" if verdict.since else ""
    return f"{point_text(verdict)}   {interval_text(verdict.estimate)}{since}"


def causes_of(
    judgement: Judgement, runs: Sequence[RunSummary], repository: Path | None = None
) -> dict[str, Attribution]:
    """What changed with the gravest slow-down and the gravest loss of support.

    By the id of the worst series of its group. Of the others the pages say it.
    """
    known = {run.run_id: run for run in runs}
    groups = group_alarms(_open(judgement, judgement.verdicts))
    slower = [group for group in groups if not group.is_support_change]
    lost = [group for group in groups if group.is_support_change]
    found = {}
    for group in (*slower[:1], *lost[:1]):
        worst = group.worst
        since = worst.since or worst.subject
        if cause := attribute_since(worst.series, since, known, repository):
            found[worst.series.id] = cause
    return found


def _cause_lines(group: AlarmGroup, causes: Mapping[str, Attribution]) -> list[str]:
    """What changed with it, and the command that finds out which of that it was."""
    cause = causes.get(group.worst.series.id)
    if cause is None:
        return []
    return [f"with: {cause.text}", *([f"find: {cause.bisect}"] if cause.bisect else [])]


def _slower_lines(group: AlarmGroup, causes: Mapping[str, Attribution]) -> list[str]:
    worst = group.worst
    again = [*_cause_lines(group, causes), f"again: {repro_command(worst.series.identity)}"]
    if len(group.members) == 1:
        return [_ratio_text(worst), *again]
    assert group.ratio is not None
    assert worst.estimate is not None
    return [
        f"{_members_text(group)}   {percent(group.ratio)} in the middle{_since_text(group)}",
        f"worst: {point_text(worst)}   {interval_text(worst.estimate)}",
        *again,
    ]


def _lost_lines(group: AlarmGroup, causes: Mapping[str, Attribution]) -> list[str]:
    first, cause = _changed_lines(group.worst), _cause_lines(group, causes)
    if len(group.members) == 1:
        return [*first, *cause]
    status = group.worst.subject.status
    text = f"{_members_text(group)}   now {status}{_since_text(group)}"
    return [text, f"first: {first[0]}", *cause]


def _members_text(group: AlarmGroup) -> str:
    return f"{group.title}: {len(group.members)} of {group.judged} series"


def _since_text(group: AlarmGroup) -> str:
    return f"   since {since_text(group.since)}" if group.since else ""


def _changed_lines(verdict: SeriesVerdict) -> list[str]:
    status, subject = verdict.subject.status, verdict.subject
    detail = ""
    if verdict.reasons[0] is Reason.STATUS_CHANGED and (reasons := status_reasons(subject)):
        more = f"; and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        detail = f" ({_shorten(reasons[0])}{more})"
    since = ""
    if verdict.since and verdict.since.run_id != subject.run_id:
        since = f"   since {since_text(verdict.since)}"
    return [f"{point_text(verdict)}: {verdict.status_before} -> {status}{detail}{since}"]


_UNDECIDED_ADVICE = {
    Reason.INTERVAL_TOO_WIDE: "too noisy to tell; run again on a quiet machine",
    Reason.TOO_FEW_REPLICATES: "too few replicates; run again with --replicates 3",
    Reason.NOT_CONFIRMED: "slower in fresh processes too, but not surely; the next run decides",
    Reason.NOT_CONFIRMED_YET: "looks slower, not measured again yet; run attnbench nightly",
}


def undecided_advice(verdict: SeriesVerdict) -> str:
    """Why a verdict is undecided and what to do about it."""
    found = verdict.estimate
    if verdict.reasons[0] is Reason.NOT_CONFIRMED and found is not None and found.low > 1:
        return "slower in fresh processes too, as earlier nights were at times; see its page"
    if verdict.reasons[0] is Reason.STATUS_UNSTABLE:
        statuses = ", ".join(dict.fromkeys(verdict.subject.statuses))
        return f"{statuses} in one run; {verdict.note}"
    return _UNDECIDED_ADVICE[verdict.reasons[0]]


def _undecided_lines(verdict: SeriesVerdict) -> list[str]:
    found = f"   {interval_text(verdict.estimate)}" if verdict.estimate else ""
    return [f"{point_text(verdict)}{found}   {undecided_advice(verdict)}"]


def _invalid_lines(verdict: SeriesVerdict) -> list[str]:
    return [f"{point_text(verdict)}: {verdict.note}"]


def _failed_text(verdict: SeriesVerdict) -> str:
    reasons = status_reasons(verdict.subject)
    why = f": {_shorten(reasons[0])}" if reasons else ""
    return f"{point_text(verdict)} {verdict.subject.status}{why}"


def _missing(judgement: Judgement) -> Sequence[object]:
    alarms = judgement.alarms
    return alarms.of(AlarmKind.MISSING) if alarms else judgement.missing


def _dropped_lines(judgement: Judgement) -> list[list[str]]:
    if not judgement.dropped:
        return []
    listed = "; ".join(judgement.dropped[:LISTED])
    more = len(judgement.dropped) - LISTED
    tail = f"; and {more} more" if more > 0 else ""
    return [[f"{len(judgement.dropped)} points of the last run were not planned: {listed}{tail}"]]


def _stack_lines(judgement: Judgement) -> list[list[str]]:
    change = judgement.environment
    return [[f"{change.text}   (since run {change.before})"]] if change else []


def _new_text(new: int, of: int) -> str:
    return f"{new} of {of} points have no baseline yet: this run is their first"


def _alarm_sections(judgement: Judgement) -> dict[str, Section]:
    """What people accepted, do not any more, or should look at: by label."""
    if judgement.alarms is None:
        return {}
    entries: dict[str, list[list[str]]] = {}
    styles: dict[str, str] = {}
    label = ""
    for name, text, style in alarm_lines(judgement.alarms, sys.maxsize):
        label = name or label
        styles.setdefault(label, style)
        entries.setdefault(label, []).append([text])
    # One line is about all that one acknowledgement is.
    counts = {"refused": len(judgement.alarms.refused), "known": len(judgement.alarms.known)}
    return {
        name: Section(name, found, styles[name], "", counts.get(name, 0))
        for name, found in entries.items()
    }


def _open(judgement: Judgement, verdicts: Sequence[SeriesVerdict]) -> list[SeriesVerdict]:
    return [v for v in verdicts if not judgement.is_known(v)]


def _shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _md(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\|`*_[]~#" else c for c in escaped)


def _md_code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
