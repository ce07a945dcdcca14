"""What the compare page reads: how each series was measured, and one file of times per run.

The page loads the runs of its two sides by script tags and does the arithmetic of
`attnbench compare` itself (`assets/compare-math.js`; a test holds the two against each other).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnbench.dashboard.json_text import array_text, value_texts
from attnbench.history.panel import NOT_PLANNED, Panel
from attnbench.history.rule import MIN_RUNS, PRIOR_RUNS, VerdictSettings
from attnbench.history.series import GRAVITY
from attnbench.history.series_verdict import is_supported

#: Fields of a series' key that keep two values of a point apart, in the order they are named.
_WAYS = ("timer", "l2_state", "execution", "device_class", "protocol_version")

_FORM = "1"  # of the files of times: raised when what is in them changes


def compare_data(panel: Panel, settings: VerdictSettings, first_run: int) -> dict[str, Any]:
    """The rule's numbers, and per series (in the order of the index) how it was measured.

    Runs from `first_run` on have a file of times.
    """
    points: dict[str, int] = {}
    timers = {key.timer: settings.noise(key.timer) for key in panel.keys}
    return {
        "first_run": first_run,
        "confidence": settings.confidence,
        "prior_runs": PRIOR_RUNS,
        "min_runs": MIN_RUNS,
        "statuses": [str(status) for status in GRAVITY],
        "supported": [is_supported(status) for status in GRAVITY],
        "timed": [status.is_timed for status in GRAVITY],
        "timers": {
            name: {
                "floor": noise.floor,
                "spread": noise.spread,
                "min_replicates": noise.min_replicates,
            }
            for name, noise in timers.items()
        },
        "ways": list(_WAYS),
        "series": {
            "point": [points.setdefault(key.point_id, len(points)) for key in panel.keys],
            **{name: _words([str(getattr(key, name)) for key in panel.keys]) for name in _WAYS},
        },
    }


def times_stamp(panel: Panel, run: int) -> str:
    """Changes when the file of a run would; "" where that is not known."""
    stamp = panel.stamp(run)
    if not stamp:
        return ""
    # The file is by position in the index, and rows without a time join series known by others.
    known = hashlib.sha256("\n".join((_FORM, *panel.ids)).encode()).hexdigest()
    return f"{known}:{stamp}"


def times_text(panel: Panel, run: int) -> str:
    """JSON of a run: per series its status (a position in `statuses`, -1: not planned) and the
    seconds of its processes; `again` has those that were measured again, by position."""
    own = panel.own_rows(run)
    here = own >= 0
    digest = panel.digest(run, ("replicates", "confirmations"))
    digest = digest.take(pa.array(np.maximum(own, 0))) if digest.num_rows else digest
    status = panel.status[:, run]
    timed = here & (status != NOT_PLANNED)
    first = pc.if_else(pa.array(timed), value_texts(digest["replicates"]), "0")
    again = pc.list_value_length(digest["confirmations"]).combine_chunks()
    repeated = np.flatnonzero(np.asarray(pc.fill_null(again, 0)) * timed).tolist()
    seconds = value_texts(digest["confirmations"].take(pa.array(repeated, pa.int64()))).to_pylist()
    listed = ",".join(f'"{at}":{text}' for at, text in zip(repeated, seconds, strict=True))
    codes = array_text(pa.array(status.astype(np.int64)).cast(pa.string()))
    return f'{{"status":{codes},"first":{array_text(first)},"again":{{{listed}}}}}'


def _words(values: list[str]) -> dict[str, Any]:
    words = list(dict.fromkeys(values))
    position = {word: number for number, word in enumerate(words)}
    return {"words": words, "at": [position[value] for value in values]}
