"""All series of a night judged at once, on the arrays of a panel.

What `series_verdict.judge_night` says of objects, without an object per value: where the first look
and the statuses leave nothing to ask, the verdict follows from the arrays. Of the others the values
that their verdict depends on are read, and `judge_series` has the say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from attnbench.history.gate import LEVEL_RUNS, Floats, screen
from attnbench.history.looks import FirstLook, alarm_limit, is_candidate, looks_of
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import Verdict, VerdictSettings
from attnbench.history.series import DIRTY, GRAVITY, RunValue, Series
from attnbench.history.series_verdict import (
    Night,
    SeriesVerdict,
    first_verdict,
    is_supported,
    judge_series,
    look_of_night,
    timed_runs,
)
from attnbench.store.record import Status

Bools = NDArray[np.bool_]

_THROTTLED = GRAVITY.index(Status.THROTTLED)
_WORKS = np.array([is_supported(status) for status in GRAVITY])

#: Series looked at together; bounds the memory.
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class _Windows:
    """Of each series judged, [num_judged] or [num_judged, num_runs].

    Attributes:
        log_s: of the comparable runs and the one judged, NaN elsewhere.
        is_plain: the statuses say nothing, and nothing was measured again.
        needed: the values that a verdict on objects depends on.
        baseline_runs: how many runs it names as its baseline.
        before: the code of the status of the newest of those.
    """

    log_s: Floats
    is_plain: Bools
    needed: Bools
    baseline_runs: NDArray[np.int64]
    before: NDArray[np.int64]


def judge_panel(
    panel: Panel,
    indices: Sequence[int] | NDArray[np.int64],
    runs: Sequence[int] | NDArray[np.int64],
    settings: VerdictSettings,
    require_confirmation: bool = True,
) -> list[SeriesVerdict]:
    """Judge each series' value in its run (`runs`, which planned it) against the runs before.

    All of them are one night: what is picked depends on how many series there are.
    """
    chosen, at = np.asarray(indices, dtype=np.int64), np.asarray(runs, dtype=np.int64)
    if not len(chosen):
        return []
    windows = _all_windows(panel, chosen, at, settings)
    noises = [settings.noise(panel.keys[index].timer) for index in chosen.tolist()]
    spread, floors = np.array([(noise.spread, noise.floor) for noise in noises]).T
    firsts = looks_of(screen(windows.log_s, spread, settings.confidence), floors)
    verdicts: list[SeriesVerdict | None] = [None] * len(chosen)
    subjects = _subjects(panel, chosen, at)
    for row, first in enumerate(firsts):
        if first is not None and windows.is_plain[row] and not first.is_picked:
            verdicts[row] = _unchanged(panel, int(chosen[row]), subjects[row], first, settings)
    plain = [row for row, verdict in enumerate(verdicts) if verdict is not None]
    for row in plain:
        verdict = verdicts[row]
        assert verdict is not None
        verdicts[row] = replace(
            verdict,
            baseline_runs=int(windows.baseline_runs[row]),
            status_before=GRAVITY[windows.before[row]],
        )
    others = np.array([row for row, verdict in enumerate(verdicts) if verdict is None], np.int64)
    found = _judged(
        panel, chosen[others], at[others], others, windows, firsts, settings, require_confirmation
    )
    for row, verdict in zip(others.tolist(), found, strict=True):
        verdicts[row] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def judge_newest(
    panel: Panel, indices: Sequence[int] | NDArray[np.int64], settings: VerdictSettings
) -> list[SeriesVerdict]:
    """The verdict of each series on its newest run, as on that night: among all of its series.

    So which series are asked for, and what other nights measured, changes no verdict.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    newest = panel.newest[chosen]
    judged = panel.with_metrics(settings.metrics)
    verdicts: dict[int, SeriesVerdict] = {}
    for run in np.unique(newest).tolist():
        asked = set(chosen[newest == run].tolist())
        night = np.union1d(judged[panel.status[judged, run] != NOT_PLANNED], list(asked))
        found = judge_panel(panel, night, np.full(len(night), run), settings)
        verdicts.update(
            (index, verdict)
            for index, verdict in zip(night.tolist(), found, strict=True)
            if index in asked
        )
    return [verdicts[index] for index in chosen.tolist()]


def comparable(panel: Panel, indices: NDArray[np.int64], runs: NDArray[np.int64]) -> Bools:
    """`series_verdict.comparable_runs` of each series and run: [num_indices, num_runs]."""
    before = np.arange(panel.num_runs) < runs[:, None]
    planned = panel.status[indices] != NOT_PLANNED
    is_dirty = panel.is_dirty[indices]
    judged_dirty = is_dirty[np.arange(len(indices)), runs][:, None]
    return np.asarray(before & planned & ~panel.is_published & (judged_dirty | ~is_dirty))


def was_beside(panel: Panel, run: int) -> bool:
    """Whether a run has times of the build before: it was at hand that night."""
    references = panel.digest(run, ("references",))["references"]
    return bool(pc.any(pc.greater(pc.list_value_length(references), 0)).as_py())


def has_comparable_runs(panel: Panel, index: int, subject: RunValue, run: int) -> bool:
    """Whether a series has runs that `subject`, of another series in that run, may be judged by."""
    planned = panel.status[index, :run] != NOT_PLANNED
    own = planned & ~panel.is_published[:run]
    return bool(
        (own if subject.commit.endswith(DIRTY) else own & ~panel.is_dirty[index, :run]).any()
    )


def _subjects(
    panel: Panel, chosen: NDArray[np.int64], at: NDArray[np.int64]
) -> dict[int, RunValue]:
    subjects: dict[int, RunValue] = {}
    for run in np.unique(at).tolist():
        rows = np.flatnonzero(at == run)
        values = panel.values_of_run(chosen[rows], run)
        subjects.update(zip(rows.tolist(), values, strict=True))
    return subjects


def _unchanged(
    panel: Panel, index: int, subject: RunValue, first: FirstLook, settings: VerdictSettings
) -> SeriesVerdict | None:
    """The verdict on one whose statuses say nothing; None unless it is UNCHANGED."""
    noise = settings.noise(panel.keys[index].timer)
    verdict, reason = first_verdict(first, noise, beside=False)
    if verdict is not Verdict.UNCHANGED:
        return None
    return SeriesVerdict(
        series=panel.outline(index),
        subject=subject,
        verdict=verdict,
        reasons=(reason,),
        estimate=first.estimate,
    )


def _judged(
    panel: Panel,
    indices: NDArray[np.int64],
    runs: NDArray[np.int64],
    rows: NDArray[np.int64],
    windows: _Windows,
    firsts: Sequence[FirstLook | None],
    settings: VerdictSettings,
    require_confirmation: bool,
) -> list[SeriesVerdict]:
    """The verdicts of those whose values are looked at."""
    shortened = [
        Series(key=whole.key, identity=whole.identity, values=values)
        for whole, values in zip(
            (panel.outline(index) for index in indices.tolist()),
            panel.values(indices, windows.needed[rows]),
            strict=True,
        )
    ]
    beside = {run: settings.has_reference or was_beside(panel, run) for run in set(runs.tolist())}
    looks = []
    for row, run, series in zip(rows.tolist(), runs.tolist(), shortened, strict=True):
        first, subject = firsts[row], series.values[-1]
        if is_candidate(first, subject, beside[run]):
            second = look_of_night(first, subject, timed_runs(series, subject), settings)
            looks.append((first, second))
    limit = alarm_limit(looks)
    verdicts = [
        judge_series(
            series,
            series.values[-1],
            settings,
            Night(firsts[row], limit, beside[run]),
            require_confirmation,
        )
        for row, run, series in zip(rows.tolist(), runs.tolist(), shortened, strict=True)
    ]
    return [
        replace(verdict, series=panel.outline(index))
        for verdict, index in zip(verdicts, indices.tolist(), strict=True)
    ]


def _all_windows(
    panel: Panel, chosen: NDArray[np.int64], at: NDArray[np.int64], settings: VerdictSettings
) -> _Windows:
    parts = [
        _windows(panel, chosen[start : start + _CHUNK], at[start : start + _CHUNK], settings)
        for start in range(0, len(chosen), _CHUNK)
    ]
    return _Windows(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _Windows.__slots__)
    )


def _windows(
    panel: Panel, chosen: NDArray[np.int64], at: NDArray[np.int64], settings: VerdictSettings
) -> _Windows:
    rows = np.arange(len(chosen))
    status, log_s = panel.status[chosen], panel.log_s[chosen]
    earlier = comparable(panel, chosen, at)
    timed = earlier & ~np.isnan(log_s)
    known = _last(earlier & (status != _THROTTLED), settings.window)
    baseline = _last(timed, settings.window)
    judged = np.zeros_like(earlier)
    judged[rows, at] = True
    is_timed = ~np.isnan(log_s[rows, at])
    is_plain = (
        is_timed
        & (panel.num_confirmations[chosen, at] == 0)
        & known.any(axis=1)
        & ~(known & ~_WORKS[status]).any(axis=1)
    )
    newest = panel.num_runs - 1 - timed[:, ::-1].argmax(axis=1)
    return _Windows(
        log_s=np.where((timed | judged) & is_timed[:, None], log_s, np.nan),
        is_plain=is_plain,
        needed=known | baseline | _last(timed, LEVEL_RUNS) | judged,
        baseline_runs=baseline.sum(axis=1),
        before=status[rows, newest].astype(np.int64),
    )


def _last(mask: Bools, count: int) -> Bools:
    """The last `count` of each row that are true."""
    from_the_end = np.cumsum(mask[:, ::-1], axis=1, dtype=np.int32)[:, ::-1]
    return np.asarray(mask & (from_the_end <= count))
