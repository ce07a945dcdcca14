"""What `run` and `nightly` share: measuring a plan into a run, with progress on a terminal."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from attnbench.cli.output import note

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.measure import MeasureOptions, PlannedPoint, SweepOutcome
    from attnbench.settings import Settings
    from attnbench.store import ResultsFolder
    from attnbench.store.header import RunHeader
    from attnbench.store.record import Measurement

Report = Callable[[Sequence["Measurement"], int, int], None]


def sweep(
    folder: ResultsFolder,
    header: RunHeader,
    plan: Sequence[PlannedPoint],
    options: MeasureOptions,
    device: Device,
    *,
    resume: bool,
    label: str,
) -> tuple[SweepOutcome, list[Measurement]]:
    """Measure `plan` into the run of `header` and seal it. Returns the outcome and the new rows."""
    from attnbench.measure import run_sweep

    announce(plan, options, device)
    rows: list[Measurement] = []
    with folder.open_run(header, resume=resume) as run, progress(label) as report:
        for orphan in run.orphans:
            note(f"sealed run {orphan.run_id}, which had been stopped: {orphan.num_rows} rows")
            if orphan.set_aside is not None:
                note(f"  {len(orphan.corrupt_lines)} corrupt lines are kept in {orphan.set_aside}")

        def collect(new: Sequence[Measurement], done: int, total: int) -> None:
            rows.extend(new)
            report(new, done, total)

        outcome = run_sweep(plan, run, options, device, progress=collect)
        path = run.seal()
    again = f", {outcome.skipped} already there" if outcome.skipped else ""
    note(f"stored {path}: {outcome.measured} points{again}, {outcome.duration_s:.1f} s")
    return outcome, rows


def requested_backends(settings: Settings) -> list[str]:
    """The backend that the environment or attnbench.toml asks for; warns of ignored variables."""
    from attnbench.selection import find_request

    request = find_request(None, settings.backend, os.environ)
    for warning in request.warnings:
        note(f"attnbench: warning: {warning}")
    if request.name:
        note(f"only {request.name}: {request.origin} asks for it")
    return [request.name] if request.name else []


def announce(plan: Sequence[PlannedPoint], options: MeasureOptions, device: Device) -> None:
    """Say what is about to be measured, and at most how long it samples."""
    backends = Counter(point.backend for point in plan)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(backends.items()))
    note(
        f"{len(plan)} points on {device}: {listed}; {options.replicates} replicate(s) each, "
        f"up to {options.budget_s:g} s of samples a point, timer {options.timer}"
    )


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """A progress bar on stderr when it is a terminal; nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda rows, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[point]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, point="")

        def report(rows: Sequence[Measurement], done: int, total: int) -> None:
            row = rows[0]
            bar.update(
                task,
                completed=done,
                total=total,
                point=f"{row.backend} {row.batch_spec} {row.status}",
            )

        yield report
