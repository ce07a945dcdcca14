"""`RunValue` objects of digest rows: one, or several where refused rows joined a timed series."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbench.history.digest import TEXTS
from attnbench.history.runs import RunSummary
from attnbench.history.series import GRAVITY, RunValue, gravest, utc
from attnbench.store.record import Status


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one key in one run, as the digest has them."""

    values: Mapping[str, Any]
    statuses: tuple[Status, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Part:
        """`values`: a digest's row, of the columns `digest.DETAILS`."""
        return cls(values, tuple(GRAVITY[code] for code in values["statuses"]))

    @property
    def first(self) -> int:
        """The replicate of the part's first row."""
        return int(self.values["replicate"][0])


def run_value(run: RunSummary, is_published: bool, parts: Sequence[Part]) -> RunValue:
    """The value of a series in a run.

    `parts`: of the series' own key first, then of those that joined it, in order of their keys.
    """
    if len(parts) == 1:
        (part,) = parts
        statuses = part.statuses
        texts = {name: tuple(part.values[name]) for name in TEXTS}
    else:
        statuses = _merged_statuses(parts)
        texts = {name: _merged_texts(parts, name) for name in TEXTS}
    head = min(parts, key=lambda part: part.first).values
    noise = [n for part in parts if not math.isnan(n := part.values["noise"])]
    errors = [e for part in parts if not math.isnan(e := part.values["max_abs_error"])]
    return RunValue(
        run_id=run.run_id,
        started_at=run.started_at,
        status=gravest(statuses),
        statuses=statuses,
        replicates=tuple(v for part in parts for v in part.values["replicates"]),
        confirmations=tuple(v for part in parts for v in part.values["confirmations"]),
        references=tuple(v for part in parts for v in part.values["references"]),
        commit=head["commit"],
        commit_time=head["commit_time"] and utc(head["commit_time"]),
        stack_id=head["stack_id"],
        driver_version=head["driver_version"],
        cuda_version=run.facts.get("cuda_version", ""),
        container_digest=run.facts.get("container_digest", ""),
        num_samples=sum(part.values["num_samples"] for part in parts),
        # Samples, and so noise, are in the part of the series' own key alone.
        noise=statistics.median(noise) if noise else None,
        discarded=sum(part.values["discarded"] for part in parts),
        max_abs_error=max(errors) if errors else None,
        is_published=is_published,
        **texts,
    )


def _merged_statuses(parts: Sequence[Part]) -> tuple[Status, ...]:
    rows = [
        (replicate, number, status)
        for number, part in enumerate(parts)
        for replicate, status in zip(part.values["replicate"], part.statuses, strict=True)
    ]
    rows.sort(key=lambda row: row[:2])
    return tuple(row[2] for row in rows)


def _merged_texts(parts: Sequence[Part], name: str) -> tuple[str, ...]:
    """The distinct texts in order of the replicates they were first seen in."""
    seen = [
        (replicate, number, text)
        for number, part in enumerate(parts)
        for replicate, text in zip(part.values[f"{name}_at"], part.values[name], strict=True)
    ]
    seen.sort(key=lambda one: one[:2])
    return tuple(dict.fromkeys(text for _, _, text in seen))
