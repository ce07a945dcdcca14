"""What was seen: measurements go into a journal, and from there into Parquet files that are read.

`from attnbench.store import ResultsFolder` loads pyarrow; importing the package alone, or only
`attnbench.store.record`, does not: the processes that measure and `attnbench --help` need neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.store.check import CheckReport as CheckReport
    from attnbench.store.check import Problem as Problem
    from attnbench.store.header import RunHeader as RunHeader
    from attnbench.store.header import new_run_id as new_run_id
    from attnbench.store.record import Measurement as Measurement
    from attnbench.store.record import Metric as Metric
    from attnbench.store.record import Status as Status
    from attnbench.store.results import ResultsFolder as ResultsFolder
    from attnbench.store.run import Run as Run
    from attnbench.store.runs import RunInfo as RunInfo
    from attnbench.store.schema import SCHEMA_VERSION as SCHEMA_VERSION

_HOMES = {
    "CheckReport": "check",
    "Measurement": "record",
    "Metric": "record",
    "Problem": "check",
    "ResultsFolder": "results",
    "Run": "run",
    "RunHeader": "header",
    "RunInfo": "runs",
    "SCHEMA_VERSION": "schema",
    "Status": "record",
    "new_run_id": "header",
}

__all__ = [
    "SCHEMA_VERSION",
    "CheckReport",
    "Measurement",
    "Metric",
    "Problem",
    "ResultsFolder",
    "Run",
    "RunHeader",
    "RunInfo",
    "Status",
    "new_run_id",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
