"""`attnbench dashboard`: write the static pages from what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit


def dashboard(
    results: ResultsOption = None,
    site: Annotated[
        Path | None, typer.Option(help="Folder for the pages. Default: settings.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Which pages are shown. Default: default.toml in the dashboards folder."),
    ] = None,
    run: Annotated[
        str, typer.Option(help="Run the overview judges. Default: the newest not published.")
    ] = "",
    format: FormatOption = Format.TABLE,
) -> None:
    """Write the pages; they open from disk, with no server. Prints where index.html is."""
    from attnbench.cli.page_values import page_values, watch_of
    from attnbench.dashboard import load_pages, read_matrix, render
    from attnbench.history import judge
    from attnbench.history.acknowledge import load_acknowledgements
    from attnbench.history.alarms import alarms_of
    from attnbench.history.panel import Panel
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    settings = load_settings()
    if results is not None:
        settings = replace(settings, results=results)
    folder = ResultsFolder(settings.results)
    panel = Panel.of(folder)
    judgement = judge(panel, run or None)
    shard = str(folder.header(judgement.run.run_id).options.get("shard", ""))
    entries = load_acknowledgements(settings.acknowledgements)
    alarms = alarms_of(judgement, panel, entries, stale_nights=settings.stale_nights)
    judgement = replace(judgement, shard=shard, alarms=alarms)
    if shard:
        judgement = replace(judgement, dropped=())
    pages = load_pages(config, settings.dashboards)
    index = render(
        panel,
        panel.runs,
        judgement,
        site if site is not None else settings.site,
        matrix=read_matrix(settings.matrix_file),
        pages=pages,
        ceilings=folder.ceilings(),
        watch=watch_of(folder, panel, entries),
        **page_values(folder, panel, settings, pages.runs),
    )
    emit([{"page": str(index), "runs": panel.num_runs, "series": panel.num_series}], format)
