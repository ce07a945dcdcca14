"""`attnbench gate`: how often the nightly verdict is wrong and what it sees, from stored runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note

COLUMNS = ("what", "timer", "change", "night", "of", "count", "rate", "low", "high")


def gate(
    nights: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Newest nights without a change, and nights replayed. Default: 30, of more than "
            "600 series fewer.",
        ),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option(help="Replay as if the build before were measured beside the new one."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the series and nights that get a step.")] = 0,
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """The gate's own record: false alarms of nights without a change, power by slow-downs put in.

    Intervals are of 95 %.
    """
    from attnbench.history.panel import Panel
    from attnbench.history.rule import VerdictSettings
    from attnbench.history.self_record import gate_record, rehearsals_of, shards_of
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    folder = ResultsFolder(load_settings().results if results is None else results)
    panel = Panel.of(folder)
    own = [r.run_id for r, theirs in zip(panel.runs, panel.is_published, strict=True) if not theirs]
    headers = folder.headers()
    rehearsals = rehearsals_of(headers, own)
    settings = VerdictSettings(has_reference=beside)
    record = gate_record(panel, settings, rehearsals, nights, seed, shards_of(headers, own))
    found = record["false_alarms"]
    if not found["nights"]:
        note(
            "no run is of the same clean commit and packages as the run before it, so false alarms "
            "are not known yet: run attnbench nightly twice without a change"
        )
    if not record["power"]["by_timer"]:
        note("nothing to replay: a step is followed for three nights after three others")
    if any(row["timer"] == "fake" for row in (*found["by_timer"], *record["power"]["by_timer"])):
        note("timer fake: times from a formula, which say nothing of a machine")
    emit(record_rows(record), format, COLUMNS)


def record_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The record of `gate_record` as lines of `COLUMNS`."""
    found = record["false_alarms"]
    rows = []
    if found["nights"]:
        rows.append({"what": "nights with a false alarm", **found["alarming"]})
        rows.append({"what": "support changed without a change", **found["support"]})
    for timer in found["by_timer"]:
        rows += [
            {"what": f"false: {name.replace('_', ' ')}", "timer": timer["timer"], **timer[name]}
            for name in ("picked", "confirmed", "undecided", "not_confirmed_yet")
        ]
        if timer["standing"]:
            left_out = {"timer": timer["timer"], "count": timer["standing"]}
            rows.append({"what": "standing: slow the night before too", **left_out})
    for cell in record["power"]["by_timer"]:
        labels = {"timer": cell["timer"], "change": f"+{cell['step']:.0%}"}
        rows.append({"what": "replayed: picked", **labels, "night": 1, **cell["picked"]})
        rows += [
            {"what": "replayed: confirmed", **labels, "night": night, **confirmed}
            for night, confirmed in enumerate(cell["confirmed"], 1)
        ]
    for cell in record["rehearsed"]:
        labels = {"timer": cell["timer"], "change": f"x{cell['factor']:g}"}
        rows += [
            {"what": f"rehearsed: {name}", **labels, **cell[name]}
            for name in ("confirmed", "undecided")
        ]
    return rows
