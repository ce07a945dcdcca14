"""The nightly path to asv: our history, written as asv results, so that `asv publish` shows it.

Two kinds of series per suite, metric and method (timer, L2 state, execution):

- `...rollup` over phase, backend and dtype: all points of a suite as one number (`rollup.roll_up`);
- `...points` over workload and backend: sentinel points, each with its samples.

One asv file per commit, stack and device class. asv knows commits only, so a stack is a parameter
of its graphs: a new torch starts a new line and is never drawn as the fault of a commit.

Over the commits of a manifest repository, one per stack, it is the other way round: one line, with
every run under its stack's commit, whatever code it was measured with.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from attnbench.asv_bridge import asv_api
from attnbench.asv_bridge.grid import backend_label
from attnbench.asv_bridge.rollup import roll_up
from attnbench.history.stacks import Stack, stack_key

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "run_id",
    "point_id",
    "workload",
    "backend",
    "variant",
    "suite",
    "phase",
    "dtype",
    "metric",
    "samples",
    "bytes_moved",
    "timer",
    "l2_state",
    "execution",
    "protocol_version",
    "started_at",
    "device_kind",
    "device_name",
    "device_class",
    "compute_capability",
    "stack",
    "stack_id",
    "driver_version",
    "cuda_version",
    "container_digest",
    "commit",
    "commit_time",
)

#: What `measure.environment.read_commit` appends when the package's files differ from the commit.
_DIRTY = "+dirty"


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """What an export wrote. `left_out`: run id -> why the run has no place on a commit axis."""

    files: tuple[Path, ...]
    series: int
    commits: int
    left_out: Mapping[str, str]


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    """One asv result file. `environment` is a line of its own in the graphs."""

    device_class: str
    commit: str
    environment: str


class _Axis(Protocol):
    """Where a row is drawn."""

    def no_place(self, row: Mapping[str, Any]) -> str:
        """Why the row has no place; "": it has one."""
        ...

    def place(self, row: Mapping[str, Any]) -> _Place: ...

    def commit_time(self, row: Mapping[str, Any]) -> datetime: ...

    def params(self, row: Mapping[str, Any]) -> dict[str, str]:
        """asv's parameters of the graphs."""
        ...


class _CommitAxis:
    """Under the commit of the code."""

    def no_place(self, row: Mapping[str, Any]) -> str:
        if not row["commit"] or row["commit_time"] is None:
            return "no commit is known"
        return _of_local_edits(row)

    def place(self, row: Mapping[str, Any]) -> _Place:
        return _Place(row["device_class"], row["commit"], f"stack-{_stack_key(row)}")

    def commit_time(self, row: Mapping[str, Any]) -> datetime:
        at: datetime = row["commit_time"]
        return at

    def params(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {"stack": _stack_label(row)}


class _StackAxis:
    """Under the manifest repository's commit of the stack."""

    #: One for all: a line goes on from stack to stack.
    ENVIRONMENT = "stacks"

    def __init__(self, stacks: Iterable[Stack]) -> None:
        self._stacks = {(stack.device_class, stack.key): stack for stack in stacks}

    def no_place(self, row: Mapping[str, Any]) -> str:
        if (row["device_class"], _stack_key(row)) not in self._stacks:
            return "its stack is not in the manifest repository (attnbench manifest write)"
        return _of_local_edits(row)

    def _stack(self, row: Mapping[str, Any]) -> Stack:
        return self._stacks[row["device_class"], _stack_key(row)]

    def place(self, row: Mapping[str, Any]) -> _Place:
        return _Place(row["device_class"], self._stack(row).commit, self.ENVIRONMENT)

    def commit_time(self, row: Mapping[str, Any]) -> datetime:
        return self._stack(row).first_measured

    def params(self, row: Mapping[str, Any]) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one run says of one point and metric: its replicates' samples together."""

    suite: str
    workload: str
    label: str
    phase: str
    dtype: str
    bytes_moved: int
    samples: tuple[float, ...]


_Readings = dict[_Place, dict[str, _Reading]]  # place -> point id -> reading


def export_to_asv(
    table: pa.Table,
    runs: Collection[str] | None,
    asv_results_dir: Path,
    stacks: Sequence[Stack] | None = None,
) -> ExportOutcome:
    """Write `table`'s history as asv results. Writing the same table again changes no byte.

    Args:
        table: rows of `store.ResultsFolder.table`, with at least `COLUMNS`.
        runs: ids of the runs to write; None: all.
        asv_results_dir: asv's `results_dir`. What developers' suites left there stays.
        stacks: those of a manifest repository (`history.manifest.stacks_of`): each run goes under
            its stack's commit. None: under the commit of the code.

    The sentinels of a suite are, of each phase and dtype, the workload that moves most bytes.
    Only the newest measuring protocol in the table is written; where a commit was measured twice on
    one stack, each point is read from the newest run that timed it.
    """
    axis: _Axis = _CommitAxis() if stacks is None else _StackAxis(stacks)
    rows, left_out = _placed_rows(table, runs, axis)
    places = {axis.place(row): row for row in rows}
    series: dict[str, asv_api.TrackedSeries] = {}
    values: dict[_Place, dict[str, Sequence[float | Sequence[float] | None]]] = defaultdict(dict)
    for (suite, metric, method, protocol), of_series in sorted(_by_series(rows).items()):
        name = f"nightly.{suite}.{metric}.{method}"
        readings = _newest_readings(of_series, axis)
        version = f"protocol-{protocol}"
        for one, of_place in (
            _rollup_series(name, version, readings),
            _point_series(name, version, readings),
        ):
            series[one.name] = one
            for place, points in of_place.items():
                values[place][one.name] = points
    files = []
    if series:
        files.append(asv_api.save_benchmarks(asv_results_dir, series))
    for device_class, row in sorted({p.device_class: r for p, r in places.items()}.items()):
        files.append(asv_api.save_machine(asv_results_dir, device_class, _machine_facts(row)))
    for place, found in sorted(values.items()):
        row = places[place]
        files.append(
            asv_api.save_commit(
                asv_results_dir,
                series,
                asv_api.CommitResults(
                    machine=place.device_class,
                    commit=place.commit,
                    commit_time=axis.commit_time(row).astimezone(UTC),
                    environment=place.environment,
                    params=axis.params(row),
                    started_at=row["started_at"].astimezone(UTC),
                    values=found,
                ),
            )
        )
    if stacks is not None:
        known = {stack.commit for stack in stacks}
        asv_api.remove_commits(asv_results_dir, _StackAxis.ENVIRONMENT, known)
    return ExportOutcome(
        tuple(files), len(series), len({place.commit for place in values}), left_out
    )


def _placed_rows(
    table: pa.Table, runs: Collection[str] | None, axis: _Axis
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Timed rows of suites with a place, oldest first, and why other runs are left out."""
    rows = []
    left_out: dict[str, str] = {}
    ordered = table.select(COLUMNS).sort_by([("started_at", "ascending"), ("run_id", "ascending")])
    for row in ordered.to_pylist():
        if runs is not None and row["run_id"] not in runs:
            continue
        if why := axis.no_place(row):
            left_out[row["run_id"]] = why
        elif row["suite"] and row["samples"]:
            rows.append(row)
    newest = max((row["protocol_version"] for row in rows), default=0)
    for row in rows:
        if row["protocol_version"] != newest:
            left_out[row["run_id"]] = f"protocol {row['protocol_version']}, newer is {newest}"
    return [row for row in rows if row["protocol_version"] == newest], left_out


def _of_local_edits(row: Mapping[str, Any]) -> str:
    return "its files differed from the commit" if row["commit"].endswith(_DIRTY) else ""


def _by_series(
    rows: Iterable[dict[str, Any]],
) -> dict[tuple[str, str, str, int], list[dict[str, Any]]]:
    """Rows by what may be drawn together: suite, metric, method and protocol."""
    groups = defaultdict(list)
    for row in rows:
        method = "_".join(
            word for word in (row["timer"], row["l2_state"], row["execution"]) if word
        )
        groups[row["suite"], row["metric"], method, row["protocol_version"]].append(row)
    return groups


def _newest_readings(rows: Iterable[dict[str, Any]], axis: _Axis) -> _Readings:
    """Each point's samples at each place, from the newest run that has it. Rows oldest first."""
    runs: dict[tuple[_Place, str], str] = {}
    replicates: dict[tuple[_Place, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (axis.place(row), row["point_id"])
        if runs.get(key) != row["run_id"]:
            runs[key], replicates[key] = row["run_id"], []
        replicates[key].append(row)
    readings: _Readings = defaultdict(dict)
    for (place, point), found in replicates.items():
        row = found[-1]
        readings[place][point] = _Reading(
            suite=row["suite"],
            workload=row["workload"],
            label=backend_label(row["backend"], row["variant"]),
            phase=row["phase"],
            dtype=row["dtype"],
            bytes_moved=row["bytes_moved"] or 0,
            samples=tuple(itertools.chain.from_iterable(r["samples"] for r in found)),
        )
    return readings


_OfPlace = dict[_Place, Sequence[float | Sequence[float] | None]]


def _rollup_series(
    name: str, version: str, readings: _Readings
) -> tuple[asv_api.TrackedSeries, _OfPlace]:
    groups: dict[tuple[str, str, str], dict[_Place, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for place, points in readings.items():
        for point, reading in points.items():
            cell = (reading.phase, reading.label, reading.dtype)
            groups[cell][place][point] = median(reading.samples)
    axes = tuple(tuple(sorted({cell[axis] for cell in groups})) for axis in range(3))
    rolled = {cell: _roll_up_places(found) for cell, found in groups.items()}
    series = asv_api.TrackedSeries(
        name=f"{name}.rollup",
        description="Geometric mean of the medians of all points of the suite, in seconds.",
        version=version,
        param_names=("phase", "backend", "dtype"),
        params=axes,
    )
    cells = list(itertools.product(*axes))
    return series, {
        place: [rolled.get((p, b, d), {}).get(place) for p, b, d in cells] for place in readings
    }


def _roll_up_places(found: Mapping[_Place, Mapping[str, float]]) -> dict[_Place, float]:
    """Roll up one device class at a time: a point's usual level is a fact of a device."""
    rolled: dict[_Place, float] = {}
    for device_class in {place.device_class for place in found}:
        of_device = {place: p for place, p in found.items() if place.device_class == device_class}
        keys = {f"{place.commit} {place.environment}": place for place in of_device}
        for key, seconds in roll_up({key: of_device[place] for key, place in keys.items()}).items():
            rolled[keys[key]] = seconds
    return rolled


def _point_series(
    name: str, version: str, readings: _Readings
) -> tuple[asv_api.TrackedSeries, _OfPlace]:
    seen = [reading for points in readings.values() for reading in points.values()]
    chosen = _heaviest(seen)
    backends = tuple(sorted({r.label for r in seen if r.workload in chosen}))
    series = asv_api.TrackedSeries(
        name=f"{name}.points",
        description="Median of the samples of one point, in seconds.",
        version=version,
        param_names=("workload", "backend"),
        params=(tuple(chosen), backends),
    )
    found: _OfPlace = {}
    for place, points in readings.items():
        samples = {(r.workload, r.label): r.samples for r in points.values()}
        found[place] = [samples.get((w, b)) for w, b in itertools.product(chosen, backends)]
    return series, found


def _heaviest(seen: Iterable[_Reading]) -> list[str]:
    """Of each phase and dtype the workload that moves most bytes: the least noisy to watch."""
    best: dict[tuple[str, str], tuple[int, str]] = {}
    for reading in seen:
        key = (reading.phase, reading.dtype)
        best[key] = max(best.get(key, (-1, "")), (reading.bytes_moved, reading.workload))
    return sorted({text for _, text in best.values()})


def _machine_facts(row: Mapping[str, Any]) -> dict[str, str]:
    return {"arch": row["compute_capability"] or row["device_kind"], "cpu": row["device_name"]}


def _stack_label(row: Mapping[str, Any]) -> str:
    """`torch-2.13.0 1a2b3c4d`: readable, and different for different stacks."""
    versions = dict(entry.split("==", 1) for entry in row["stack"] or () if "==" in entry)
    torch = f"torch-{versions['torch']} " if "torch" in versions else ""
    stack, dash, machine = _stack_key(row).partition("-")
    return f"{torch}{stack[:8]}{dash}{machine}"


def _stack_key(row: Mapping[str, Any]) -> str:
    return stack_key(
        row["stack_id"], row["driver_version"], row["cuda_version"], row["container_digest"]
    )
