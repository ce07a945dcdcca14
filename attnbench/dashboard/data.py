"""What the pages read, as plain values: the index and chunks of series, runs, conditions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from attnbench.dashboard.json_text import column_text
from attnbench.dashboard.series_files import chunk_digits
from attnbench.history.attribution import environment_between
from attnbench.history.derived import QUANTITIES
from attnbench.history.night import judge_newest
from attnbench.history.panel import Panel
from attnbench.history.roofline import roofline
from attnbench.history.rule import VerdictSettings
from attnbench.history.runs import RunSummary
from attnbench.history.series import RunValue, Series
from attnbench.history.series_rows import sample_arrays
from attnbench.history.series_verdict import SeriesVerdict
from attnbench.history.stacks import driver_number
from attnbench.history.verdict import Judgement
from attnbench.history.wording import repro_command
from attnbench.store.ceilings import Ceilings

_IDENTITY_SHOWN = (
    "backend",
    "variant",
    "workload",
    "batch_spec",
    "shape",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "phase",
    "num_reqs",
    "num_tokens",
    "bytes_moved",
    "flops",
    "device_name",
)

_INDEX_TEXTS = (
    "backend",
    "workload",
    "shape",
    "dtype",
    "phase",
    "metric",
    "device",
    "how",
    "verdict",
    "status",
)

_SIDE_COLUMNS = (
    "batch_spec",
    "phase",
    "num_reqs",
    "num_tokens",
    "num_layers",
    "flops",
    "bytes_moved",
)

_CONDITION_COLUMNS = (
    "backend",
    "variant",
    "workload",
    "metric",
    "replicate",
    "status",
    "reasons",
    "throttle_reasons",
    "stop_reason",
    "discarded",
    "timer",
    "l2_state",
    "execution",
    "timer_floor_s",
    "started_at",
)


def verdicts_of(
    panel: Panel, judgement: Judgement, settings: VerdictSettings
) -> dict[str, SeriesVerdict]:
    """Series id -> verdict: the judged run's where it measured the series, else of its newest run.

    Only the judged metrics have one.
    """
    found = {verdict.series.id: verdict for verdict in judgement.verdicts}
    judged = panel.with_metrics(settings.metrics)
    others = [index for index in judged.tolist() if panel.ids[index] not in found]
    if others:
        rest = judge_newest(panel, others, settings)
        found.update((verdict.series.id, verdict) for verdict in rest)
    return found


def newest_values(panel: Panel, verdicts: Mapping[str, SeriesVerdict]) -> list[RunValue]:
    """Each series' newest value, those that verdicts hold not read again."""
    found: dict[int, RunValue] = {}
    for index, name in enumerate(panel.ids):
        verdict = verdicts.get(name)
        newest = panel.runs[panel.newest[index]].run_id
        if verdict is not None and verdict.subject.run_id == newest:
            found[index] = verdict.subject
    rest = np.array([i for i in range(panel.num_series) if i not in found], np.int64)
    for run in np.unique(panel.newest[rest]).tolist():
        own = rest[panel.newest[rest] == run]
        found.update(zip(own.tolist(), panel.values_of_run(own, run), strict=True))
    return [found[index] for index in range(panel.num_series)]


def index_data(
    panel: Panel,
    verdicts: Mapping[str, SeriesVerdict],
    newest: Sequence[RunValue],
    title: str,
) -> dict[str, Any]:
    """One entry per series, by column; repeated texts are kept once."""
    rows = [
        _index_row(panel.outline(index), value, verdicts.get(panel.ids[index]))
        for index, value in enumerate(newest)
    ]
    columns: dict[str, Any] = {
        name: _dictionary([row[name] for row in rows]) for name in _INDEX_TEXTS
    }
    for name in ("id", "latest_s", "ratio", "runs"):
        columns[name] = [row[name] for row in rows]
    return {
        "title": title,
        "chunk_digits": chunk_digits(panel.num_series),
        "count": panel.num_series,
        "columns": columns,
        "quantities": {
            str(name): {
                "label": info.label,
                "unit": info.unit,
                "scale": info.scale,
                "lower_is_better": info.lower_is_better,
            }
            for name, info in QUANTITIES.items()
        },
    }


def series_heads(
    panel: Panel,
    verdicts: Mapping[str, SeriesVerdict],
    run_index: Mapping[str, int],
    changes: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Everything that the series page shows of each series but its values.

    `changes` are its change points (`level_changes`).
    """
    heads = []
    for index, name in enumerate(panel.ids):
        series, verdict = panel.outline(index), verdicts.get(name)
        heads.append(
            {
                "key": series.key._asdict(),
                "identity": {name: series.identity[name] for name in _IDENTITY_SHOWN},
                "title": series.title,
                "again": repro_command(series.identity),
                "verdict": verdict_data(verdict, run_index) if verdict else None,
                "changes": changes[name],
            }
        )
    return heads


def verdict_data(verdict: SeriesVerdict, run_index: Mapping[str, int]) -> dict[str, Any]:
    """A verdict for the series page."""
    found = verdict.estimate
    return {
        "verdict": str(verdict.verdict),
        "reasons": [str(reason) for reason in verdict.reasons],
        "ratio": found.ratio if found else None,
        "low": found.low if found and found.enough else None,
        "high": found.high if found and found.enough else None,
        "baseline_runs": verdict.baseline_runs,
        "run": run_index[verdict.subject.run_id],
        "since": run_index[verdict.since.run_id] if verdict.since else None,
        "status_before": str(verdict.status_before) if verdict.status_before else "",
        "note": verdict.note,
        "replicates": list(verdict.subject.replicates) if verdict.subject.confirmations else [],
        "confirmations": list(verdict.subject.confirmations),
        "references": list(verdict.subject.references),
    }


def runs_data(
    runs: Sequence[RunSummary],
    conditions_shown: int,
    published: Collection[str] = (),
    clocks: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All runs, oldest first, and every stack once. The newest ones have a conditions file.

    `clocks` says what each run did with the GPU's clock (`attribution.locked_clocks`).
    """
    clocks = clocks or {}
    stacks = {run.stack_id: list(run.stack) for run in runs}
    listed = []
    latest: dict[str, RunSummary] = {}
    for number, run in enumerate(runs):
        before = latest.get(run.device_class)
        change = environment_between(before, run, clocks) if before else None
        latest[run.device_class] = run
        listed.append(
            {
                "id": run.run_id,
                "at": run.started_at,
                "seconds": run.duration_s,
                "commit": run.commit,
                "commit_at": run.commit_time,
                "subject": run.commit_subject,
                "stack": run.stack_id,
                "stack_key": run.stack_key,
                "driver": driver_number(run.driver_version),
                "device": run.device_class,
                "device_name": run.device_name,
                "suites": list(run.suites),
                "points": {str(status): count for status, count in run.points.items()},
                "facts": {**run.facts, **_clock(clocks, run)},
                "change": change.text if change else "",
                "published": run.run_id in published,
                "conditions": number >= len(runs) - conditions_shown,
            }
        )
    return {"runs": listed, "stacks": stacks}


def _clock(clocks: Mapping[str, str], run: RunSummary) -> dict[str, str]:
    return {"clocks": clocks[run.run_id]} if run.run_id in clocks else {}


def backends_data(
    panel: Panel,
    newest: Sequence[RunValue],
    run_index: Mapping[str, int],
    ceilings: Mapping[str, Ceilings],
) -> list[dict[str, Any]]:
    """The newest value of every `attention` series, for putting backends side by side.

    `attainable_s` is by the ceilings of the value's own run; None where they are not known.
    """
    rows = []
    for index in panel.with_metrics(("attention",)).tolist():
        series, value = panel.outline(index), newest[index]
        limits = roofline(series.identity, ceilings.get(value.run_id))
        rows.append(
            {
                "id": panel.ids[index],
                "group": group_of(series),
                "device": series.key.device_class,
                "how": how_text(series),
                **{name: series.identity[name] for name in _SIDE_COLUMNS},
                "attainable_s": limits.attainable_s if limits else None,
                "backend": backend_name(series),
                "median_s": value.median_s if value.is_timed else None,
                "status": str(value.status),
                "reasons": list(value.reasons),
                "run": run_index[value.run_id],
            }
        )
    return rows


def conditions_text(rows: pa.Table) -> str:
    """What a run's rows say of the machine and of the measuring, as JSON; by column."""
    rows = rows.sort_by("started_at")
    medians, noise, counts = sample_arrays(rows["samples"])
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        name: rows[name] for name in _CONDITION_COLUMNS
    }
    columns["median_s"] = pa.array(medians)
    columns["noise"] = pa.array(noise)
    columns["samples"] = pa.array(counts)
    columns["before"] = rows["conditions_before"]
    columns["after"] = rows["conditions_after"]
    texts = (f'"{name}":{column_text(column)}' for name, column in columns.items())
    return "{" + ",".join(texts) + "}"


#: Columns that `conditions_text` reads.
CONDITION_COLUMNS = (*_CONDITION_COLUMNS, "samples", "conditions_before", "conditions_after")


def how_text(series: Series) -> str:
    """Timer, L2 state and execution mode of a series, in one word each."""
    key = series.key
    parts = [key.timer or "untimed", f"L2 {key.l2_state}" if key.l2_state else "", key.execution]
    return ", ".join(part for part in parts if part)


def group_of(series: Series) -> str:
    """What backends are compared within: everything of the workload but the batch spec."""
    identity = series.identity
    spec = str(identity["batch_spec"])
    known = {spec, f"shape={identity['shape']}", f"dtype={identity['dtype']}"}
    rest = [word for word in str(identity["workload"]).split() if word not in known]
    shape = identity["shape"] or (
        f"{identity['num_heads']}/{identity['num_kv_heads']} heads of {identity['head_size']}"
    )
    return " ".join([str(shape), str(identity["dtype"]), *rest])


def backend_name(series: Series) -> str:
    """A series' backend and its variant, for people."""
    variant = series.identity["variant"]
    return f"{series.identity['backend']}{f' [{variant}]' if variant else ''}"


def _index_row(series: Series, newest: RunValue, verdict: SeriesVerdict | None) -> dict[str, Any]:
    return {
        "id": series.id,
        "backend": backend_name(series),
        "workload": series.identity["workload"],
        "shape": series.identity["shape"],
        "dtype": series.identity["dtype"],
        "phase": series.identity["phase"],
        "metric": series.key.metric,
        "device": series.key.device_class,
        "how": how_text(series),
        "latest_s": _short(newest.median_s) if newest.is_timed else None,
        "ratio": _short(verdict.estimate.ratio) if verdict and verdict.estimate else None,
        "verdict": str(verdict.verdict) if verdict else "",
        "status": str(newest.status),
        "runs": len(series.values),
    }


def _short(value: float | None) -> float | None:
    """The index has every series and is in the overview; the series page has all digits."""
    return None if value is None else float(f"{value:.5g}")


def _dictionary(values: Sequence[str]) -> dict[str, Any]:
    words = sorted(set(values))
    position = {word: number for number, word in enumerate(words)}
    return {"words": words, "at": [position[value] for value in values]}
