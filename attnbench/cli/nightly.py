"""`attnbench nightly`: did last night's commits or packages make any kernel slower?"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.history import HISTORY_COLUMNS, verdict_row
from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.cli.sweeping import L2_HELP, LOCK_HELP, RATED_HELP, SHARD_HELP, TIMER_HELP

if TYPE_CHECKING:
    from attnbench.history import Judgement
    from attnbench.store import ResultsFolder

#: A flagged point is measured again by at least so many fresh processes.
MIN_CONFIRMATIONS = 3


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
    from attnbench.cli.page_values import page_values
    from attnbench.cli.sweeping import (
        Sweep,
        choose_suites,
        clock_hz,
        measure_options,
        requested_backends,
    )
    from attnbench.dashboard import load_pages, render, write_matrix
    from attnbench.history import judge, summary_markdown, summary_text
    from attnbench.history.panel import Panel
    from attnbench.history.series import FIRST_CONFIRMATION
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
        plan = take_shard(make_plan(suites, preset or settings.preset, backends, device), shard)
        options = replace(
            options,
            shard=shard,
            locked_clock_hz=clock_hz("--lock-clocks", lock_clocks),
            rated_clock_hz=clock_hz("--rated-clock", rated_clock),
        )
        sweep = Sweep.planned(folder, plan, options, device)
    with sweep.held() as sweep:
        duration_s = sweep.measure("measuring").duration_s
        planned = [point.point_id for point in sweep.plan]
        run_id = sweep.header.run_id
        panel = Panel.of(folder)
        judgement = judge(panel, run_id, planned=planned)
        # A night that was stopped while it confirmed goes on with what it had begun to confirm.
        flagged = set(judgement.flagged_points()) | _confirmed_points(folder, run_id)
        if flagged:
            note(f"{len(flagged)} points look slower: measuring them again in fresh processes")
            again = [point for point in sweep.plan if point.point_id in flagged]
            confirm = replace(
                sweep.options,
                first_replicate=FIRST_CONFIRMATION,
                replicates=max(MIN_CONFIRMATIONS, sweep.options.replicates),
            )
            duration_s += sweep.again(again, confirm).measure("confirming").duration_s
            panel = Panel.of(folder)
            judgement = judge(panel, run_id, planned=planned)
    if sweep.options.shard:
        judgement = replace(judgement, dropped=(), shard=sweep.options.shard)

    cells = [cell.row() for cell in matrix()]
    write_matrix(settings.matrix_file, cells)
    facts: dict[str, Any] = {
        "pages": os.path.relpath(settings.site / "index.html"),
        "duration_s": duration_s,
        "commits_since": _commits_since(judgement),
    }
    markdown = summary_markdown(judgement, **facts)
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
        **page_values(folder, settings, pages.runs),
    )
    if format is Format.TABLE:
        print(summary_text(judgement, color=sys.stdout.isatty(), **facts))
    elif format is Format.MARKDOWN:
        print(markdown)
    else:
        emit([verdict_row(v) for v in judgement.verdicts], format, HISTORY_COLUMNS)
    raise typer.Exit(judgement.exit_code)


def _confirmed_points(folder: ResultsFolder, run_id: str) -> set[str]:
    from attnbench.history.series import FIRST_CONFIRMATION

    rows = folder.table(["point_id", "replicate"], where={"run_id": run_id}).to_pylist()
    return {row["point_id"] for row in rows if row["replicate"] >= FIRST_CONFIRMATION}


def _commits_since(judgement: Judgement) -> int | None:
    from attnbench.measure.environment import count_commits

    if judgement.previous is None:
        return None
    return count_commits(judgement.previous.commit, judgement.run.commit)
