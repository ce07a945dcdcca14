"""Slower levels of the last weeks that are no alarm tonight: never seen, or seen and not mended.

A night's gate sees a small step in its first nights or not at all, and what nobody mends or accepts
is the level itself after a week (docs/verdict.md). Change points still say it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from attnbench.dashboard.alarm_entries import entry, outline_of
from attnbench.dashboard.level_changes import Changes
from attnbench.dashboard.watch import Watch
from attnbench.history.acknowledge import AlarmKind
from attnbench.history.alarms import point_fields
from attnbench.history.attribution import attribute_between
from attnbench.history.confirm import FUTILITY_ROUNDS
from attnbench.history.panel import Panel
from attnbench.history.rule import VerdictSettings
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.wording import percent

#: A level of more runs is no news.
_RUNS = 20

#: A change that noise explains better than once in so many series is not told.
_SURE = 1e-3

_LISTED = 5


def late_section(
    panel: Panel,
    verdicts: Mapping[str, SeriesVerdict],
    changes: Changes,
    settings: VerdictSettings,
    watch: Watch,
    told: Collection[str],
) -> dict[str, Any]:
    """The overview's section of them, the largest first; `told` are series it names already.

    Of each series the newest change of level counts, where it is slower by more than the timer's
    floor and nobody has accepted it.
    """
    found = []
    for index in panel.with_metrics(settings.metrics).tolist():
        name = panel.ids[index]
        if name in told or name not in verdicts or not changes.get(name):
            continue
        _, low, high, ratio, p = changes[name][-1]
        is_clear = p <= _SURE and ratio > settings.noise(panel.keys[index].timer).limit
        is_new = np.isfinite(panel.log_s[index, high:]).sum() <= _RUNS
        if is_clear and is_new and not _is_accepted(panel, index, ratio, watch):
            found.append((ratio, index, low, high))
    found.sort(reverse=True)
    return {
        "kind": "late",
        "title": "Slower for some time, and no alarm tonight",
        "total": len(found),
        "points": 0,
        "entries": [
            _entry(panel, verdicts[panel.ids[index]], index, (low, high), ratio, watch)
            for ratio, index, low, high in found[:_LISTED]
        ],
    }


def _is_accepted(panel: Panel, index: int, ratio: float, watch: Watch) -> bool:
    day = panel.runs[-1].started_at.date()
    series = panel.outline(index)
    fields = point_fields(series.identity, series.key, series.title, panel.ids[index])
    return any(
        one.kind is AlarmKind.SLOWER
        and ratio <= one.up_to
        and one.holds(day)
        and one.matches(fields)
        for one in watch.accepted
    )


def _entry(
    panel: Panel,
    verdict: SeriesVerdict,
    index: int,
    between: tuple[int, int],
    ratio: float,
    watch: Watch,
) -> dict[str, Any]:
    series = outline_of(panel, index)
    old, new = (series.at(panel.runs[run].run_id) for run in between)
    assert old is not None
    assert new is not None
    again = np.flatnonzero(panel.num_confirmations[index, between[0] + 1 :] > FUTILITY_ROUNDS)
    detail = "a change of level, not measured again since: bisect says whether it is one"
    if len(again):
        last = panel.runs[between[0] + 1 + int(again[-1])].started_at
        detail = f"a change of level, last measured again on {last:%Y-%m-%d}"
    made = entry(verdict, f"{percent(ratio)} level", detail, since=new)
    runs = {run.run_id: run for run in panel.runs}
    found = attribute_between(series, old, new, runs, watch.repository, watch.clocks)
    return {**made, "suspects": found.text, "bisect": found.bisect}
