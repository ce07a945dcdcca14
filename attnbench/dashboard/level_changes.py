"""Change points for the series page, kept between renderings: finding all takes seconds.

A series is looked at again when its newest runs have left its level, and in any case once in
`_TURNS` nights; the others keep what was found before, which a run more rarely changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnbench.history.change_points import MIN_CHANGE, ChangePoint, change_points_of_panel
from attnbench.history.panel import Panel

#: Beside the pages' data, and no page reads it.
FILE_NAME = "changes.json"

_TURNS = 16

#: Newest runs whose median is held against that of the `_LEVEL` before them.
_NEWEST = (3, 8)
_LEVEL = 12

#: Runs whose spread is the yardstick.
_SEEN = 48

#: How many standard deviations of the difference are no noise.
_FAR = 4.0

_FORM = "1"

#: `[first run of the new level, last sure one of the old, first sure one of the new, ratio, p]`.
Changes = dict[str, list[list[Any]]]


def level_changes(panel: Panel, folder: Path) -> Changes:
    """Series id -> its change points, runs by their number. Kept in `folder`; raises OSError."""
    path = folder / FILE_NAME
    own = np.where(panel.is_published, np.nan, panel.log_s)
    runs_before, known = _read(path, panel)
    # Python's hash of a text differs from process to process; the id is a hash already.
    turn = np.array([int(name[-4:], 16) for name in panel.ids], np.int64)
    is_due = (turn - runs_before) % _TURNS < panel.num_runs - runs_before
    is_new = np.array([name not in known for name in panel.ids], bool)
    chosen = np.flatnonzero(is_new | is_due | restless(own))
    found = change_points_of_panel(own[chosen])
    fresh = {
        panel.ids[index]: [_as_list(change) for change in changes]
        for index, changes in zip(chosen.tolist(), found, strict=True)
    }
    changes = {name: fresh[name] if name in fresh else known[name] for name in panel.ids}
    if stamp := _stamp(panel, panel.num_runs):
        kept = {"runs": panel.num_runs, "stamp": stamp, "changes": changes}
        path.write_text(json.dumps(kept, separators=(",", ":")), encoding="ascii")
    return changes


def restless(log_s: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[num_series]: whose newest values are not of the level before; `log_s` by runs, NaN: none."""
    newest_first = log_s[:, ::-1]
    order = np.argsort(np.isnan(newest_first), axis=1, kind="stable")
    values = np.take_along_axis(newest_first, order[:, :_SEEN], axis=1)
    found = np.zeros(len(values), bool)
    for count in _NEWEST:
        level = values[:, count : count + _LEVEL]
        # Two values have no spread; a series that short is looked at by its turn.
        rows = np.flatnonzero((~np.isnan(level)).sum(axis=1) > 2)
        if not len(rows):
            continue
        off = np.abs(np.median(values[rows, :count], axis=1) - np.nanmedian(level[rows], axis=1))
        # Of neighbours: a step among the values seen makes it no larger.
        steps = np.abs(np.diff(values[rows, count:], axis=1))
        spread = 1.4826 * np.nanmedian(steps, axis=1) / np.sqrt(2)
        # 1.2533: a median is so much less sure than a mean.
        sure = 1.2533 * spread * np.sqrt(1 / count + 1 / _LEVEL)
        found[rows] |= off > np.maximum(_FAR * sure, MIN_CHANGE)
    return found


def _as_list(change: ChangePoint) -> list[Any]:
    return [change.index, change.low, change.high, round(change.ratio, 6), float(f"{change.p:.2g}")]


def _read(path: Path, panel: Panel) -> tuple[int, Mapping[str, list[list[Any]]]]:
    """How many runs there were, and what was found in them; nothing where they are not the first
    of the panel's."""
    try:
        kept = json.loads(path.read_text(encoding="ascii"))
        if 0 < kept["runs"] <= panel.num_runs and kept["stamp"] == _stamp(panel, kept["runs"]):
            return kept["runs"], kept["changes"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, {}


def _stamp(panel: Panel, runs: int) -> str:
    """Of the first `runs` runs; "" where that is not known."""
    stamps = [panel.stamp(run) for run in range(runs)]
    if not all(stamps):
        return ""
    return hashlib.sha256("\n".join((_FORM, *stamps)).encode()).hexdigest()
