"""The noise of real benchmarks, which the other scripts here put their steps into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Relative sizes of the steps that are put in.
STEPS = (0.02, 0.03, 0.05, 0.10)

#: Series with at most this robust cv are called steady.
STEADY_CV = 0.005

_SMOOTHED = 21


def residuals(path: Path) -> list[Floats]:
    """Log seconds of each series, oldest first, less their running median over 21 commits.

    `path`: Parquet with the columns series, commit_time_ms and seconds.
    """
    import pandas as pd

    table = pd.read_parquet(path, columns=["series", "commit_time_ms", "seconds"])
    found = []
    for _, rows in table.sort_values("commit_time_ms", kind="stable").groupby("series"):
        logs = np.log(rows["seconds"].to_numpy(dtype=np.float64))
        padded = np.pad(logs, _SMOOTHED // 2, mode="reflect")
        found.append(logs - np.median(sliding_window_view(padded, _SMOOTHED), axis=1))
    return found


def robust_cv(noise: Floats) -> float:
    """Scaled median absolute deviation: the standard deviation without the odd runs."""
    return float(1.4826 * np.median(np.abs(noise)))
