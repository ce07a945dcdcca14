"""Alarms as lines for people: what is known until when, what is not accepted any more."""

from __future__ import annotations

from collections.abc import Sequence

from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarms import Alarm, Alarms


def alarm_lines(alarms: Alarms, listed: int) -> list[tuple[str, str, str]]:
    """Label, text and style of each line: at most `listed` of a kind, then how many more.

    What one entry is about is one line, with the worst of it.
    """
    kinds = (
        ("stale", [stale_text(alarm) for alarm in alarms.of(AlarmKind.STALE)], "yellow"),
        ("refused", [refused_text(*one) for one in _by_entry(alarms.refused)], "red"),
        ("known", [known_text(*one) for one in _by_entry(alarms.known)], ""),
        ("warning", list(alarms.warnings), "yellow"),
    )
    lines = []
    for label, texts, style in kinds:
        for i, text in enumerate(texts[:listed]):
            lines.append((label if i == 0 else "", text, style))
        if len(texts) > listed:
            lines.append(("", f"and {len(texts) - listed} more", ""))
    return lines


def _by_entry(alarms: Sequence[Alarm]) -> list[tuple[Alarm, int]]:
    """The worst alarm of each entry, in the order they come, and how many more it is about."""
    groups: dict[int, list[Alarm]] = {}
    for alarm in alarms:
        entry = alarm.entry or alarm.refused[0][0]
        groups.setdefault(id(entry), []).append(alarm)
    return [
        (max(group, key=lambda alarm: alarm.ratio or 0.0), len(group) - 1)
        for group in groups.values()
    ]


def known_text(alarm: Alarm, more: int = 0) -> str:
    """`CPU_ATTN q1s1k +8.1 %   known since R, accepted by A until D (up to +10 %): reason`."""
    entry = alarm.entry
    assert entry is not None
    limit = f" (up to {_percent(entry.up_to)})" if entry.kind is AlarmKind.SLOWER else ""
    return (
        f"{_title(alarm, more)}   known since {entry.since}, accepted by {entry.by} "
        f"until {entry.expires}{limit}: {entry.reason}"
    )


def refused_text(alarm: Alarm, more: int = 0) -> str:
    """`CPU_ATTN q1s1k +8.1 %   expired on D; was accepted by A (acknowledged.toml, line 12)`."""
    entry, why_not = alarm.refused[0]
    return f"{_title(alarm, more)}   {why_not}; {_entry_text(entry)}"


def stale_text(alarm: Alarm) -> str:
    """`FLASH_ATTN q1s1k: not measured for 7 nights ...`."""
    return (
        f"{alarm.title}: not measured for {alarm.nights} nights, last in run {alarm.last_run}, "
        "while others are on its workload; attnbench backends says who is here"
    )


def alarm_state(alarm: Alarm) -> str:
    """What is wrong in a few words: `+8.1 %`, `CRASH`, `missing`."""
    if alarm.kind is AlarmKind.SLOWER:
        return _percent(alarm.ratio) if alarm.ratio else "slower"
    if alarm.kind is AlarmKind.STATUS and alarm.verdict is not None:
        return str(alarm.verdict.subject.status)
    return f"not measured for {alarm.nights} nights" if alarm.nights else "missing"


def _title(alarm: Alarm, more: int) -> str:
    return f"{alarm.title} {alarm_state(alarm)}" + (f" and {more} more" if more else "")


def _entry_text(entry: Acknowledgement) -> str:
    return f"was accepted by {entry.by} until {entry.expires} ({entry.place}): {entry.reason}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"
