"""`attnbench acknowledge`: accept an alarm of the newest run until a day, in a reviewed file."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import ResultsOption, note
from attnbench.errors import DataError, ExitCode, UsageError

if TYPE_CHECKING:
    from attnbench.history.acknowledge import Acknowledgement
    from attnbench.history.alarms import Alarm, Alarms
    from attnbench.history.panel import Panel


def acknowledge(
    series: Annotated[
        str,
        typer.Argument(
            help="A series' id, or a pattern of its title: 'CPU_ATTN q1s1k*'. "
            "`attnbench history --format json` lists titles as backend and workload."
        ),
    ],
    reason: Annotated[str, typer.Option(help="Why it is accepted.")],
    expires: Annotated[str, typer.Option(help="Last day it is accepted, e.g. 2026-12-31.")],
    kind: Annotated[
        str, typer.Option(help="slower, status, missing or stale. Default: that of the alarms.")
    ] = "",
    up_to: Annotated[
        float | None,
        typer.Option(
            help="Largest ratio to the level before that is accepted, e.g. 1.08. "
            "Default: the largest there is and half of the timer's floor."
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Who accepts it. Default: git's user.name.")] = "",
    run: Annotated[str, typer.Option(help="Run whose alarms are meant. Default: the newest.")] = "",
    only_print: Annotated[
        bool, typer.Option("--print", help="Print the entry and write nothing.")
    ] = False,
    results: ResultsOption = None,
) -> None:
    """Accept alarms until a day: adds an entry to the acknowledgements file and prints it."""
    from attnbench.history.acknowledge import (
        AlarmKind,
        append_entry,
        entry_text,
        load_acknowledgements,
        parse_acknowledgements,
    )
    from attnbench.history.alarms import alarms_of
    from attnbench.history.panel import Panel
    from attnbench.history.verdict import judge
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    settings = load_settings()
    if kind and kind not in list(AlarmKind):
        raise UsageError(f"--kind {kind!r} is not known; use one of {', '.join(AlarmKind)}")
    try:
        last_day = date.fromisoformat(expires)
    except ValueError:
        raise UsageError(f"--expires {expires!r} is not a day; write 2026-12-31") from None
    known = load_acknowledgements(settings.acknowledgements)
    folder = ResultsFolder(settings.results if results is None else results)
    panel = Panel.of(folder)
    run_id = _run_id(panel, "" if run == "last" else run)
    judgement = judge(panel, run_id, planned=_planned(folder.header(run_id).plan))
    found = alarms_of(judgement, panel, known, stale_nights=settings.stale_nights)
    chosen = _matching(series, kind, found, run_id)
    entry = _entry(series, chosen, up_to, reason, by or _user_name(), last_day)
    # As it will be read: what the file may not say is refused here too.
    parse_acknowledgements(entry_text(entry).encode("utf-8"), "the entry")
    if only_print:
        print(entry_text(entry), end="")
        return
    append_entry(settings.acknowledgements, entry)
    print(entry_text(entry), end="")
    note(
        f"added to {settings.acknowledgements}; it covers {len(chosen)} alarm(s) of run {run_id} "
        f"until {last_day}: commit the file and have it reviewed"
    )


def _run_id(panel: Panel, run: str) -> str:
    """Raises DataError for a run that is not stored."""
    from attnbench.history.runs import find_run, newest_run

    if run:
        return find_run(panel.runs, run).run_id
    own = [one for one, theirs in zip(panel.runs, panel.is_published, strict=True) if not theirs]
    return newest_run(own or panel.runs).run_id


def _matching(series: str, kind: str, found: Alarms, run_id: str) -> list[Alarm]:
    """The open alarms that are meant. Raises UsageError, DataError naming what there is."""
    from attnbench.history.acknowledge import matches_series

    alarms = [alarm for alarm in found.alarms if alarm.entry is None]
    chosen = [
        alarm
        for alarm in alarms
        if matches_series(series, alarm.fields) and (not kind or alarm.kind == kind)
    ]
    if not chosen:
        listed = "; ".join(f"{a.fields['series'] or a.fields['point']} {a.title}" for a in alarms)
        there = f"open alarms: {_short(listed)}" if alarms else "it has no open alarm"
        if accepted := [a for a in found.known if matches_series(series, a.fields)]:
            entry = accepted[0].entry
            assert entry is not None
            there += f"; {len(accepted)} it matches are accepted already, until {entry.expires} "
            there += f"({entry.place}): to change that, edit or remove the entry"
        wanted = f" of kind {kind}" if kind else ""
        raise DataError(f"{series!r} matches no open alarm{wanted} of run {run_id}; {there}")
    # What is only undecided is accepted along with the rest, but does not say how much.
    chosen = [a for a in chosen if a.exit_code is not ExitCode.UNDECIDED] or chosen
    kinds = sorted({alarm.kind for alarm in chosen})
    if len(kinds) > 1:
        raise UsageError(
            f"{series!r} matches alarms of several kinds; choose one with --kind: "
            f"{', '.join(kinds)}"
        )
    return chosen


def _entry(
    series: str, chosen: list[Alarm], up_to: float | None, reason: str, by: str, expires: date
) -> Acknowledgement:
    from attnbench.history.acknowledge import ACCEPTABLE, Acknowledgement, AlarmKind
    from attnbench.history.rule import VerdictSettings
    from attnbench.store.record import Status

    kind = chosen[0].kind
    if up_to is not None and kind is not AlarmKind.SLOWER:
        raise UsageError(f"--up-to says nothing of kind {kind.value!r}; leave it out")
    verdicts = [alarm.verdict for alarm in chosen if alarm.verdict is not None]
    statuses = {v.subject.status for v in verdicts} if kind is AlarmKind.STATUS else set()
    if Status.INCORRECT in statuses:
        raise UsageError(
            "a wrong output is never accepted; take the point out of its suite, or the backend "
            "out of the night"
        )
    if kind is AlarmKind.SLOWER and up_to is None:
        floor = max(VerdictSettings().noise(v.series.key.timer).floor for v in verdicts)
        ratio = max(alarm.ratio or 1.0 for alarm in chosen)
        up_to = round(ratio * (1 + floor / 2) + 0.0005, 3)
    devices = sorted({alarm.fields["device"] for alarm in chosen})
    began = [(v.since or v.subject) for v in verdicts]
    first = min(began, key=lambda value: (value.started_at, value.run_id), default=None)
    runs = sorted(filter(None, (alarm.last_run for alarm in chosen)))
    return Acknowledgement(
        kind=kind,
        patterns={
            "series": series,
            **({"device": devices[0]} if len(devices) == 1 else {}),
        },
        since=first.run_id if first else runs[0] if runs else chosen[0].run_id,
        reason=reason,
        by=by,
        expires=expires,
        up_to=up_to or 0.0,
        statuses=tuple(s for s in ACCEPTABLE if s in statuses),
    )


def _planned(plan: object) -> list[str]:
    from collections.abc import Iterable, Mapping

    from attnbench.store.record import point_id

    assert isinstance(plan, Iterable)
    return [
        point_id(row["workload"], row["backend"], row["variant"])
        for row in plan
        if isinstance(row, Mapping) and {"workload", "backend", "variant"} <= set(row)
    ]


def _user_name() -> str:
    import subprocess

    try:
        done = subprocess.run(
            ["git", "config", "user.name"], capture_output=True, text=True, timeout=10, check=False
        )
        name = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        name = ""
    if not name:
        raise UsageError("who accepts it is not known: give --by NAME, or set git's user.name")
    return name


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
