"""What the pages read, as plain values: the index and chunks of series, runs, conditions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from attnbench.history.derived import QUANTITIES
from attnbench.history.roofline import roofline
from attnbench.history.rule import VerdictSettings
from attnbench.history.runs import RunSummary, environment_change
from attnbench.history.series import RunValue, Series, sample_statistics
from attnbench.history.series_verdict import SeriesVerdict, judge_series
from attnbench.history.summary import repro_command
from attnbench.history.verdict import Judgement
from attnbench.store.ceilings import Ceilings

#: A chunk of series is one file, loaded when one of its series is opened: about this many in each.
_CHUNK_SERIES = 40

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
    every: Sequence[Series], judgement: Judgement, settings: VerdictSettings
) -> dict[str, SeriesVerdict]:
    """Series id -> verdict: the judged run's where it measured the series, else of its newest run.

    Only the judged metrics have one.
    """
    found = {verdict.series.id: verdict for verdict in judgement.verdicts}
    for series in every:
        if series.id not in found and series.key.metric in settings.metrics:
            found[series.id] = judge_series(series, series.newest, settings)
    return found


def chunk_digits(num_series: int) -> int:
    """How many digits of a series' id name its chunk."""
    digits = 0
    while digits < 4 and num_series > _CHUNK_SERIES * 16**digits:
        digits += 1
    return digits


def index_data(
    every: Sequence[Series], verdicts: Mapping[str, SeriesVerdict], title: str
) -> dict[str, Any]:
    """One entry per series, by column; repeated texts are kept once."""
    rows = [_index_row(series, verdicts.get(series.id)) for series in every]
    columns: dict[str, Any] = {
        name: _dictionary([row[name] for row in rows]) for name in _INDEX_TEXTS
    }
    for name in ("id", "latest_s", "ratio", "runs"):
        columns[name] = [row[name] for row in rows]
    return {
        "title": title,
        "chunk_digits": chunk_digits(len(every)),
        "count": len(every),
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


def series_chunks(
    every: Sequence[Series],
    verdicts: Mapping[str, SeriesVerdict],
    run_index: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Chunk name -> series id -> everything the series page shows."""
    digits = chunk_digits(len(every))
    chunks: dict[str, dict[str, Any]] = defaultdict(dict)
    for series in every:
        verdict = verdicts.get(series.id)
        chunks[series.id[:digits]][series.id] = {
            "key": series.key._asdict(),
            "identity": {name: series.identity[name] for name in _IDENTITY_SHOWN},
            "title": series.title,
            "again": repro_command(series.identity),
            "verdict": verdict_data(verdict, run_index) if verdict else None,
            "values": [_value_data(value, run_index) for value in series.values],
        }
    return dict(chunks)


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
    }


def runs_data(
    runs: Sequence[RunSummary], conditions_shown: int, published: Collection[str] = ()
) -> dict[str, Any]:
    """All runs, oldest first, and every stack once. The newest ones have a conditions file."""
    stacks = {run.stack_id: list(run.stack) for run in runs}
    listed = []
    latest: dict[str, RunSummary] = {}
    for number, run in enumerate(runs):
        before = latest.get(run.device_class)
        change = environment_change(before, run) if before else None
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
                "driver": run.driver_version,
                "device": run.device_class,
                "device_name": run.device_name,
                "suites": list(run.suites),
                "points": {str(status): count for status, count in run.points.items()},
                "facts": dict(run.facts),
                "change": change.text if change else "",
                "published": run.run_id in published,
                "conditions": number >= len(runs) - conditions_shown,
            }
        )
    return {"runs": listed, "stacks": stacks}


def backends_data(
    every: Sequence[Series],
    run_index: Mapping[str, int],
    ceilings: Mapping[str, Ceilings],
) -> list[dict[str, Any]]:
    """The newest value of every `attention` series, for putting backends side by side.

    `attainable_s` is by the ceilings of the value's own run; None where they are not known.
    """
    return [
        {
            "id": series.id,
            "group": _group_of(series),
            "device": series.key.device_class,
            "how": how_text(series),
            "batch_spec": series.identity["batch_spec"],
            "phase": series.identity["phase"],
            "num_reqs": series.identity["num_reqs"],
            "num_tokens": series.identity["num_tokens"],
            "num_layers": series.identity["num_layers"],
            "flops": series.identity["flops"],
            "bytes_moved": series.identity["bytes_moved"],
            "attainable_s": _attainable_s(series, ceilings),
            "backend": _backend_name(series),
            "median_s": series.newest.median_s if series.newest.is_timed else None,
            "status": str(series.newest.status),
            "reasons": list(series.newest.reasons),
            "run": run_index[series.newest.run_id],
        }
        for series in every
        if series.key.metric == "attention"
    ]


def conditions_data(table: pa.Table, run_id: str) -> dict[str, Any]:
    """What a run's rows say of the machine and of the measuring."""
    rows = table.filter(pc.equal(table["run_id"], run_id)).sort_by("started_at")
    medians, noise, counts = sample_statistics(rows["samples"])
    columns: dict[str, list[Any]] = {name: rows[name].to_pylist() for name in _CONDITION_COLUMNS}
    columns["median_s"] = list(medians)
    columns["noise"] = list(noise)
    columns["samples"] = list(counts)
    for side in ("before", "after"):
        columns[side] = [dict(pairs or ()) for pairs in rows[f"conditions_{side}"].to_pylist()]
    return columns


def how_text(series: Series) -> str:
    """Timer, L2 state and execution mode of a series, in one word each."""
    key = series.key
    parts = [key.timer or "untimed", f"L2 {key.l2_state}" if key.l2_state else "", key.execution]
    return ", ".join(part for part in parts if part)


def _group_of(series: Series) -> str:
    """What backends are compared within: everything of the workload but the batch spec."""
    identity = series.identity
    spec = str(identity["batch_spec"])
    known = {spec, f"shape={identity['shape']}", f"dtype={identity['dtype']}"}
    rest = [word for word in str(identity["workload"]).split() if word not in known]
    shape = identity["shape"] or (
        f"{identity['num_heads']}/{identity['num_kv_heads']} heads of {identity['head_size']}"
    )
    return " ".join([str(shape), str(identity["dtype"]), *rest])


def _attainable_s(series: Series, ceilings: Mapping[str, Ceilings]) -> float | None:
    found = roofline(series.identity, ceilings.get(series.newest.run_id))
    return found.attainable_s if found else None


def _backend_name(series: Series) -> str:
    variant = series.identity["variant"]
    return f"{series.identity['backend']}{f' [{variant}]' if variant else ''}"


def _index_row(series: Series, verdict: SeriesVerdict | None) -> dict[str, Any]:
    newest = series.newest
    return {
        "id": series.id,
        "backend": _backend_name(series),
        "workload": series.identity["workload"],
        "shape": series.identity["shape"],
        "dtype": series.identity["dtype"],
        "phase": series.identity["phase"],
        "metric": series.key.metric,
        "device": series.key.device_class,
        "how": how_text(series),
        "latest_s": newest.median_s if newest.is_timed else None,
        "ratio": verdict.estimate.ratio if verdict and verdict.estimate else None,
        "verdict": str(verdict.verdict) if verdict else "",
        "status": str(newest.status),
        "runs": len(series.values),
    }


def _value_data(value: RunValue, run_index: Mapping[str, int]) -> list[Any]:
    """[run, status, replicates, confirmations, noise, samples, discarded, reasons]."""
    return [
        run_index[value.run_id],
        str(value.status),
        list(value.replicates),
        list(value.confirmations),
        value.noise,
        value.num_samples,
        value.discarded,
        list(value.reasons),
    ]


def _dictionary(values: Sequence[str]) -> dict[str, Any]:
    words = sorted(set(values))
    position = {word: number for number, word in enumerate(words)}
    return {"words": words, "at": [position[value] for value in values]}
