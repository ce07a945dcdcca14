"""Slower levels of the last weeks that no alarm told of: to be looked at, for whom it matters.

A night's gate sees a small step in its first nights or not at all (docs/verdict.md); change points
find it later, and nobody's second look has confirmed them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from attnbench.dashboard.alarm_entries import entry, outline_of
from attnbench.dashboard.level_changes import Changes
from attnbench.dashboard.watch import Watch
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
    floor and no second look was made to its end since.
    """
    found = []
    for index in panel.with_metrics(settings.metrics).tolist():
        name = panel.ids[index]
        if name in told or name not in verdicts or not changes.get(name):
            continue
        _, low, high, ratio, p = changes[name][-1]
        is_clear = p <= _SURE and ratio > settings.noise(panel.keys[index].timer).limit
        is_new = np.isfinite(panel.log_s[index, high:]).sum() <= _RUNS
        looked_at = (panel.num_confirmations[index, low + 1 :] > FUTILITY_ROUNDS).any()
        if is_clear and is_new and not looked_at:
            found.append((ratio, index, low, high))
    found.sort(reverse=True)
    return {
        "kind": "late",
        "title": "Slower for some time, and no alarm told of it",
        "total": len(found),
        "points": 0,
        "entries": [
            _entry(panel, verdicts[panel.ids[index]], index, (low, high), ratio, watch)
            for ratio, index, low, high in found[:_LISTED]
        ],
    }


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
    detail = "a change of level, not measured again since: bisect says whether it is one"
    made = entry(verdict, f"{percent(ratio)} level", detail, since=new)
    runs = {run.run_id: run for run in panel.runs}
    found = attribute_between(series, old, new, runs, watch.repository, watch.clocks)
    return {**made, "suspects": found.text, "bisect": found.bisect}
