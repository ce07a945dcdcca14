"""The axes of every suite's asv benchmarks, fixed once per asv command.

asv names a measurement by its index into the parameter lists, and each commit's environment
imports the suites again with that commit's own attnbench. Were the lists computed there, a commit
that knows one backend more would shift every index, silently. So the lists are computed once, by
the attnbench that starts asv, and handed to every environment as a file.

No torch: every asv child reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from attnbench.errors import UsageError
from attnbench.store.record import PROTOCOL_VERSION, short_hash

#: Names the grid file in the environment of everything asv starts.
GRID_VARIABLE = "ATTNBENCH_ASV_GRID"
#: The preset `asv run` measures: smoke (default), nightly, full.
PRESET_VARIABLE = "ATTNBENCH_PRESET"
#: The timer `asv run` measures with; unset: the device's default. `fake` makes everything exact.
TIMER_VARIABLE = "ATTNBENCH_TIMER"

#: asv starts one process per combination, and publishing is quadratic within one benchmark.
MAX_COMBINATIONS = 1000

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Axes:
    """One suite's parameter lists: canonical workload texts, and backends (`NAME[:variant]`)."""

    workloads: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """What one asv command measures. `options` are fields of `measure.MeasureOptions`."""

    preset: str
    device: str
    results: str  # absolute path of the results folder the sweeps write
    options: Mapping[str, str | int | float] = field(default_factory=dict)
    suites: Mapping[str, Axes] = field(default_factory=dict)

    def axes(self, suite: str) -> Axes:
        """The suite's axes; empty if the grid does not have the suite."""
        return self.suites.get(suite, Axes())

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8"
        )


def read_grid(path: Path) -> Grid:
    """Read a grid file. Raises UsageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != _FORMAT:
            raise UsageError(
                f"{path}: grid format {value['format']} is not {_FORMAT}, the one this commit's "
                "attnbench reads; measure commits that agree on it"
            )
        return Grid(
            preset=value["preset"],
            device=value["device"],
            results=value["results"],
            options=value["options"],
            suites={
                name: Axes(tuple(axes["workloads"]), tuple(axes["backends"]))
                for name, axes in value["suites"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be read as a grid ({error}); start asv as `attnbench asv run`"
        ) from error


def current_grid() -> Grid | None:
    """The grid of the asv command that started this process; None outside asv.

    Raises UsageError inside asv when there is none: the plug-in was not loaded.
    """
    if path := os.environ.get(GRID_VARIABLE):
        return read_grid(Path(path))
    if os.environ.get("ASV"):
        raise UsageError(
            f"{GRID_VARIABLE} is not set: asv was started without attnbench's plug-in; start it as "
            '`attnbench asv run`, or add "plugins": [".attnbench.asv_bridge.plugin"] to '
            "asv.conf.json"
        )
    return None


def check_size(suite: str, axes: Axes) -> None:
    """Raises UsageError when a suite has more combinations than asv handles well."""
    combinations = len(axes.workloads) * len(axes.backends)
    if combinations > MAX_COMBINATIONS:
        raise UsageError(
            f"suite {suite}: {len(axes.workloads)} workloads x {len(axes.backends)} backends are "
            f"{combinations} asv combinations, more than {MAX_COMBINATIONS}; choose a smaller "
            f"preset, e.g. {PRESET_VARIABLE}=smoke, or measure it with `attnbench nightly`"
        )


def grid_id(suite: str) -> str:
    """asv's `version` of a suite's benchmarks: what makes old and new numbers incomparable.

    The suite's name and the measuring protocol, and deliberately not the list of points: asv
    matches results by parameter text, so a grid that grows keeps the history of what it had.
    """
    return f"{suite}-{short_hash('grid', suite, str(PROTOCOL_VERSION))}"


def backend_label(backend: str, variant: str) -> str:
    """`NAME` or `NAME:variant`, as typed after `--backend`."""
    return f"{backend}:{variant}" if variant else backend
