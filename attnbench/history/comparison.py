"""Two sides of history against each other: runs, commits or stacks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.errors import DataError, ExitCode
from attnbench.history.rule import Estimate, Reason, Verdict, VerdictSettings, decide
from attnbench.history.rule import estimate_groups as estimate_of
from attnbench.history.runs import EnvironmentChange, RunSummary, environment_change, runs_of
from attnbench.history.series import RunValue, Series, gravest
from attnbench.history.series_rows import series_of
from attnbench.history.series_verdict import is_supported
from attnbench.history.verdict import differing_fields
from attnbench.store.record import Status

#: Shorter prefixes of a commit, stack or run id name too much.
_MIN_PREFIX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one word of `compare A B` stands for."""

    text: str
    kind: str  # run, commit, stack
    runs: tuple[RunSummary, ...]

    @property
    def run_ids(self) -> frozenset[str]:
        return frozenset(run.run_id for run in self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSeries:
    """One series on both sides; times in seconds, None where a side was not timed."""

    series: Series
    verdict: Verdict
    reasons: tuple[Reason, ...]
    estimate: Estimate | None = None
    a_s: float | None = None
    b_s: float | None = None
    a_status: Status | None = None
    b_status: Status | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`rows` are the worst first; `only_a` and `only_b` are titles of points of one side."""

    a: Side
    b: Side
    environment: EnvironmentChange | None
    rows: tuple[ComparedSeries, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        verdicts = {row.verdict for row in self.rows}
        codes = [ExitCode.OK]
        if Verdict.REGRESSION in verdicts:
            codes.append(ExitCode.REGRESSION)
        if verdicts & {Verdict.UNDECIDED, Verdict.INVALID}:
            codes.append(ExitCode.UNDECIDED)
        return ExitCode.join(*codes)


def compare(table: pa.Table, a: str, b: str, settings: VerdictSettings | None = None) -> Comparison:
    """`b` against `a`; each a run id, a commit or a stack id, or a prefix of one.

    Raises DataError for a word that names nothing or several things, and when no series of the two
    sides may be compared: the message says which field differs.
    """
    settings = settings or VerdictSettings()
    runs = runs_of(table)
    side_a, side_b = find_side(runs, a), find_side(runs, b)
    if side_a.run_ids == side_b.run_ids:
        raise DataError(f"{a!r} and {b!r} are the same runs; name two different ones")
    wanted = pa.array(sorted(side_a.run_ids | side_b.run_ids), pa.string())
    every = series_of(table.filter(pc.is_in(table["run_id"], wanted)), settings.metrics)
    rows: list[ComparedSeries] = []
    lone_a: list[Series] = []
    lone_b: list[Series] = []
    for series in every:
        of_a = [v for v in series.values if v.run_id in side_a.run_ids]
        of_b = [v for v in series.values if v.run_id in side_b.run_ids]
        if of_a and of_b:
            rows.append(_compare_values(series, of_a, of_b, settings))
        else:
            (lone_a if of_a else lone_b).append(series)
    refused, only_a, only_b = _pair_up(lone_a, lone_b)
    if refused and not rows:
        raise DataError(
            f"{a!r} and {b!r} cannot be compared: {_count_fields(refused)}; measure both sides the "
            "same way, or compare other runs"
        )
    if not refused and not rows:
        raise DataError(f"{a!r} and {b!r} share no point; measure the same suite on both sides")
    order = list(Verdict)
    rows = sorted(
        [*rows, *refused],
        key=lambda r: (order.index(r.verdict), -(r.estimate.ratio if r.estimate else 0.0)),
    )
    return Comparison(
        a=side_a,
        b=side_b,
        environment=environment_change(side_a.runs[-1], side_b.runs[-1]),
        rows=tuple(rows),
        only_a=only_a,
        only_b=only_b,
    )


def find_side(runs: Sequence[RunSummary], text: str) -> Side:
    """The runs that `text` names: a run id, commit, stack id or key, or a prefix of four or more.

    Raises DataError if it names nothing, or more than one thing.
    """
    found: dict[tuple[str, str], list[RunSummary]] = defaultdict(list)
    for run in runs:
        # `1a2b3c4d` names the packages whatever the driver, `1a2b3c4d-9e8f7a6b` one of its stacks.
        stack = run.stack_key if "-" in text else run.stack_id
        for kind, name in (("run", run.run_id), ("commit", run.commit), ("stack", stack)):
            if name and (name == text or (len(text) >= _MIN_PREFIX and name.startswith(text))):
                found[kind, name].append(run)
    named = {key: value for key, value in found.items() if key[1] == text} or dict(found)
    if len(named) > 1:
        listed = ", ".join(f"{kind} {name}" for kind, name in list(named)[:4])
        raise DataError(f"{text!r} names several things: {listed}; write more of it")
    if not named:
        newest = runs[-1] if runs else None
        hint = (
            f"the newest run is {newest.run_id} of commit {newest.commit[:12] or 'unknown'}, "
            f"stack {newest.stack_id}"
            if newest
            else "nothing is stored; measure first: attnbench run 8q1s4k"
        )
        raise DataError(f"{text!r} is no stored run, commit or stack; {hint}")
    ((kind, _), chosen), *_ = named.items()
    return Side(text=text, kind=kind, runs=tuple(chosen))


def _compare_values(
    series: Series, a: Sequence[RunValue], b: Sequence[RunValue], settings: VerdictSettings
) -> ComparedSeries:
    status_a, status_b = gravest(v.status for v in a), gravest(v.status for v in b)
    base = ComparedSeries(
        series=series,
        verdict=Verdict.UNCHANGED,
        reasons=(Reason.STATUS_SAME,),
        a_status=status_a,
        b_status=status_b,
    )
    if Status.THROTTLED in (status_a, status_b):
        return _with(base, Verdict.INVALID, Reason.THROTTLED)
    if is_supported(status_a) != is_supported(status_b):
        if is_supported(status_b):
            return _with(base, Verdict.IMPROVEMENT, Reason.STATUS_RECOVERED)
        return _with(base, Verdict.REGRESSION, Reason.STATUS_CHANGED)
    groups_a = [_all_replicates(v) for v in a if v.is_timed]
    groups_b = [_all_replicates(v) for v in b if v.is_timed]
    if not groups_a or not groups_b:
        return base
    noise = settings.noise(series.key.timer)
    found = estimate_of(groups_a, groups_b, noise, settings.confidence)
    verdict, reason = decide(found, noise)
    return ComparedSeries(
        series=series,
        verdict=verdict,
        reasons=(reason,),
        estimate=found,
        a_s=_median(groups_a),
        b_s=_median(groups_b),
        a_status=status_a,
        b_status=status_b,
    )


def _all_replicates(value: RunValue) -> tuple[float, ...]:
    return (*value.replicates, *value.confirmations)


def _median(groups: Sequence[Sequence[float]]) -> float:
    return statistics.median([value for group in groups for value in group])


def _with(base: ComparedSeries, verdict: Verdict, reason: Reason) -> ComparedSeries:
    return replace(base, verdict=verdict, reasons=(reason,))


def _pair_up(
    lone_a: Sequence[Series], lone_b: Sequence[Series]
) -> tuple[list[ComparedSeries], tuple[str, ...], tuple[str, ...]]:
    """Series of one point and metric that both sides have, but measured in different ways."""
    by_point: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for series in lone_b:
        by_point[series.key.point_id, series.key.metric].append(series)
    refused = []
    only_a = []
    paired: set[str] = set()
    for series in lone_a:
        others = by_point.get((series.key.point_id, series.key.metric), [])
        if not others:
            only_a.append(series.title)
            continue
        other = min(others, key=lambda o: len(differing_fields(series.key, o.key)))
        paired.update(o.id for o in others)
        names = differing_fields(series.key, other.key)
        note = "; ".join(
            f"{name} ({getattr(series.key, name) or 'none'}, {getattr(other.key, name) or 'none'})"
            for name in names
        )
        refused.append(
            ComparedSeries(
                series=other,
                verdict=Verdict.INVALID,
                reasons=tuple(Reason(f"incomparable:{name}") for name in names),
                note=note,
            )
        )
    only_b = tuple(series.title for series in lone_b if series.id not in paired)
    return refused, tuple(only_a), only_b


def _count_fields(refused: Sequence[ComparedSeries]) -> str:
    notes = dict.fromkeys(row.note for row in refused)
    listed = list(notes)[:2]
    return "they differ in " + " / ".join(listed)
