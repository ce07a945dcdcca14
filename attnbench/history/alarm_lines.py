"""Alarms as lines for people: what is known until when, what is not accepted any more."""

from __future__ import annotations

from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarms import Alarm, Alarms


def alarm_lines(alarms: Alarms, listed: int) -> list[tuple[str, str, str]]:
    """Label, text and style of each line: at most `listed` of a kind, then how many more."""
    kinds = (
        ("stale", [stale_text(alarm) for alarm in alarms.of(AlarmKind.STALE)], "yellow"),
        ("refused", [refused_text(alarm) for alarm in alarms.refused], "red"),
        ("known", [known_text(alarm) for alarm in alarms.known], ""),
        ("warning", list(alarms.warnings), "yellow"),
    )
    lines = []
    for label, texts, style in kinds:
        for i, text in enumerate(texts[:listed]):
            lines.append((label if i == 0 else "", text, style))
        if len(texts) > listed:
            lines.append(("", f"and {len(texts) - listed} more", ""))
    return lines


def known_text(alarm: Alarm) -> str:
    """`CPU_ATTN q1s1k +8.1 %   known since R, accepted by A until D (up to +10 %): reason`."""
    entry = alarm.entry
    assert entry is not None
    limit = f" (up to {_percent(entry.up_to)})" if entry.kind is AlarmKind.SLOWER else ""
    return (
        f"{alarm.title} {alarm_state(alarm)}   known since {entry.since}, accepted by {entry.by} "
        f"until {entry.expires}{limit}: {entry.reason}"
    )


def refused_text(alarm: Alarm) -> str:
    """`CPU_ATTN q1s1k +8.1 %   expired on D; was accepted by A (acknowledged.toml, line 12)`."""
    entry, why_not = alarm.refused[0]
    return f"{alarm.title} {alarm_state(alarm)}   {why_not}; {_entry_text(entry)}"


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


def _entry_text(entry: Acknowledgement) -> str:
    return f"was accepted by {entry.by} until {entry.expires} ({entry.place}): {entry.reason}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"
