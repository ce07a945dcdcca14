"""Writes the pages: HTML from templates, data as scripts, plotly.js once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from attnbench.dashboard import data
from attnbench.dashboard.answers import Answers
from attnbench.dashboard.compare_data import compare_data, times_stamp, times_text
from attnbench.dashboard.data_files import DataFiles
from attnbench.dashboard.gate_page import gate_context
from attnbench.dashboard.late_levels import late_section
from attnbench.dashboard.level_changes import level_changes
from attnbench.dashboard.overview import overview_context, told_series
from attnbench.dashboard.pages import PAGE_TITLES, Pages, write_text_atomically
from attnbench.dashboard.script import to_json
from attnbench.dashboard.series_files import chunks_of, newer_files, older_files
from attnbench.dashboard.support_data import support_data
from attnbench.dashboard.watch import Watch
from attnbench.errors import DataError, InfrastructureError
from attnbench.history.panel import Panel
from attnbench.history.rule import VerdictSettings
from attnbench.history.runs import RunSummary
from attnbench.history.verdict import Judgement
from attnbench.store.ceilings import Ceilings
from attnbench.store.disk import write_error

if TYPE_CHECKING:
    import jinja2

UPGRADE_FILE = "upgrade.html"
"""The page that `attnbench upgrade --html` may have left in the folder; it gets a link."""

_DATA = (
    "index",
    "runs",
    "series",
    "values",
    "backends",
    "choices",
    "traffic",
    "matrix",
    "run",
    "compare",
    "times",
    "support",
    "gate",
    "asv",
)
_SCRIPTS = {
    "choices": ("choices.js", "choices-regret.js", "choices-advice.js"),
    "compare": ("compare.js", "compare-math.js"),
}
"""Scripts of a page that has more than the one of its name."""
_ASSETS = ("common.js", "charts.js", "tables.js", "stacks.js", "asv-link.js", "style.css")


def render(
    history: Panel | pa.Table,
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
    choices: Mapping[str, Any] | None = None,
    answers: Answers | None = None,
    watch: Watch | None = None,
) -> Path:
    """Write the pages of `history` into `out` and give the path of index.html.

    `history` is a panel, or a table with all columns of the record and `published`, the ids of its
    published runs, which are marked; `runs` are its runs, oldest first; `matrix` is rows of the
    selection matrix (`attnbench matrix --format json`); `summary` is Markdown that is left beside
    index.html as summary.md; `ceilings` is `ResultsFolder.ceilings()`; `choices` is who wins where
    and the default's regret (`attnbench.choose.maps`), `answers` what was saved of `itl` and
    `choose`, `watch` what is known beside the verdicts, with the gate's own record: where there is
    nothing of these, their pages are not written. Files of an earlier rendering are replaced; those
    of older values and of runs only where they would differ.
    Raises InfrastructureError on a full disk, DataError if `out` cannot be written.
    """
    watch = watch or Watch()
    optional = _optional(choices or {}, answers or Answers(), watch)
    pages = _with_content(pages or Pages(), optional)
    settings = settings or VerdictSettings()
    panel = history if isinstance(history, Panel) else Panel.of_table(history, published)
    try:
        index = _write(
            panel,
            list(runs),
            judgement,
            out,
            matrix,
            pages,
            settings,
            ceilings or {},
            optional,
            watch,
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
    panel: Panel,
    runs: list[RunSummary],
    judgement: Judgement,
    out: Path,
    matrix: Sequence[Mapping[str, Any]] | None,
    pages: Pages,
    settings: VerdictSettings,
    ceilings: Mapping[str, Ceilings],
    optional: Mapping[str, Mapping[str, Any]],
    watch: Watch,
) -> Path:
    run_index = {run.run_id: number for number, run in enumerate(runs)}
    published = {run.run_id for run, theirs in zip(runs, panel.is_published, strict=True) if theirs}
    first_shown = max(0, len(runs) - pages.runs)
    verdicts = data.verdicts_of(panel, judgement, settings)
    newest = data.newest_values(panel, verdicts)
    scripts: dict[str, Any] = {
        "index": data.index_data(panel, verdicts, newest, pages.title),
        "runs": data.runs_data(runs, pages.runs, published, watch.clocks),
    }
    if pages.shows("series"):
        scripts["asv"] = None  # asv's plug-in writes it where it puts these pages beside asv's
    if pages.shows("backends"):
        scripts["backends"] = data.backends_data(panel, newest, run_index, ceilings)
    if pages.shows("matrix"):
        scripts["matrix"] = [dict(row) for row in matrix or ()]
    if pages.shows("compare"):
        scripts["compare"] = compare_data(panel, settings, first_shown)
    if pages.shows("support"):
        scripts["support"] = support_data(panel, settings.metrics)
    scripts |= {name: value for name, value in optional.items() if pages.shows(name)}
    late = None
    _remove_left_over(out, pages)
    with DataFiles(out / "data", _DATA) as files, _one_beside() as beside:
        waited_for = [
            beside.submit(write, panel, files, run)
            for page, write in (("conditions", _write_conditions), ("compare", _write_times))
            if pages.shows(page)
            for run in range(first_shown, len(runs))
        ]
        for name, value in scripts.items():
            files.write(name, to_json(value))
        if pages.shows("series"):
            chunks = chunks_of(panel)
            split = [chunk for chunk in chunks if chunk.is_split]
            stale = [c for c in split if not files.keep(c.file("values"), c.stamp)]
            for name, text in older_files(stale, files.text):
                files.write(name, text)
            changes = level_changes(panel, out / "data")
            told = told_series(judgement)
            late = late_section(panel, verdicts, changes, settings, watch, told)
            heads = data.series_heads(panel, verdicts, run_index, changes)
            for name, text in newer_files(chunks, heads):
                files.write(name, text)
        for one in waited_for:
            one.result()
    _write_assets(out / "assets", pages)
    environment = jinja_environment()
    context = {
        "site": pages,
        "nav": [(_file_of(p), p, PAGE_TITLES[p]) for p in pages.pages]
        + [(file, "upgrade", "Upgrade") for file in (UPGRADE_FILE,) if (out / file).is_file()],
        "has_matrix": matrix is not None,
        **overview_context(judgement, panel, runs, run_index, published, watch, late),
    }
    if pages.shows("gate") and watch.record:
        context["gate"] = gate_context(watch.record, panel, runs)
    for page in pages.pages:
        html = environment.get_template(f"{page}.html.j2").render(page=page, **context)
        (out / _file_of(page)).write_text(html, encoding="utf-8")
    return out / "index.html"


@contextlib.contextmanager
def _one_beside() -> Iterator[ThreadPoolExecutor]:
    """One thread beside this one: reading and joining release the interpreter's lock."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool
        except BaseException:  # Ctrl-C too: nobody waits for what is left
            pool.shutdown(cancel_futures=True)
            raise


def _write_conditions(panel: Panel, files: DataFiles, run: int) -> None:
    if not files.keep(f"run-{run}", panel.stamp(run)):
        rows = panel.rows(run, data.CONDITION_COLUMNS)
        files.write(f"run-{run}", data.conditions_text(rows))


def _write_times(panel: Panel, files: DataFiles, run: int) -> None:
    if not files.keep(f"times-{run}", times_stamp(panel, run)):
        files.write(f"times-{run}", times_text(panel, run))


def _optional(
    choices: Mapping[str, Any], answers: Answers, watch: Watch
) -> dict[str, dict[str, Any]]:
    """Data of the pages that are there only where there is something to show."""
    shown = {name: list(choices.get(name, ())) for name in ("maps", "regret")}
    return {
        "choices": {**shown, "advice": list(answers.advice)},
        "traffic": {"answers": list(answers.traffic)},
        "gate": dict(watch.record or {}),
    }


def _with_content(pages: Pages, optional: Mapping[str, Mapping[str, Any]]) -> Pages:
    shown = [page for page in pages.pages if any(optional.get(page, {"": True}).values())]
    return replace(pages, pages=tuple(shown))


def _remove_left_over(out: Path, pages: Pages) -> None:
    """A page of an earlier rendering that has nothing to show any more."""
    for page in ("choices", "traffic", "gate"):
        if not pages.shows(page) and (out / "data" / f"{page}.js").is_file():
            (out / _file_of(page)).unlink(missing_ok=True)


def _file_of(page: str) -> str:
    return "index.html" if page == "overview" else f"{page}.html"


def _write_assets(folder: Path, pages: Pages) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ours = resources.files("attnbench.dashboard") / "assets"
    own = [name for page in pages.pages for name in _SCRIPTS.get(page, (f"{page}.js",))]
    for name in (*_ASSETS, *own):
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
