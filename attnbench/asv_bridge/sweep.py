"""`setup_cache`: one sweep of one suite, by the commit that is installed in asv's environment."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attnbench
from attnbench.asv_bridge.grid import Axes, Grid, backend_label
from attnbench.asv_bridge.suite_support import readings_file
from attnbench.errors import InfrastructureError, UsageError
from attnbench.store.record import Metric, Status

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.measure import MeasureOptions, PlannedPoint

#: The metrics a suite tracks.
METRICS = (Metric.ATTENTION, Metric.METADATA_BUILD, Metric.KV_CACHE_WRITE)

#: Statuses that are answers; any other says that the measurement failed.
_ANSWERS = (Status.OK, Status.NOISY, Status.UNTIMED, Status.UNSUPPORTED)


def sweep_suite(suite: str, grid: Grid, folder: Path) -> Path:
    """Measure the grid's points of `suite` into `grid.results` (Parquet, the truth).

    Leaves one small JSON file per metric in `folder`, which asv's children read without loading
    pyarrow once per parameter combination. Returns `folder`.

    Raises: InfrastructureError when the attnbench that runs is not the commit's, nothing of the
        grid exists at this commit, another sweep runs on the device, or every point failed: asv
        shows the suite as failed.
    """
    check_installed_commit()
    from attnbench.measure import run_sweep
    from attnbench.measure.device_lock import device_lock
    from attnbench.measure.environment import read_environment
    from attnbench.measure.header import new_header
    from attnbench.selection import resolve_device
    from attnbench.store import ResultsFolder

    device = resolve_device(grid.device)
    plan = plan_axes(suite, grid.axes(suite), device)
    if not plan:
        raise InfrastructureError(
            f"suite {suite}: this commit knows none of the grid's workloads and backends; measure "
            "newer commits"
        )
    options = read_options(grid)
    results = ResultsFolder(Path(grid.results))
    environment = read_environment(device)
    header = new_header(plan, options, environment)
    with device_lock(environment.device_uuid), results.open_run(header) as run:
        outcome = run_sweep(plan, run, options, device, environment)
        run.seal()
    columns = ["workload", "backend", "variant", "metric", "samples", "status", "reasons"]
    rows = results.table(columns, {"run_id": outcome.run_id}).to_pylist()
    failed = [row for row in rows if row["status"] not in _ANSWERS]
    if len(failed) == len(rows):
        raise InfrastructureError(
            f"suite {suite}: every point failed, the first with {_why(failed[0])}; see "
            f"`attnbench results query` on {grid.results}"
        )
    _write_readings(rows, folder)
    return folder


def check_installed_commit() -> None:
    """Under asv, the attnbench that runs must lie in asv's environment: else it is another commit.

    Raises InfrastructureError.
    """
    if os.environ.get("ASV_ENV_TYPE", "existing") == "existing":
        return
    package = Path(attnbench.__file__).resolve()
    if not package.is_relative_to(Path(sys.prefix).resolve()):
        raise InfrastructureError(
            f"asv measures commit {os.environ.get('ASV_COMMIT', '?')}, but {package} runs, outside "
            f"its environment {sys.prefix}; delete asv's env_dir and run it again"
        )


def plan_axes(suite: str, axes: Axes, device: Device) -> list[PlannedPoint]:
    """The points of `axes` this commit knows; one that it does not know stays without samples."""
    from attnbench.measure import plan_workloads
    from attnbench.measure.plan import resolve_backend
    from attnbench.workload import Workload

    workloads = []
    for text in axes.workloads:
        try:
            workloads.append(Workload.parse(text))
        except UsageError as error:
            print(f"attnbench: left out: {error}", file=sys.stderr)
    backends = []
    for label in axes.backends:
        try:
            resolve_backend(label, device)
        except (UsageError, InfrastructureError) as error:
            print(f"attnbench: left out: {error}", file=sys.stderr)
        else:
            backends.append(label)
    return plan_workloads(workloads, backends, device, suite) if backends else []


def read_options(grid: Grid) -> MeasureOptions:
    """The grid's options this commit's `MeasureOptions` has."""
    from attnbench.measure import MeasureOptions

    known = {field.name for field in fields(MeasureOptions)}
    values = {name: value for name, value in grid.options.items() if name in known}
    return MeasureOptions(**values)  # type: ignore[arg-type]


def _why(row: Mapping[str, Any]) -> str:
    return ": ".join([row["status"], "; ".join(row["reasons"] or ())]).rstrip(": ")


def _write_readings(rows: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Samples of a point's replicates together, or why there are none."""
    found: dict[str, dict[str, dict[str, list[float] | str]]] = {
        metric: defaultdict(dict) for metric in METRICS
    }
    for row in rows:
        if row["metric"] not in found:
            continue
        of_workload = found[row["metric"]][row["workload"]]
        label = backend_label(row["backend"], row["variant"])
        before = of_workload.get(label)
        if not row["samples"]:
            of_workload.setdefault(label, _why(row))
        elif isinstance(before, list):
            before.extend(row["samples"])
        else:
            of_workload[label] = list(row["samples"])
    for metric, readings in found.items():
        readings_file(folder, metric).write_text(json.dumps(readings), encoding="utf-8")
