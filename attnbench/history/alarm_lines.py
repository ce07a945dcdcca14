"""Alarms as lines for people: what is known and until when, what was accepted and is not any more."""

from __future__ import annotations

from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarms import Alarm, Alarms


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
    """What is wrong, in a word or two: `+8.1 %`, `CRASH`, `missing`, `not measured for 9 nights`."""
    if alarm.kind is AlarmKind.SLOWER:
        return _percent(alarm.ratio) if alarm.ratio else "slower"
    if alarm.kind is AlarmKind.STATUS and alarm.verdict is not None:
        return str(alarm.verdict.subject.status)
    return f"not measured for {alarm.nights} nights" if alarm.nights else "missing"


def counts_text(alarms: Alarms) -> str:
    """`2 known, 1 stale`; "" where there is nothing to count."""
    counts = (
        (len(alarms.of(AlarmKind.STALE)), "stale"),
        (len(alarms.known), "known"),
    )
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def _entry_text(entry: Acknowledgement) -> str:
    return f"was accepted by {entry.by} until {entry.expires} ({entry.place}): {entry.reason}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f} %"
