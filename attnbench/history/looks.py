"""The two looks of a night, of series and runs as the record has them.

`gate.py` and `confirm.py` have the arithmetic; here is which values go into it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attnbench.history.confirm import (
    FALSE_ALARMS,
    FUTILITY_ROUNDS,
    LARGEST_P,
    SecondLook,
    second_look,
)
from attnbench.history.gate import (
    DEPTH,
    LARGEST_P_ALONE,
    MIN_LEVEL_RUNS,
    Floats,
    Screen,
    accepted,
    pick,
    screen,
)
from attnbench.history.rule import Estimate, VerdictSettings
from attnbench.history.series import RunValue

#: Of a night's improvements this share may be false: nobody measures them again.
_FALSE_IMPROVEMENTS = 0.05


@dataclass(frozen=True, slots=True)
class FirstLook:
    """One series in one night.

    Attributes:
        estimate: the newest run over the level of the runs before it.
        is_picked: looks slower, alone or with the two runs before it: measure it again if the
            build before can be measured beside it.
        is_sure: and if it cannot.
        is_faster: the night's improvements, false ones controlled, have this one among them.
        calm_high: where the interval would end if only the level's own runs made it.
    """

    estimate: Estimate
    is_picked: bool
    is_sure: bool
    is_faster: bool
    calm_high: float


def first_looks(
    timed: Sequence[Sequence[RunValue]], timers: Sequence[str], settings: VerdictSettings
) -> list[FirstLook | None]:
    """The first look at every series of a night together.

    `timed` has each series' comparable runs with a time, oldest first, the one judged last. None
    for a series with fewer earlier ones than make a level.
    """
    logs = np.full((len(timed), DEPTH), np.nan)
    for row, values in enumerate(timed):
        newest = [math.log(v.median_s) for v in values[-DEPTH:] if v.median_s is not None]
        logs[row, DEPTH - len(newest) :] = newest
    noises = [settings.noise(timer) for timer in timers]
    spread = np.array([noise.spread for noise in noises], dtype=float)
    floors = np.array([noise.floor for noise in noises], dtype=float)
    return looks_of(screen(logs, spread, settings.confidence), floors)


def looks_of(found: Screen, floors: Floats) -> list[FirstLook | None]:
    """What a screen of one night says of each series; `floors` are relative, one per series."""
    picked = pick(found, floors)
    sure = picked & (np.nan_to_num(found.p, nan=1.0) <= LARGEST_P_ALONE)
    faster = accepted(found.p_faster, _FALSE_IMPROVEMENTS)
    ratio, low, high = (
        np.exp(found.change + side * found.half_width).tolist() for side in (0.0, -1.0, 1.0)
    )
    calm_high = np.exp(found.change + found.level_half_width).tolist()
    return [
        FirstLook(
            estimate=Estimate(ratio[row], low[row], high[row]),
            calm_high=calm_high[row],
            is_picked=bool(picked[row]),
            is_sure=bool(sure[row]),
            is_faster=bool(faster[row]),
        )
        if runs >= MIN_LEVEL_RUNS
        else None
        for row, runs in enumerate(found.level_runs.tolist())
    ]


def look_again(
    subject: RunValue, level: Sequence[RunValue], settings: VerdictSettings
) -> SecondLook | None:
    """The second look, None if there was none, or nothing to hold it against."""
    reference = other_side(subject, level)
    if not subject.confirmations or not reference:
        return None
    return second_look(subject.confirmations, reference, settings.confidence)


def other_side(subject: RunValue, level: Sequence[RunValue]) -> tuple[float, ...]:
    """What the subject's fresh processes are held against, in seconds.

    The processes of the build before that took turns with them; where it could not be run, the runs
    of the level. Of these not the newest ones that were measured again to the end: a slow-down of
    last night is no level to hold tonight's against, or it would be none on the night after.
    """
    if is_beside(subject):
        return subject.references
    runs = list(level)
    while len(runs) > MIN_LEVEL_RUNS and len(runs[-1].confirmations) > FUTILITY_ROUNDS:
        runs.pop()
    return tuple(v.median_s for v in runs if v.median_s is not None)


def is_beside(subject: RunValue) -> bool:
    """Whether the build before was measured beside the subject: in half of the rounds at least."""
    return 0 < len(subject.confirmations) <= 2 * len(subject.references)


def is_candidate(first: FirstLook | None, subject: RunValue, has_reference: bool) -> bool:
    """Whether the first look alone would be an alarm, were it confirmed.

    What is picked only because the build before is at hand is none where it was not.
    """
    if first is None:
        return True
    beside = is_beside(subject) if subject.confirmations else has_reference
    return first.is_sure or (first.is_picked and beside)


def alarm_limit(looks: Sequence[tuple[FirstLook | None, SecondLook | None]]) -> float:
    """The largest p of a second look that is an alarm, given all of the night's picks.

    `looks` are those that `is_candidate` lets in. What was picked and not measured again counts as
    harmless. A series of too few runs for a first look counts once it has a second one.
    """
    p = [
        second.p if second is not None else 1.0
        for first, second in looks
        if (first.is_picked if first is not None else second is not None)
    ]
    if not p:
        return LARGEST_P
    values = np.array(p)
    alarms = values[accepted(values, FALSE_ALARMS)]
    return min(LARGEST_P, float(alarms.max())) if len(alarms) else 0.0
