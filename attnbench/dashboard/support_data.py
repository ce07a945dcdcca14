"""What worked where, and since when: backends by (shape, dtype, features) over runs.

A cell is all series of one backend, device and group of workloads; its state in a run is the
gravest of their statuses. States are kept as stretches of runs, so a cell that never changed is one
entry however long the history is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnbench.dashboard.data import backend_name, group_of
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.series import GRAVITY
from attnbench.history.wording import status_reasons
from attnbench.store.record import Status

#: What is the same to a person who asks what works: the measured point ran and was right.
_WORKS = (Status.OK, Status.NOISY, Status.UNTIMED, Status.THROTTLED)

#: Reasons of one stretch that are shown.
_REASONS = 3

_STATE = np.array([0 if status in _WORKS else code for code, status in enumerate(GRAVITY)], np.int8)


def support_data(panel: Panel, metrics: Collection[str] = ("attention",)) -> dict[str, Any]:
    """Every cell with its stretches, oldest first.

    A stretch is `[first run, last run, status, series in it, series that are so, reasons, id]`,
    the counts of its last run; `reasons` and `id` are of one of its series, where it does not work.
    Runs that did not plan the cell are in no stretch, and end none.
    """
    members: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index in panel.with_metrics(metrics).tolist():
        series = panel.outline(index)
        members[series.key.device_class, group_of(series), backend_name(series)].append(index)
    cells = []
    wanted: dict[int, list[tuple[list[Any], int]]] = defaultdict(list)
    for (device, group, backend), own in sorted(members.items()):
        states = np.where(panel.status[own] == NOT_PLANNED, NOT_PLANNED, _STATE[panel.status[own]])
        stretches = _stretches(states)
        for stretch in stretches:
            first, code = stretch[0], stretch[2]
            worst = own[int(np.flatnonzero(states[:, first] == code)[0])]
            stretch[2] = "OK" if code == 0 else str(GRAVITY[code])
            stretch.append(panel.ids[worst])
            if code:
                wanted[first].append((stretch, worst))
        cells.append({"device": device, "group": group, "backend": backend, "stretches": stretches})
    for run, places in wanted.items():
        chosen = np.array(sorted({index for _, index in places}), np.int64)
        values = dict(zip(chosen.tolist(), panel.values_of_run(chosen, run), strict=True))
        for stretch, index in places:
            stretch[5] = list(status_reasons(values[index])[:_REASONS])
    newest: dict[str, int] = {}
    for number, one in enumerate(panel.runs):
        if not panel.is_published[number]:
            newest[one.device_class] = number
    return {"cells": cells, "newest": newest}


def _stretches(states: NDArray[np.int8]) -> list[list[Any]]:
    """Stretches of one cell, of which `states` are [num_members, num_runs]."""
    planned = states != NOT_PLANNED
    runs = np.flatnonzero(planned.any(axis=0))
    worst = states.max(axis=0)[runs]
    starts = np.flatnonzero(np.concatenate(([True], worst[1:] != worst[:-1])))
    ends = np.concatenate((starts[1:], [len(runs)])) - 1
    return [
        [
            int(runs[start]),
            int(runs[end]),
            int(worst[start]),
            int(planned[:, runs[end]].sum()),
            int((states[:, runs[end]] == worst[start]).sum()),
            [],
        ]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
