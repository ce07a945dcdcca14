"""Computes the grid of an asv command: `python -m attnbench.asv_bridge.plan_grid`.

A process of its own, because it imports torch to ask each backend about the device, and asv's main
process forks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnbench.asv_bridge.grid import (
    PRESET_VARIABLE,
    TIMER_VARIABLE,
    Axes,
    Grid,
    backend_label,
    check_size,
)
from attnbench.errors import AttnBenchError, UsageError
from attnbench.settings import load_settings
from attnbench.workload import Suite, load_suites
from attnbench.workload.suite import PRESETS


def plan_grid(suites: Mapping[str, Suite], preset: str, timer: str, results: Path) -> Grid:
    """Ask the planner which workloads and backends `preset` of each suite means on this device.

    `timer` "": the device's default.

    Raises UsageError for an unknown preset or timer, or a suite too large for asv.
    """
    if preset not in PRESETS:
        raise UsageError(f"{PRESET_VARIABLE}={preset}: no such preset; use {', '.join(PRESETS)}")
    from attnbench.measure import MeasureOptions, make_plan
    from attnbench.measure.options import default_timer
    from attnbench.selection import current_device

    settings = load_settings()
    device = current_device()
    options = MeasureOptions(
        timer=timer or default_timer(device.kind),
        replicates=1 if timer == "fake" else settings.replicates,
        budget_s=settings.budget_s,
        target_rel_ci=settings.target_rel_ci,
        timeout_s=settings.timeout_s,
    )
    axes = {}
    for name, suite in sorted(suites.items()):
        plan = make_plan([suite], preset, (), device)
        axes[name] = Axes(
            tuple(dict.fromkeys(point.workload.text for point in plan)),
            tuple(dict.fromkeys(backend_label(p.backend, p.variant) for p in plan)),
        )
        check_size(name, axes[name])
    return Grid(
        preset=preset,
        device=str(device),
        results=str(results.resolve()),
        options={
            "timer": options.timer,
            "replicates": options.replicates,
            "budget_s": options.budget_s,
            "target_rel_ci": options.target_rel_ci,
            "timeout_s": options.timeout_s,
        },
        suites=axes,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the grid file; errors are one line on stderr and exit 2."""
    parser = argparse.ArgumentParser(prog="plan_grid", description=__doc__)
    parser.add_argument("--suites", type=Path, required=True, help="folder of suite files")
    parser.add_argument("--results", type=Path, required=True, help="results folder of the sweeps")
    parser.add_argument("--out", type=Path, required=True, help="grid file to write")
    given = parser.parse_args(arguments)
    try:
        grid = plan_grid(
            load_suites(given.suites),
            os.environ.get(PRESET_VARIABLE, "smoke"),
            os.environ.get(TIMER_VARIABLE, ""),
            given.results,
        )
    except AttnBenchError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    grid.save(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
