"""Which points a night measures again: the worst of each group, until they are given up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection

import numpy as np

from attnbench.history.confirm import FUTILITY_ROUNDS, is_futile
from attnbench.history.gate import LEVEL_RUNS
from attnbench.history.looks import is_beside, other_side
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Reason, VerdictSettings
from attnbench.history.series_verdict import SeriesVerdict, timed_runs
from attnbench.history.verdict import Judgement

#: What the points of one group share: one cause is likely to be behind them all.
_GROUP = ("backend", "variant", "phase")


def points_to_confirm(judgement: Judgement, begun: Collection[str], at_most: int) -> list[str]:
    """Ids of the points to measure again, at most `at_most`: the worst of each group first.

    What looks slower goes before what only cannot be told. By turns over the groups, so that a
    night on which one backend is slow everywhere leaves room for what else is slow. `begun` are the
    points that were measured again already, by a night that was stopped: they go on, and count.
    """
    worst: dict[str, SeriesVerdict] = {}
    for verdict in judgement.verdicts:
        point = verdict.series.key.point_id
        if verdict.is_flagged and (point not in worst or _rank(verdict) < _rank(worst[point])):
            worst[point] = verdict
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for point, verdict in sorted(worst.items(), key=lambda item: (_rank(item[1]), item[0])):
        groups[tuple(str(verdict.series.identity[name]) for name in _GROUP)].append(point)
    turns = sorted(
        (turn, place, point)
        for place, points in enumerate(groups.values())
        for turn, point in enumerate(points)
        if point not in begun
    )
    free = max(0, at_most - len(begun))
    return [*begun, *(point for _, _, point in turns[:free])]


def begun_points(panel: Panel, run_id: str) -> list[str]:
    """Ids of the points that a run has begun to measure again."""
    again = np.flatnonzero(panel.num_confirmations[:, panel.run_number(run_id)])
    return list(dict.fromkeys(panel.keys[index].point_id for index in again.tolist()))


def given_up(
    panel: Panel, run_id: str, points: Collection[str], settings: VerdictSettings
) -> frozenset[str]:
    """Those of `points` that show nothing in their first `FUTILITY_ROUNDS` fresh processes.

    A point with several judged series (L2 states, say) goes on while one of them shows something.
    """
    run = panel.run_number(run_id)
    indices = [
        index
        for index in panel.with_metrics(settings.metrics).tolist()
        if panel.keys[index].point_id in points and panel.status[index, run] != NOT_PLANNED
    ]
    going = set()
    for series in panel.all_series(indices):
        subject = series.at(run_id)
        assert subject is not None
        other = other_side(subject, timed_runs(series, subject)[:-1][-LEVEL_RUNS:])
        if is_beside(subject):
            other = other[:FUTILITY_ROUNDS]
        again = subject.confirmations[:FUTILITY_ROUNDS]
        if not other or not is_futile(again, other, settings.noise(series.key.timer)):
            going.add(series.key.point_id)
    return frozenset(points) - going


def _rank(verdict: SeriesVerdict) -> tuple[bool, float]:
    ratio = verdict.estimate.ratio if verdict.estimate else math.inf
    return verdict.reasons[0] is not Reason.NOT_CONFIRMED_YET, -ratio
