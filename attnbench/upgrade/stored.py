"""Stored times of both sides of a change, found where they may stand side by side.

Two times are joined only where device class, compute capability, protocol version, timer, L2 state
and execution are the same. Both are of one run where there is one that has both, since its sweep
took them within seconds of each other; else each is the newest own run's. A published run may be a
stranger's machine: it is joined with itself only.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from attnbench.errors import ResultsFolderError
from attnbench.store import ResultsFolder
from attnbench.store.record import PROTOCOL_VERSION, Metric, Status
from attnbench.upgrade.kernels import Kernels
from attnbench.workload import Workload

PHYSICAL = (
    "batch_spec",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "v_head_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "kv_cache_layout",
    "attn_type",
    "sliding_window",
    "logits_soft_cap",
    "has_sink",
    "use_alibi",
    "common_prefix_len",
    "lengths",
    "seed",
    "topk_tokens",
    "topk_pattern",
)
"""Columns that are what was computed; the name of a model and its number of layers are not."""

_READ = (
    *PHYSICAL,
    *("run_id", "replicate", "backend", "variant", "samples", "status", "started_at", "stack"),
    *("device_kind", "device_class", "compute_capability", "protocol_version"),
    *("timer", "l2_state", "execution"),
)


@dataclass(frozen=True, slots=True, order=True)
class How:
    """What must be the same for two times to be compared."""

    device_class: str
    timer: str
    l2_state: str
    execution: str
    protocol_version: int

    @property
    def text(self) -> str:
        """`nvidia-h200, timer event, L2 cold, eager`."""
        return f"{self.device_class}, timer {self.timer}, L2 {self.l2_state}, {self.execution}"


@dataclass(frozen=True, slots=True)
class Timed:
    """A point in one run. `replicates` are the medians, in seconds, of each process's samples."""

    kernels: str
    run_id: str
    started_at: datetime
    replicates: tuple[float, ...]
    stack: tuple[str, ...]
    is_published: bool

    @property
    def seconds(self) -> float:
        return statistics.median(self.replicates)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A point as one side needs it. `stack` are `name==version` its environment must have had."""

    workload: Workload
    kernels: Kernels
    stack: tuple[str, ...] = ()


class StoredTimes:
    """The rows of a results folder that an upgrade may be judged by, in memory."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], published: Iterable[str] = ()) -> None:
        self._published = frozenset(published)
        self._rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["protocol_version"] == PROTOCOL_VERSION:
                self._rows[_physical(row)].append(row)

    @classmethod
    def read(cls, folder: ResultsFolder, timer: str = "") -> StoredTimes:
        """Metric `attention` of every run, by `timer`; by all but the made-up times without one.

        A folder that is not there holds nothing.
        """
        where: dict[str, Any] = {"metric": str(Metric.ATTENTION)}
        if timer:
            where["timer"] = timer
        try:
            rows = folder.table(_READ, where).to_pylist()
        except ResultsFolderError:
            if folder.path.exists():
                raise
            return cls([])
        if not timer:
            rows = [row for row in rows if row["timer"] != "fake"]
        return cls(rows, folder.published_runs())

    def pair(
        self, before: Wanted, after: Wanted, capability: str
    ) -> dict[How, tuple[Timed, Timed]]:
        """Both sides' times, for every way they were measured alike."""
        found = {}
        old, new = self._of(before, capability), self._of(after, capability)
        for how in sorted(old.keys() & new.keys()):
            if (both := _best_pair(old[how], new[how])) is not None:
                found[how] = both
        return found

    def ended_as(self, wanted: Wanted, capability: str) -> str:
        """How the newest try of a point without a time ended; "" if it has one or no try."""
        rows = self._matching(wanted, capability)
        if not rows or any(Status(row["status"]).is_timed for row in rows):
            return ""
        return str(max(rows, key=lambda row: (row["started_at"], row["run_id"]))["status"])

    def _matching(self, wanted: Wanted, capability: str) -> list[Mapping[str, Any]]:
        columns = wanted.workload.columns()
        return [
            row
            for row in self._rows.get(_physical(columns), [])
            if row["backend"] == wanted.kernels.backend
            and row["variant"] in wanted.kernels.variants
            and _is_on(row, capability)
            and set(wanted.stack) <= set(row["stack"] or ())
        ]

    def _of(self, wanted: Wanted, capability: str) -> dict[How, list[Timed]]:
        groups: dict[tuple[How, str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in self._matching(wanted, capability):
            if Status(row["status"]).is_timed and row["samples"]:
                how = How(*(row[name] for name in How.__slots__))
                groups[how, row["variant"], row["run_id"]].append(row)
        found: dict[How, list[tuple[int, Timed]]] = defaultdict(list)
        for (how, variant, run_id), rows in groups.items():
            name = f"{wanted.kernels.backend}:{variant}" if variant else wanted.kernels.backend
            timed = Timed(
                kernels=name,
                run_id=run_id,
                started_at=min(row["started_at"] for row in rows),
                replicates=tuple(statistics.median(row["samples"]) for row in rows),
                stack=tuple(rows[0]["stack"] or ()),
                is_published=run_id in self._published,
            )
            found[how].append((wanted.kernels.variants.index(variant), timed))
        # The best variant that was timed at all, newest run first.
        return {
            how: sorted(
                (timed for rank, timed in ranked if rank == min(rank for rank, _ in ranked)),
                key=lambda timed: (timed.started_at, timed.run_id),
                reverse=True,
            )
            for how, ranked in found.items()
        }


def _best_pair(old: Sequence[Timed], new: Sequence[Timed]) -> tuple[Timed, Timed] | None:
    of_run = {timed.run_id: timed for timed in new}
    together = [(timed, of_run[timed.run_id]) for timed in old if timed.run_id in of_run]
    own = [pair for pair in together if not pair[0].is_published]
    if own or together:
        return (own or together)[0]
    mine_before = [timed for timed in old if not timed.is_published]
    mine_after = [timed for timed in new if not timed.is_published]
    return (mine_before[0], mine_after[0]) if mine_before and mine_after else None


def _is_on(row: Mapping[str, Any], capability: str) -> bool:
    if capability == "cpu":
        return bool(row["device_kind"] == "cpu")
    return bool(row["device_kind"] == "cuda" and row["compute_capability"] == capability)


def _physical(columns: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(columns[name] for name in PHYSICAL)
