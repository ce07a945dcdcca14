"""One number for many points: a roll-up that does not jump when a point is missing one night."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median

#: Seconds by commit, then by point.
Medians = Mapping[str, Mapping[str, float]]


def roll_up(medians: Medians) -> dict[str, float]:
    """Seconds per commit that stand for all points: their geometric mean.

    Where every commit has every point this is the geometric mean, exactly. A commit that lacks a
    point gets it filled in: the point's usual level (its median over commits) times that commit's
    average ratio to the usual levels of the points it does have. A missing slow point therefore
    does not look like a speed-up. (Additive two-way fit in logarithms; Tukey, *Exploratory Data
    Analysis*, 1977, ch. 10.) Commits without any point are left out.
    """
    logs: dict[str, list[float]] = {}
    for points in medians.values():
        for point, seconds in points.items():
            logs.setdefault(point, []).append(math.log(seconds))
    if not logs:
        return {}
    usual = {point: median(values) for point, values in logs.items()}
    level = fmean(usual.values())
    return {
        commit: math.exp(level + fmean(math.log(s) - usual[p] for p, s in points.items()))
        for commit, points in medians.items()
        if points
    }
