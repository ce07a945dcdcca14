"""`attnbench nightly`: did last night's commits or packages make any kernel slower?"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.history import HISTORY_COLUMNS, verdict_row
from attnbench.cli.manifest import record_stacks
from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.cli.sweeping import L2_HELP, LOCK_HELP, RATED_HELP, SHARD_HELP, TIMER_HELP

if TYPE_CHECKING:
    from attnbench.cli.sweeping import Sweep
    from attnbench.history import Judgement
    from attnbench.history.panel import Panel
    from attnbench.history.rule import VerdictSettings
    from attnbench.measure import PlannedPoint
    from attnbench.measure.confirming import Confirmed

REFERENCE_HELP = (
    "Python of another environment that has the build before: it takes turns with this one when "
    "what looks slower is measured again. Default: settings."
)
CONFIRM_HELP = "Measure at most so many points again, the worst of each backend and phase first."


def nightly(
    ctx: typer.Context,
    preset: Annotated[
        str, typer.Option(help="Preset of the suites: smoke, nightly, full. Default: settings.")
    ] = "",
    suite: Annotated[
        list[str] | None, typer.Option(help="Only this suite; repeat for several. Default: all.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Only this backend, NAME or NAME:variant; repeat for several."),
    ] = None,
    timer: Annotated[str, typer.Option(help=TIMER_HELP)] = "",
    l2: Annotated[list[str] | None, typer.Option(help=L2_HELP)] = None,
    lock_clocks: Annotated[
        float | None, typer.Option(metavar="MHZ", help=LOCK_HELP, show_default=False)
    ] = None,
    rated_clock: Annotated[
        float | None, typer.Option(metavar="MHZ", help=RATED_HELP, show_default=False)
    ] = None,
    replicates: Annotated[
        int | None, typer.Option(help="Fresh processes that measure each point. Default: settings.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds of samples per point. Default: settings.")
    ] = None,
    fake_slowdown: Annotated[
        list[str] | None,
        typer.Option(help="BACKEND=FACTOR the fake timer multiplies with; for rehearsals."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="PYTHON", help=REFERENCE_HELP, show_default=False)
    ] = None,
    confirm_at_most: Annotated[
        int | None, typer.Option(metavar="POINTS", help=CONFIRM_HELP + " Default: settings.")
    ] = None,
    shard: Annotated[str, typer.Option(help=SHARD_HELP)] = "",
    results: ResultsOption = None,
    site: Annotated[
        Path | None, typer.Option(help="Folder for the pages. Default: settings.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="Go on with this stopped run (its id, or `last`), as planned then.")
    ] = "",
    format: FormatOption = Format.TABLE,
) -> None:
    """Measure the suites, store, judge against earlier runs, confirm what looks slower, render."""
    from attnbench.cli.page_values import page_values, watch_of
    from attnbench.cli.sweeping import (
        Sweep,
        check_slowdown,
        choose_suites,
        clock_hz,
        measure_options,
        requested_backends,
    )
    from attnbench.dashboard import load_pages, render, write_matrix
    from attnbench.errors import AttnBenchError, ExitCode
    from attnbench.history import judge, summary_markdown, summary_text
    from attnbench.history.acknowledge import load_acknowledgements
    from attnbench.history.alarms import alarms_of
    from attnbench.history.panel import Panel
    from attnbench.history.rule import VerdictSettings
    from attnbench.history.summary import causes_of
    from attnbench.measure import make_plan
    from attnbench.measure.shard import take_shard
    from attnbench.selection import current_device
    from attnbench.selection.matrix import matrix
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    settings = load_settings()
    if results is not None:
        settings = replace(settings, results=results)
    if site is not None:
        settings = replace(settings, site=site)
    known = load_acknowledgements(settings.acknowledgements)  # a mistake in it costs no night
    folder = ResultsFolder(settings.results)
    if resume:
        sweep = Sweep.resumed(ctx, folder, resume)
    else:
        device = current_device()
        options = measure_options(
            settings, device, timer, l2 or [], replicates, budget, None, fake_slowdown or []
        )
        backends = backend or requested_backends(settings)
        suites = choose_suites(settings, suite or [])
        whole = make_plan(suites, preset or settings.preset, backends, device)
        check_slowdown(options, whole)
        plan = take_shard(whole, shard)
        options = replace(
            options,
            shard=shard,
            locked_clock_hz=clock_hz("--lock-clocks", lock_clocks),
            rated_clock_hz=clock_hz("--rated-clock", rated_clock),
            reference=_program(settings.reference if reference is None else reference),
            confirm_points=(
                settings.confirm_points if confirm_at_most is None else confirm_at_most
            ),
        )
        sweep = Sweep.planned(folder, plan, options, device)
    with sweep.held() as sweep:
        other = _Other.asked(sweep)
        judging = VerdictSettings(has_reference=bool(other.python))
        duration_s = sweep.measure("measuring").duration_s
        planned = [point.point_id for point in sweep.plan]
        run_id = sweep.header.run_id
        panel = Panel.of(folder)
        judgement = judge(panel, run_id, judging, planned=planned)
        again = _points_again(sweep, panel, judgement)
        if again:
            second = _second_look(sweep, again, judging, other.python)
            duration_s += second.duration_s
            other = other.after(second)
            panel = Panel.of(folder)
            # By what is stored, as whenever it is judged again.
            judgement = judge(panel, run_id, planned=planned)
    points = {point.point_id: point.to_json() for point in sweep.plan}
    alarms = alarms_of(judgement, panel, known, stale_nights=settings.stale_nights, points=points)
    judgement = replace(judgement, alarms=alarms)
    if sweep.options.shard:
        judgement = replace(judgement, dropped=(), shard=sweep.options.shard)

    cells = [cell.row() for cell in matrix()]
    write_matrix(settings.matrix_file, cells)
    facts: dict[str, Any] = {
        "pages": os.path.relpath(settings.site / "index.html"),
        "duration_s": duration_s,
        "commits_since": _commits_since(judgement),
        "reference": other.text,
        "causes": causes_of(judgement, panel.runs, Path.cwd()),
    }
    markdown = summary_markdown(judgement, **facts)
    codes = [judgement.exit_code]
    try:
        pages = load_pages(folder=settings.dashboards)
        render(
            panel,
            panel.runs,
            judgement,
            settings.site,
            matrix=cells,
            pages=pages,
            summary=markdown,
            ceilings=folder.ceilings(),
            watch=watch_of(folder, panel, known),
            **page_values(folder, panel, settings, pages.runs),
        )
    except AttnBenchError as error:
        # What the night found is worth more than its pages.
        note(f"attnbench: error: no pages: {error}")
        codes.append(error.exit_code)
    record_stacks(settings, panel.runs)
    if format is Format.TABLE:
        print(summary_text(judgement, color=sys.stdout.isatty(), **facts))
    elif format is Format.MARKDOWN:
        print(markdown)
    else:
        emit([verdict_row(v) for v in judgement.verdicts], format, HISTORY_COLUMNS)
    raise typer.Exit(ExitCode.join(*codes))


@dataclass(frozen=True, slots=True)
class _Other:
    """The build before: its Python, "" where there is none, and what the summary says of it."""

    python: str = ""
    text: str = ""

    @classmethod
    def asked(cls, sweep: Sweep) -> _Other:
        """It may have gone, or be of another machine: the night goes on without it, and says so."""
        from attnbench.errors import AttnBenchError
        from attnbench.measure.reference import check_reference

        python = sweep.options.reference
        if not python:
            return cls()
        try:
            facts = check_reference(python, sweep.environment)
        except AttnBenchError as error:
            note(f"attnbench: warning: {error}; this night goes on without it")
            return cls(text=f"none: {error}")
        return cls(python, f"{facts.title(sweep.environment)}, in turn with what looked slower")

    def after(self, second: Confirmed) -> _Other:
        trouble = f"; missed rounds: {second.trouble}" if second.trouble else ""
        return replace(self, text=self.text + trouble)


def _points_again(sweep: Sweep, panel: Panel, judgement: Judgement) -> list[PlannedPoint]:
    """What is measured again. A night that was stopped goes on with what it had begun to."""
    from attnbench.history.rounds import begun_points, points_to_confirm

    at_most = sweep.options.confirm_points
    begun = begun_points(panel, sweep.header.run_id)
    chosen = set(points_to_confirm(judgement, begun, at_most))
    if fresh := len(chosen - set(begun)):
        note(f"{fresh} points look slower: measuring them again in fresh processes")
    if more := len(set(judgement.flagged_points()) - chosen):
        note(f"{more} more do, and stay undecided: --confirm-at-most is {at_most}")
    return [point for point in sweep.plan if point.point_id in chosen]


def _second_look(
    sweep: Sweep, points: list[PlannedPoint], settings: VerdictSettings, python: str
) -> Confirmed:
    from attnbench.cli.sweeping import progress
    from attnbench.measure.confirming import Subject, confirm

    subject = Subject(
        folder=sweep.folder,
        header=sweep.header,
        options=sweep.options,
        device=sweep.device,
        environment=sweep.environment,
    )
    with progress("confirming") as report:
        return confirm(subject, points, settings, python, report, note)


def _program(text: str) -> str:
    """A path as one that holds from every folder, links left alone; a name as it is."""
    return str(Path(text).expanduser().absolute()) if "/" in text else text


def _commits_since(judgement: Judgement) -> int | None:
    from attnbench.measure.environment import count_commits

    if judgement.previous is None:
        return None
    return count_commits(judgement.previous.commit, judgement.run.commit)
