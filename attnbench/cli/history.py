"""`attnbench compare` and `attnbench history`: what changed between two sides, and over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.history.comparison import ComparedSeries
    from attnbench.history.runs import RunSummary
    from attnbench.history.series import Axis, Series
    from attnbench.history.series_verdict import SeriesVerdict
    from attnbench.store import ResultsFolder

MetricOption = Annotated[
    list[str] | None,
    typer.Option(help="Metric to look at; repeat for several. Default: attention."),
]


def compare(
    a: Annotated[str, typer.Argument(help="Baseline: a run id, commit or stack id, or a prefix.")],
    b: Annotated[str, typer.Argument(help="What is compared with it, named the same way.")],
    metric: MetricOption = None,
    all: Annotated[bool, typer.Option("--all", help="Also list what did not change.")] = False,
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Compare two runs, commits or stacks, point by point. Exit 1: B is slower somewhere."""
    from attnbench.history.comparison import compare as compare_sides
    from attnbench.history.rule import Verdict, VerdictSettings
    from attnbench.history.verdict import NEEDED_COLUMNS

    table = _folder(results).table(NEEDED_COLUMNS)
    found = compare_sides(table, a, b, VerdictSettings(metrics=_metrics(metric)))
    for side in (found.a, found.b):
        newest = side.runs[-1]
        note(
            f"{side.text}: {side.kind}, {len(side.runs)} run(s), newest {newest.run_id}, "
            f"commit {newest.commit[:12] or 'unknown'}, {newest.device_class}"
        )
    if found.environment:
        note(f"stack differs: {found.environment.text}")
    for titles, text in ((found.only_a, a), (found.only_b, b)):
        if titles:
            note(f"{len(titles)} points only in {text}: {'; '.join(titles[:3])}" + _more(titles))
    rows = [r for r in found.rows if all or r.verdict is not Verdict.UNCHANGED]
    if len(rows) < len(found.rows):
        note(f"{len(found.rows) - len(rows)} of {len(found.rows)} unchanged (--all lists them)")
    emit([_compared_row(row) for row in rows], format, COMPARE_COLUMNS)
    raise typer.Exit(found.exit_code)


COMPARE_COLUMNS = (
    "verdict",
    "change",
    "interval",
    "backend",
    "workload",
    "metric",
    "how",
    "a_us",
    "b_us",
    "a_status",
    "b_status",
    "reasons",
    "note",
)
HISTORY_COLUMNS = (
    "verdict",
    "change",
    "interval",
    "backend",
    "workload",
    "metric",
    "how",
    "device",
    "runs",
    "latest_us",
    "status",
    "since",
    "reasons",
)
_READ_TOGETHER = 512
"""Series whose values are held at once: every run is read once for so many."""

LEVEL_COLUMNS = ("backend", "workload", "metric", "how", "device")


def history(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; repeat for several.")
    ] = None,
    workload: Annotated[
        str, typer.Option(help="Only workloads whose text contains this, e.g. 16q1s4k.")
    ] = "",
    by: Annotated[
        str,
        typer.Option(
            help="series: one line each with its verdict; commit or stack: one per level; "
            "backend: the best of each workload, and by how much."
        ),
    ] = "series",
    metric: MetricOption = None,
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """List every series with the verdict on its newest run, its levels, or the best backends."""
    from attnbench.history.best import BEST_COLUMNS, best_backends, best_row
    from attnbench.history.night import judge_newest
    from attnbench.history.panel import Panel
    from attnbench.history.rule import VerdictSettings
    from attnbench.history.series import Axis

    if by not in ("series", "backend", *Axis):
        raise UsageError(f"--by {by!r} is not known; use one of series, commit, stack, backend")
    if by == "backend" and metric:
        raise UsageError("--by backend compares metric attention; leave out --metric beside it")
    settings = VerdictSettings(metrics=_metrics(metric))
    panel = Panel.of(_folder(results))
    every = panel.with_metrics(settings.metrics).tolist()
    backends = {b.upper() for b in backend or ()}
    chosen = [
        index
        for index in every
        if (not backends or panel.outline(index).identity["backend"] in backends)
        and workload in panel.outline(index).identity["workload"]
    ]
    if not chosen:
        known = ", ".join(sorted({panel.outline(i).identity["backend"] for i in every})) or "none"
        note(f"no series of {len(every)} match; backends stored: {known}")
    if by == "series":
        verdicts = judge_newest(panel, chosen, settings)
        emit([verdict_row(v) for v in verdicts], format, HISTORY_COLUMNS)
    elif by == "backend":
        bests = best_backends(panel.all_series(chosen))
        emit([best_row(best) for best in bests], format, BEST_COLUMNS)
    else:
        axis = Axis(by)
        runs = {run.run_id: run for run in panel.runs}
        rows: list[dict[str, Any]] = []
        for start in range(0, len(chosen), _READ_TOGETHER):
            for series in panel.all_series(chosen[start : start + _READ_TOGETHER]):
                rows += _level_rows(series, axis, runs)
        columns = (*LEVEL_COLUMNS, str(axis), *_LEVEL_VALUES[axis])
        emit(rows, format, columns)


def _folder(results: Path | None) -> ResultsFolder:
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    return ResultsFolder(results if results is not None else load_settings().results)


def _metrics(chosen: list[str] | None) -> tuple[str, ...]:
    from attnbench.store.record import Metric

    known = [str(metric) for metric in Metric]
    for name in chosen or ():
        if name not in known:
            raise UsageError(f"--metric {name!r} is not known; use one of {', '.join(known)}")
    return tuple(chosen) if chosen else (str(Metric.ATTENTION),)


def _identity(series: Series) -> dict[str, Any]:
    from attnbench.dashboard.data import how_text

    variant = series.identity["variant"]
    return {
        "backend": f"{series.identity['backend']}{f':{variant}' if variant else ''}",
        "workload": series.identity["workload"],
        "metric": series.key.metric,
        "how": how_text(series),
        "device": series.key.device_class,
    }


def _change(found: Any) -> dict[str, str]:
    from attnbench.history.wording import interval_text, percent

    if found is None:
        return {"change": "", "interval": ""}
    text = percent(found.ratio)
    return {"change": text, "interval": interval_text(found).removeprefix(text).strip()}


def _compared_row(row: ComparedSeries) -> dict[str, Any]:
    return {
        "verdict": str(row.verdict),
        **_change(row.estimate),
        **_identity(row.series),
        "a_us": _microseconds(row.a_s),
        "b_us": _microseconds(row.b_s),
        "a_status": row.a_status and str(row.a_status),
        "b_status": row.b_status and str(row.b_status),
        "reasons": [str(reason) for reason in row.reasons],
        "note": row.note,
    }


def verdict_row(verdict: SeriesVerdict) -> dict[str, Any]:
    """A verdict as a line of `HISTORY_COLUMNS`."""
    from attnbench.history.wording import level_text

    return {
        "verdict": str(verdict.verdict),
        **_change(verdict.estimate),
        **_identity(verdict.series),
        "runs": len(verdict.series.values),
        "latest_us": _microseconds(verdict.subject.median_s),
        "status": str(verdict.subject.status),
        "since": level_text(verdict.since) if verdict.since else "",
        "reasons": [str(reason) for reason in verdict.reasons],
    }


#: After the level's name.
_LEVEL_VALUES = {
    "commit": ("first_run", "runs", "status", "median_us", "change"),
    "stack": ("first_run", "last_run", "runs", "status", "median_us", "change", "changed"),
}


def _level_rows(series: Series, axis: Axis, runs: Mapping[str, RunSummary]) -> list[dict[str, Any]]:
    from attnbench.history.runs import environment_change
    from attnbench.history.wording import percent

    rows = []
    before: float | None = None
    before_run: RunSummary | None = None
    for level in series.levels(axis):
        median = level.median_s
        change = percent(median / before) if median is not None and before else ""
        before = median or before
        run = runs[level.values[0].run_id]
        changed = environment_change(before_run, run) if before_run else None
        before_run = run
        rows.append(
            {
                **_identity(series),
                # A stack in full, for `attnbench compare`.
                str(axis): level.label[:12] if axis == "commit" else level.label,
                "first_run": f"{level.started_at:%Y-%m-%d %H:%M}",
                "last_run": f"{level.values[-1].started_at:%Y-%m-%d %H:%M}",
                "runs": len(level.values),
                "status": str(level.values[-1].status),
                "median_us": _microseconds(median),
                "change": change,
                "changed": changed.text if changed else "",
            }
        )
    return rows


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _more(titles: tuple[str, ...]) -> str:
    return f" and {len(titles) - 3} more" if len(titles) > 3 else ""
