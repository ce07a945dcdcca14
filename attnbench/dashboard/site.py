"""Writes the pages: HTML from templates, data as scripts, plotly.js once."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from attnbench.dashboard import data
from attnbench.dashboard.overview import overview_context
from attnbench.dashboard.pages import PAGE_TITLES, Pages, write_text_atomically
from attnbench.dashboard.script import data_script
from attnbench.errors import DataError, InfrastructureError
from attnbench.history.rule import VerdictSettings
from attnbench.history.runs import RunSummary
from attnbench.history.series import Series, series_of
from attnbench.history.verdict import Judgement
from attnbench.store.ceilings import Ceilings
from attnbench.store.disk import write_error

if TYPE_CHECKING:
    import jinja2

UPGRADE_FILE = "upgrade.html"
"""The page that `attnbench upgrade --html` may have left in the folder; it gets a link."""

_ASSETS = ("common.js", "charts.js", "style.css")


def render(
    table: pa.Table,
    runs: Sequence[RunSummary],
    judgement: Judgement,
    out: Path,
    *,
    matrix: Sequence[Mapping[str, Any]] | None = None,
    pages: Pages | None = None,
    settings: VerdictSettings | None = None,
    summary: str | None = None,
    ceilings: Mapping[str, Ceilings] | None = None,
    published: Collection[str] = (),
) -> Path:
    """Write the pages of `table` into `out` and give the path of index.html.

    `table` has all columns of the record, `runs` is `runs_of(table)`; `matrix` is rows of the
    selection matrix (`attnbench matrix --format json`); `summary` is Markdown that is left beside
    index.html as summary.md; `ceilings` is `ResultsFolder.ceilings()`, `published` its
    `published_runs()`, which are marked. Files of an earlier rendering are replaced.
    Raises InfrastructureError on a full disk, DataError if `out` cannot be written.
    """
    pages = pages or Pages()
    settings = settings or VerdictSettings()
    every = series_of(table, published=published)
    try:
        index = _write(
            table,
            list(runs),
            judgement,
            out,
            every,
            matrix,
            pages,
            settings,
            ceilings or {},
            published,
        )
        if summary is not None:
            write_text_atomically(out / "summary.md", summary)
    except OSError as error:
        # Which errors mean a full disk is known in one place.
        if isinstance(write_error(out, error), InfrastructureError):
            raise InfrastructureError(
                f"{out}: the pages cannot be written ({error.strerror}); free some space there, "
                "then run attnbench dashboard"
            ) from error
        raise DataError(
            f"{out}: the pages cannot be written ({error.strerror}); give another --site"
        ) from error
    return index


def _write(
    table: pa.Table,
    runs: list[RunSummary],
    judgement: Judgement,
    out: Path,
    every: Sequence[Series],
    matrix: Sequence[Mapping[str, Any]] | None,
    pages: Pages,
    settings: VerdictSettings,
    ceilings: Mapping[str, Ceilings],
    published: Collection[str],
) -> Path:
    run_index = {run.run_id: number for number, run in enumerate(runs)}
    verdicts = data.verdicts_of(every, judgement, settings)
    scripts: dict[str, Any] = {
        "index": data.index_data(every, verdicts, pages.title),
        "runs": data.runs_data(runs, pages.runs, published),
    }
    if pages.shows("series"):
        for chunk, content in data.series_chunks(every, verdicts, run_index).items():
            scripts[f"series-{chunk or 'all'}"] = content
    if pages.shows("backends"):
        scripts["backends"] = data.backends_data(every, run_index, ceilings)
    if pages.shows("matrix"):
        scripts["matrix"] = [dict(row) for row in matrix or ()]
    if pages.shows("conditions"):
        for run in runs[-pages.runs :]:
            scripts[f"run-{run_index[run.run_id]}"] = data.conditions_data(table, run.run_id)
    _write_scripts(out / "data", scripts)
    _write_assets(out / "assets", pages)
    environment = jinja_environment()
    context = {
        "site": pages,
        "nav": [(_file_of(p), p, PAGE_TITLES[p]) for p in pages.pages]
        + [(file, "upgrade", "Upgrade") for file in (UPGRADE_FILE,) if (out / file).is_file()],
        "has_matrix": matrix is not None,
        **overview_context(judgement, runs, run_index, published),
    }
    for page in pages.pages:
        html = environment.get_template(f"{page}.html.j2").render(page=page, **context)
        (out / _file_of(page)).write_text(html, encoding="utf-8")
    return out / "index.html"


def _file_of(page: str) -> str:
    return "index.html" if page == "overview" else f"{page}.html"


def _write_scripts(folder: Path, scripts: Mapping[str, Any]) -> None:
    """Only our own files of an earlier rendering go: `out` may be anybody's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.js"):
        if old.stem.partition("-")[0] in ("index", "runs", "series", "backends", "matrix", "run"):
            old.unlink()
    for name, value in scripts.items():
        (folder / f"{name}.js").write_text(data_script(name, value), encoding="ascii")


def _write_assets(folder: Path, pages: Pages) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ours = resources.files("attnbench.dashboard") / "assets"
    for name in (*_ASSETS, *(f"{page}.js" for page in pages.pages)):
        (folder / name).write_bytes((ours / name).read_bytes())
    # Imported for its file only: plotly's Python side builds no figure here.
    with resources.as_file(resources.files("plotly") / "package_data" / "plotly.min.js") as script:
        target = folder / "plotly.min.js"
        if not target.exists() or target.stat().st_size != script.stat().st_size:
            shutil.copyfile(script, target)


def jinja_environment() -> jinja2.Environment:
    """Templates of the pages: everything is escaped, a value that is missing is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("attnbench.dashboard", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
