"""`attnbench nightly`: did last night's commits or packages make any kernel slower?"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.history import HISTORY_COLUMNS, verdict_row
from attnbench.cli.output import Format, FormatOption, emit, note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.history import Judgement
    from attnbench.settings import Settings
    from attnbench.workload import Suite

#: A flagged point is measured again by at least so many fresh processes.
MIN_CONFIRMATIONS = 3


def nightly(
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
    timer: Annotated[str, typer.Option(help="wall, or fake for exact made-up times.")] = "wall",
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
    results: Annotated[Path | None, typer.Option(help="Results folder. Default: settings.")] = None,
    site: Annotated[
        Path | None, typer.Option(help="Folder for the pages. Default: settings.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="Go on with this stopped run (its id, or `last`), as planned then.")
    ] = "",
    format: FormatOption = Format.TABLE,
) -> None:
    """Measure the suites, store, judge against earlier runs, confirm what looks slower, render."""
    from attnbench.cli.sweeping import requested_backends, sweep
    from attnbench.dashboard import load_pages, render
    from attnbench.history import judge, runs_of, summary_markdown, summary_text
    from attnbench.history.series import FIRST_CONFIRMATION
    from attnbench.measure import MeasureOptions, make_plan
    from attnbench.measure.header import new_header, read_header
    from attnbench.measure.options import parse_slowdown
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
    device = current_device()
    if resume:
        header = folder.header(resume)
        plan, options = read_header(header)
    else:
        options = MeasureOptions(
            timer=timer,
            replicates=replicates or settings.replicates,
            budget_s=budget or settings.budget_s,
            target_rel_ci=settings.target_rel_ci,
            timeout_s=settings.timeout_s,
            fake_slowdown=tuple(parse_slowdown(text) for text in fake_slowdown or ()),
        )
        backends = backend or requested_backends(settings)
        suites = _suites(settings, suite or [])
        plan = make_plan(suites, preset or settings.preset, backends, device)
        header = new_header(plan, options)
    outcome, _ = sweep(
        folder, header, plan, options, device, resume=bool(resume), label="measuring"
    )
    duration_s = outcome.duration_s
    planned = [point.point_id for point in plan]
    judgement = judge(folder.table(), header.run_id, planned=planned)
    if flagged := set(judgement.flagged_points()):
        note(f"{len(flagged)} points look slower: measuring them again in fresh processes")
        again = [point for point in plan if point.point_id in flagged]
        confirm = replace(
            options,
            first_replicate=FIRST_CONFIRMATION,
            replicates=max(MIN_CONFIRMATIONS, options.replicates),
        )
        outcome, _ = sweep(folder, header, again, confirm, device, resume=True, label="confirming")
        duration_s += outcome.duration_s
        judgement = judge(folder.table(), header.run_id, planned=planned)

    cells = [cell.row() for cell in matrix()]
    settings.matrix_file.write_text(json.dumps(cells, indent=1), encoding="utf-8")
    table = folder.table()
    pages = load_pages(folder=settings.dashboards)
    index = render(table, runs_of(table), judgement, settings.site, matrix=cells, pages=pages)
    facts: dict[str, Any] = {
        "pages": os.path.relpath(index),
        "duration_s": duration_s,
        "commits_since": _commits_since(judgement),
    }
    markdown = summary_markdown(judgement, **facts)
    (settings.site / "summary.md").write_text(markdown, encoding="utf-8")
    if format is Format.TABLE:
        print(summary_text(judgement, color=sys.stdout.isatty(), **facts))
    elif format is Format.MARKDOWN:
        print(markdown)
    else:
        emit([verdict_row(v) for v in judgement.verdicts], format, HISTORY_COLUMNS)
    raise typer.Exit(judgement.exit_code)


def _suites(settings: Settings, names: list[str]) -> list[Suite]:
    from attnbench.workload.suite import load_suites

    known = load_suites(settings.suites)
    for name in names:
        if name not in known:
            raise UsageError(f"--suite {name!r}: there is {', '.join(sorted(known)) or 'none'}")
    if not known:
        raise UsageError(f"no suites in {settings.suites}; write one, or run in a project that has")
    return [known[name] for name in names or sorted(known)]


def _commits_since(judgement: Judgement) -> int | None:
    from attnbench.measure.environment import count_commits

    if judgement.previous is None:
        return None
    return count_commits(judgement.previous.commit, judgement.run.commit)
