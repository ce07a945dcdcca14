"""What another version of one dependency does to each family of kernels, measured by turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from attnbench.errors import ExitCode
from attnbench.history.comparison import ComparedSeries, compare
from attnbench.history.rule import Estimate, Verdict, VerdictSettings
from attnbench.history.wording import interval_text
from attnbench.store import ResultsFolder
from attnbench.store.record import Status
from attnbench.upgrade.cost import CostVerdict, judge_ratio, weighted_ratio
from attnbench.workload import Workload

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Family:
    """One backend on both sides. `rows` are its points, the worst first.

    `ratio` is the mix's where batches were weighted; a suite has no mix, and is as bad as its worst
    point.
    """

    backend: str
    verdict: CostVerdict
    why: str
    rows: tuple[ComparedSeries, ...]
    ratio: Estimate | None = None

    @property
    def is_silent(self) -> bool:
        """Whether neither side can run or time it here, so that it says nothing."""
        quiet = (Status.UNSUPPORTED, Status.UNTIMED)
        return all(row.a_status in quiet and row.b_status == row.a_status for row in self.rows)


@dataclass(frozen=True, slots=True)
class DefaultChange:
    """A cell of our own selector's matrix that two commits answer differently."""

    cell: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class SidesReport:
    """Two sides laid side by side; `runs` are their run ids, empty where nothing was measured."""

    before: str
    after: str
    runs: tuple[str, str]
    families: tuple[Family, ...]
    environment: str = ""
    defaults: tuple[DefaultChange, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """1: a family is slower; 3: one is undecided, or a point has one side only."""
        judged = [family for family in self.families if not family.is_silent]
        verdicts = {family.verdict for family in judged or self.families}
        codes = [ExitCode.OK]
        if verdicts & {CostVerdict.SLOWER, CostVerdict.LOST}:
            codes.append(ExitCode.REGRESSION)
        if self.missing or verdicts & {CostVerdict.UNDECIDED, CostVerdict.NOT_MEASURED}:
            codes.append(ExitCode.UNDECIDED)
        return ExitCode.join(*codes)


def judge_sides(
    table: pa.Table,
    labels: tuple[str, str],
    runs: tuple[str, str],
    weights: Mapping[str, float] | None = None,
    settings: VerdictSettings | None = None,
) -> SidesReport:
    """Both runs' points, by family.

    Args:
        table: rows of both runs with `history.NEEDED_COLUMNS`.
        weights: of each workload's text in the user's mix; None: points of a suite, no mix.

    Raises DataError where the runs share no point, or measured none in the same way.
    """
    settings = settings or VerdictSettings()
    compared = compare(table, *runs, settings)
    by_backend: dict[str, list[ComparedSeries]] = {}
    for row in compared.rows:
        by_backend.setdefault(str(row.series.identity["backend"]), []).append(row)
    return SidesReport(
        *labels,
        runs,
        tuple(_family(name, rows, weights, settings) for name, rows in sorted(by_backend.items())),
        compared.environment.text if compared.environment else "",
        missing=(*compared.only_a, *compared.only_b),
    )


def _family(
    backend: str,
    rows: Sequence[ComparedSeries],
    weights: Mapping[str, float] | None,
    settings: VerdictSettings,
) -> Family:
    listed = tuple(rows)
    verdicts = {_point_verdict(row) for row in rows}
    if CostVerdict.LOST in verdicts:
        lost = [row for row in rows if _point_verdict(row) is CostVerdict.LOST]
        why = f"{lost[0].series.title} was {lost[0].a_status} and is {lost[0].b_status}"
        return Family(backend, CostVerdict.LOST, why, listed)
    timed = [row for row in rows if row.estimate is not None]
    untimed = [row for row in rows if row.estimate is None]
    if untimed:
        ended = Counter(f"{row.a_status}, {row.b_status}" for row in untimed)
        told = "; ".join(f"{number} ended as {status}" for status, number in ended.items())
    if not timed:
        return Family(backend, CostVerdict.NOT_MEASURED, told, listed)
    if weights is None:
        worst = next(one for one in _WORST_FIRST if one in verdicts)
        counts = Counter(str(_point_verdict(row)) for row in rows)
        why = ", ".join(f"{number} {name}" for name, number in counts.items())
        return Family(backend, worst, why, listed)
    if untimed:
        return Family(backend, CostVerdict.NOT_MEASURED, told, listed)
    seconds = []
    for row in timed:
        workload = Workload.parse(str(row.series.identity["workload"]))
        weight = weights[workload.text] * workload.shape.num_layers
        seconds.append(weight * (row.a_s or 0.0))
    ratio = weighted_ratio([row.estimate for row in timed if row.estimate], seconds)
    verdict, why = judge_ratio(ratio, timed[0].series.key.timer, settings)
    return Family(backend, verdict, why, listed, ratio)


#: What is said of several points: the first that is true of one of them.
_WORST_FIRST = (
    CostVerdict.LOST,
    CostVerdict.SLOWER,
    CostVerdict.UNDECIDED,
    CostVerdict.SAME,
    CostVerdict.FASTER,
    CostVerdict.NOT_MEASURED,
)

_OF_VERDICT = {
    Verdict.REGRESSION: CostVerdict.SLOWER,
    Verdict.IMPROVEMENT: CostVerdict.FASTER,
    Verdict.UNCHANGED: CostVerdict.SAME,
    Verdict.UNDECIDED: CostVerdict.UNDECIDED,
    Verdict.INVALID: CostVerdict.UNDECIDED,
}


def _point_verdict(row: ComparedSeries) -> CostVerdict:
    if row.verdict is Verdict.REGRESSION and row.estimate is None:
        return CostVerdict.LOST
    if row.estimate is None and row.verdict is Verdict.UNCHANGED:
        return CostVerdict.NOT_MEASURED
    return _OF_VERDICT[row.verdict]


def matrix_changes(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[DefaultChange, ...]:
    """Cells of both matrices whose backend differs; a cell that one side lacks is left out."""
    old = {_cell_name(row): row for row in before}
    return tuple(
        DefaultChange(name, str(old[name]["backend"]), str(row["backend"]))
        for row in after
        if (name := _cell_name(row)) in old and old[name]["backend"] != row["backend"]
    )


def _cell_name(row: Mapping[str, Any]) -> str:
    return f"{row['device']} {row['dtype']} {row['feature']}"


def read_rows(folder: ResultsFolder, runs: tuple[str, str]) -> pa.Table:
    """What `judge_sides` needs of both runs."""
    from attnbench.history import NEEDED_COLUMNS

    return folder.table(NEEDED_COLUMNS, {"run_id": list(runs)})


def family_rows(report: SidesReport) -> list[dict[str, Any]]:
    """One row a family, for a table or Markdown."""
    return [
        {
            "family": family.backend,
            "verdict": str(family.verdict),
            "ratio": interval_text(family.ratio) if family.ratio else "",
            "points": len(family.rows),
            "worst": _worst(family),
            "why": family.why,
        }
        for family in report.families
    ]


def _worst(family: Family) -> str:
    timed = [row for row in family.rows if row.estimate is not None]
    if not timed:
        return ""
    row = max(timed, key=lambda one: one.estimate.ratio if one.estimate else 0.0)
    assert row.estimate is not None
    return f"{row.series.identity['workload']} {interval_text(row.estimate)}"


def report_json(report: SidesReport) -> dict[str, Any]:
    """The report in full (docs/upgrade.md describes every key)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "before": report.before,
        "after": report.after,
        "runs": list(report.runs),
        "environment": report.environment,
        "defaults": [
            {"cell": one.cell, "before": one.before, "after": one.after} for one in report.defaults
        ],
        "missing": list(report.missing),
        "families": [
            {
                "backend": family.backend,
                "verdict": str(family.verdict),
                "why": family.why,
                **_interval(family.ratio),
                "points": [_point(row) for row in family.rows],
            }
            for family in report.families
        ],
    }


def _point(row: ComparedSeries) -> dict[str, Any]:
    return {
        "workload": row.series.identity["workload"],
        "variant": row.series.identity["variant"],
        "verdict": str(_point_verdict(row)),
        "reasons": [str(reason) for reason in row.reasons],
        **_interval(row.estimate),
        "before": {"seconds": row.a_s, "status": str(row.a_status)},
        "after": {"seconds": row.b_s, "status": str(row.b_status)},
    }


def _interval(ratio: Estimate | None) -> dict[str, float | None]:
    enough = ratio is not None and ratio.enough
    return {
        "ratio": ratio.ratio if ratio else None,
        "low": ratio.low if ratio and enough else None,
        "high": ratio.high if ratio and enough else None,
    }
