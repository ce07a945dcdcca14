"""What changed: series from stored rows, the verdict on a run, comparison, the ten-line summary.

Nothing here loads torch. `from attnbench.history import judge` loads pyarrow and numpy; importing
the package alone does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.history.comparison import Comparison as Comparison
    from attnbench.history.comparison import compare as compare
    from attnbench.history.rule import Reason as Reason
    from attnbench.history.rule import Verdict as Verdict
    from attnbench.history.rule import VerdictSettings as VerdictSettings
    from attnbench.history.runs import RunSummary as RunSummary
    from attnbench.history.runs import runs_of as runs_of
    from attnbench.history.series import Axis as Axis
    from attnbench.history.series import Series as Series
    from attnbench.history.series_rows import series_of as series_of
    from attnbench.history.series_verdict import SeriesVerdict as SeriesVerdict
    from attnbench.history.summary import summary_markdown as summary_markdown
    from attnbench.history.summary import summary_text as summary_text
    from attnbench.history.verdict import NEEDED_COLUMNS as NEEDED_COLUMNS
    from attnbench.history.verdict import Judgement as Judgement
    from attnbench.history.verdict import judge as judge

_HOMES = {
    "Axis": "series",
    "Comparison": "comparison",
    "Judgement": "verdict",
    "NEEDED_COLUMNS": "verdict",
    "Reason": "rule",
    "RunSummary": "runs",
    "Series": "series",
    "SeriesVerdict": "series_verdict",
    "Verdict": "rule",
    "VerdictSettings": "rule",
    "compare": "comparison",
    "judge": "verdict",
    "runs_of": "runs",
    "series_of": "series_rows",
    "summary_markdown": "summary",
    "summary_text": "summary",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
