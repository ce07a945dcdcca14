"""What `run` and `nightly` share: measuring a plan into a run, with progress on a terminal."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.measure import MeasureOptions, PlannedPoint, SweepOutcome
    from attnbench.measure.environment import Environment
    from attnbench.settings import Settings
    from attnbench.store import ResultsFolder
    from attnbench.store.header import RunHeader
    from attnbench.store.record import Measurement
    from attnbench.workload import Suite

BackendOption = Annotated[
    list[str] | None,
    typer.Option(help="Only this backend, NAME or NAME:variant; repeat for several."),
]
PresetOption = Annotated[str, typer.Option(help="Preset of the suites: smoke, nightly, full.")]

TIMER_HELP = (
    "wall, event, graph, cupti_span, cupti_sum, or fake for exact made-up times. "
    "Default: wall on a CPU, event on a GPU."
)
L2_HELP = "State of a GPU's L2 cache, cold or hot; repeat for both. Default: cold."

LOCK_HELP = (
    "Hold the GPU's clock at this many MHz while measuring (needs root). Default: left alone."
)
RATED_HELP = (
    "Judge samples by this clock, in MHz, for a GPU whose clocks were lowered on purpose. "
    "Default: the device's highest."
)
SHARD_HELP = "Measure one of n disjoint parts of the plan, i/n, e.g. 2/4: one machine each."

Report = Callable[[Sequence["Measurement"], int, int], None]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A run about to be measured: what, how, on what, and where it is stored."""

    folder: ResultsFolder
    header: RunHeader
    plan: Sequence[PlannedPoint]
    options: MeasureOptions
    device: Device
    environment: Environment
    resume: bool

    @classmethod
    def planned(
        cls,
        folder: ResultsFolder,
        plan: Sequence[PlannedPoint],
        options: MeasureOptions,
        device: Device,
    ) -> Sweep:
        """A new run. Raises UsageError if there is nothing to measure."""
        from attnbench.measure.environment import read_environment
        from attnbench.measure.header import new_header

        if not plan:
            raise UsageError(
                f"nothing to measure: no backend of {device} takes these workloads, or the preset "
                "is empty; `attnbench backends` lists who runs here"
            )
        environment = read_environment(device)
        header = new_header(plan, options, environment)
        return cls(folder, header, plan, options, device, environment, resume=False)

    @classmethod
    def resumed(cls, ctx: typer.Context, folder: ResultsFolder, run_id: str) -> Sweep:
        """A run that was stopped, as it was planned. Raises UsageError for options beside it."""
        from attnbench.measure.environment import read_environment
        from attnbench.measure.header import check_same_environment, read_header
        from attnbench.selection import current_device

        refuse_beside(ctx, "--resume", allowed=("resume", "results", "site", "format"))
        header = folder.header(run_id)
        plan, options = read_header(header)
        device = current_device()
        environment = read_environment(device)
        check_same_environment(header, environment)
        return cls(folder, header, plan, options, device, environment, resume=True)

    def again(self, plan: Sequence[PlannedPoint], options: MeasureOptions) -> Sweep:
        """The same run with other points or options, to be gone on with."""
        return replace(self, plan=plan, options=options, resume=True)

    @contextmanager
    def held(self) -> Iterator[Sweep]:
        """The sweep on a device that is held: against other sweeps, and at the clock asked for.

        A new run's ceilings are measured here, on the same device in the same state.
        Raises InfrastructureError if another sweep holds it; see `locked_clocks` for the clock.
        """
        from attnbench.measure.ceilings import ceilings_of_run
        from attnbench.measure.device_lock import device_lock
        from attnbench.measure.gpu.locked_clocks import locked_clocks

        uuid, asked_hz = self.environment.device_uuid, self.options.locked_clock_hz
        locked = locked_clocks(uuid, asked_hz) if asked_hz else nullcontext(0.0)
        with device_lock(uuid), locked as locked_hz:
            held = replace(self, options=replace(self.options, locked_clock_hz=locked_hz))
            if not self.resume:
                ceilings, why_not = ceilings_of_run(self.plan, self.options, self.device)
                if why_not:
                    note(f"no percent of roofline in this run: {why_not}")
                held = replace(held, header=replace(self.header, ceilings=ceilings))
            yield held

    def measure(self, label: str) -> SweepOutcome:
        """Measure and seal. The device is `held`."""
        from attnbench.measure import run_sweep

        announce(self.plan, self.options, self.device)
        opened = self.folder.open_run(self.header, resume=self.resume)
        with opened as run, progress(label) as report:
            for orphan in run.orphans:
                note(f"sealed run {orphan.run_id}, which had been stopped: {orphan.num_rows} rows")
                if orphan.set_aside is not None:
                    note(f"  {len(orphan.corrupt_lines)} corrupt lines kept in {orphan.set_aside}")
            outcome = run_sweep(
                self.plan, run, self.options, self.device, self.environment, report, note
            )
            path = run.seal()
        if run.was_removed:
            note(f"attnbench: warning: {self.folder.path} was removed meanwhile; made again")
        again = f", {outcome.skipped} already there" if outcome.skipped else ""
        note(f"stored {path}: {outcome.measured} points{again}, {outcome.duration_s:.1f} s")
        if outcome.compiled.duration_s:
            note(f"of these, {outcome.compiled.duration_s:.1f} s compiling, before any timing")
        for point in outcome.quarantined:
            name = f"{point.backend}:{point.variant}".rstrip(":")
            note(
                f"failed twice: {name} {point.workload.text}; its row says how, to see it alone: "
                f"attnbench run '{point.workload.text}' --backend {name}"
            )
        return outcome


def refuse_beside(ctx: typer.Context, option: str, allowed: Container[str]) -> None:
    """Raises UsageError for options given on the command line that `option` would ignore."""
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            given = f"--{name.replace('_', '-')}" if parameter.param_type_name == "option" else name
            raise UsageError(f"{option} does not go with {given}; leave one of them out")


def measure_options(
    settings: Settings,
    device: Device,
    timer: str,
    l2: Sequence[str],
    replicates: int | None,
    budget: float | None,
    timeout: float | None,
    fake_slowdown: Sequence[str],
) -> MeasureOptions:
    """Flags over settings. Raises UsageError for a value that measures nothing."""
    from attnbench.measure import MeasureOptions
    from attnbench.measure.options import GPU_TIMERS, default_timer, parse_slowdown

    timer = timer or default_timer(device.kind)
    if timer in GPU_TIMERS and device.kind == "cpu":
        raise UsageError(
            f"--timer {timer} reads a GPU's clock, and this machine has none that torch can use; "
            "use --timer wall, or see `attnbench doctor`"
        )
    if l2 and timer not in GPU_TIMERS:
        raise UsageError(
            f"--l2 {l2[0]}: the timer {timer} knows nothing of a GPU's cache; leave --l2 out"
        )
    return MeasureOptions(
        timer=timer,
        l2_states=tuple(l2) or ("cold",),
        replicates=settings.replicates if replicates is None else replicates,
        budget_s=settings.budget_s if budget is None else budget,
        target_rel_ci=settings.target_rel_ci,
        timeout_s=settings.timeout_s if timeout is None else timeout,
        fake_slowdown=tuple(parse_slowdown(text) for text in fake_slowdown),
    )


def check_slowdown(options: MeasureOptions, plan: Sequence[PlannedPoint]) -> None:
    """Raises UsageError for a rehearsed slow-down that would slow nothing of `plan` down.

    `plan` is the whole one: of its shards, some may have no point of a backend.
    """
    from attnbench.workload.closest import did_you_mean

    known = sorted({point.backend for point in plan})
    given = Counter(name for name, _ in options.fake_slowdown)
    for name, factor in options.fake_slowdown:
        if given[name] > 1:
            raise UsageError(f"--fake-slowdown {name}: given twice; leave one of them out")
        if known and name not in known:
            raise UsageError(
                f"--fake-slowdown {name}={factor:g}: no point of this run is of it; "
                f"{did_you_mean(name, known)}"
            )


def clock_hz(option: str, mhz: float | None) -> float:
    """Megahertz of a command line in hertz; 0.0: not given. Raises UsageError."""
    if mhz is None:
        return 0.0
    if not 0 < mhz < 1e5:
        raise UsageError(f"{option} {mhz:g}: give a clock in MHz, e.g. 1500, or leave it out")
    return mhz * 1e6


def choose_suites(settings: Settings, names: Sequence[str]) -> list[Suite]:
    """The suites of the project called `names`; all of them for none. Raises UsageError."""
    from attnbench.workload.closest import did_you_mean
    from attnbench.workload.suite import load_suites

    known = load_suites(settings.suites)
    for name in names:
        if name not in known:
            raise UsageError(f"--suite {name!r} is not known; {did_you_mean(name, sorted(known))}")
    return [known[name] for name in names or sorted(known)]


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
