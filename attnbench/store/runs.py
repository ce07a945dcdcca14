"""What runs are stored: one line about each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import pyarrow as pa

from attnbench.store.header import RunHeader

#: What `list_runs` needs of the rows.
RUN_COLUMNS = (
    "run_id",
    "status",
    "subject",
    "commit",
    "commit_time",
    "stack_id",
    "device_class",
)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One stored run. Texts are "" for a run without rows; `counts` is rows per status."""

    run_id: str
    started_at: datetime
    subject: str = ""
    commit: str = ""
    commit_time: datetime | None = None
    stack_id: str = ""
    device_class: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    is_sealed: bool = True
    is_published: bool = False  # its rows are those of `published/`: no such run of this folder

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())


def list_runs(
    headers: Iterable[RunHeader],
    table: pa.Table,
    unsealed: frozenset[str],
    published: frozenset[str] = frozenset(),
) -> list[RunInfo]:
    """The runs of `headers`, newest last. `table` has the columns RUN_COLUMNS.

    A run resumed on another commit or stack shows those of most of its rows.
    """
    groups = table.group_by(list(RUN_COLUMNS)).aggregate([([], "count_all")]).to_pylist()
    counts: dict[str, dict[str, int]] = {}
    facts: dict[str, dict[str, object]] = {}
    for group in sorted(groups, key=lambda g: g["count_all"]):
        of_run = counts.setdefault(group["run_id"], {})
        of_run[group["status"]] = of_run.get(group["status"], 0) + group["count_all"]
        facts[group["run_id"]] = group
    infos = []
    for header in sorted(headers, key=lambda h: h.run_id):
        group = facts.get(header.run_id, {})
        infos.append(
            RunInfo(
                run_id=header.run_id,
                started_at=header.started_at,
                subject=str(group.get("subject", "")),
                commit=str(group.get("commit", "")),
                commit_time=_time(group.get("commit_time")),
                stack_id=str(group.get("stack_id", "")),
                device_class=str(group.get("device_class", "")),
                counts=dict(sorted(counts.get(header.run_id, {}).items())),
                is_sealed=header.run_id not in unsealed,
                is_published=header.run_id in published,
            )
        )
    return infos


def _time(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None
