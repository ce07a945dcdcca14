"""Stored times of one device class, of layers and batches, whatever ran them.

Times stand side by side only where device class, protocol version, timer, L2 state, execution and
driver are the same, and no package of their environments has two versions. Of each batch the run
that timed most contenders counts, so that they were measured within seconds of one another; what
it lacks is the newest other run's.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from attnbench.errors import ResultsFolderError, UsageError
from attnbench.history.series import gravest
from attnbench.store import ResultsFolder
from attnbench.store.record import PROTOCOL_VERSION, Metric, Status
from attnbench.upgrade.stored import PHYSICAL
from attnbench.workload import Workload

ENGINES_OWN = ("block_size", "kv_cache_layout")
"""Columns that follow from the backend where the user asks for none: part of a choice."""

BATCH = ("batch_spec", "common_prefix_len", "lengths", "seed")
LAYER = tuple(name for name in PHYSICAL if name not in (*ENGINES_OWN, *BATCH))

_READ = (
    *PHYSICAL,
    *("workload", "phase", "run_id", "replicate", "backend", "variant", "samples", "status"),
    *("reasons", "started_at", "stack", "device_kind", "device_class", "compute_capability"),
    *("driver_version", "protocol_version", "timer", "l2_state", "execution"),
)
_NO_KERNELS = ("python",)
"""Packages of a stack whose version changes no kernel."""


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """What can be taken: a backend's kernels over a cache of this block size and layout."""

    backend: str
    variant: str = ""
    block_size: int = 16
    kv_cache_layout: str = "NHD"

    @property
    def request(self) -> str:
        """As `--backend` takes it."""
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    @property
    def text(self) -> str:
        """`FLASHINFER:FA3 block=32`; a block of 16 and NHD are left out."""
        words = [self.request]
        if self.block_size != 16:
            words.append(f"block={self.block_size}")
        if self.kv_cache_layout != "NHD":
            words.append(self.kv_cache_layout)
        return " ".join(words)


@dataclass(frozen=True, slots=True, order=True)
class How:
    """What must be the same for two times to be compared; the newest driver sorts last."""

    device_class: str
    timer: str
    l2_state: str
    execution: str
    driver_version: str

    @property
    def text(self) -> str:
        """`nvidia-h200, timer event, L2 cold, eager`."""
        parts = (self.device_class, f"timer {self.timer}", f"L2 {self.l2_state}", self.execution)
        return ", ".join(part for part in parts if part != "L2 ")


@dataclass(frozen=True, slots=True)
class Timed:
    """One choice on one batch in one run. `replicates`: each process's median, in seconds."""

    choice: Choice
    replicates: tuple[float, ...]
    run_id: str
    started_at: datetime
    stack: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(self.replicates)


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice on one batch that has no time to be used, and what it ended as."""

    choice: Choice
    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Point:
    """What one batch of one layer was measured as."""

    timed: Mapping[Choice, Timed]
    ended: Mapping[Choice, Ended]
    home: str = ""


Key = tuple[Any, ...]


def layer_key(columns: Mapping[str, Any]) -> Key:
    return tuple(columns[name] for name in LAYER)


def batch_key(columns: Mapping[str, Any]) -> Key:
    return tuple(columns[name] for name in BATCH)


def read_rows(
    folder: ResultsFolder,
    timer: str = "",
    l2_state: str = "",
    metric: Metric = Metric.ATTENTION,
) -> list[dict[str, Any]]:
    """Rows of `metric`, made-up times only where timer `fake` is named.

    A folder that is not there holds nothing.
    """
    where: dict[str, Any] = {"metric": str(metric)}
    if timer:
        where["timer"] = timer
    if l2_state:
        where["l2_state"] = l2_state
    try:
        rows: list[dict[str, Any]] = folder.table(_READ, where).to_pylist()
    except ResultsFolderError:
        if folder.path.exists():
            raise
        return []
    return rows if timer else [row for row in rows if row["timer"] != "fake"]


def device_class_of(rows: Sequence[Mapping[str, Any]], text: str, capability: str) -> str:
    """The stored device class that `text` names, or that has this compute capability; "": none.

    Raises UsageError where several would do: devices are never mixed.
    """
    classes = {row["device_class"] for row in rows}
    if text.strip().lower() in classes:
        return text.strip().lower()
    found = sorted({row["device_class"] for row in rows if _is_on(row, capability)})
    if len(found) > 1:
        raise UsageError(
            f"--device {text or capability}: stored are {', '.join(found)}; name one of them, "
            f"e.g. --device {found[0]}"
        )
    return str(found[0]) if found else ""


def _is_on(row: Mapping[str, Any], capability: str) -> bool:
    if capability == "cpu":
        return bool(row["device_kind"] == "cpu")
    return bool(row["device_kind"] != "cpu" and row["compute_capability"] == capability)


class Measured:
    """The rows of one device class that an answer may rest on, in memory."""

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        device_class: str,
        wanted: Sequence[Workload],
        published: Iterable[str] = (),
        block_size: int = 0,
    ) -> None:
        """`wanted` decide how the times used were measured; `block_size` 0: any one counts."""
        hidden = frozenset(published)
        self.device_class = device_class
        mine = [
            row
            for row in rows
            if row["device_class"] == device_class
            and row["protocol_version"] == PROTOCOL_VERSION
            and not row["backend"].startswith("VLLM:")
            and block_size in (0, row["block_size"])
        ]
        asked = {(layer_key(c), batch_key(c)) for c in (one.columns() for one in wanted)}
        here = [row for row in mine if (layer_key(row), batch_key(row)) in asked]
        own = [row for row in here if row["run_id"] not in hidden]
        self.is_published = bool(here) and not own
        # A published run may be a stranger's machine: it stands beside itself only.
        last = max(here, key=_age)["run_id"] if self.is_published else ""
        keep = [r for r in mine if (r["run_id"] == last if last else r["run_id"] not in hidden)]
        self.how = _how([row for row in (own or here) if Status(row["status"]).is_timed])
        self.notes: list[str] = []
        self._rows: dict[tuple[Key, Key], list[Mapping[str, Any]]] = defaultdict(list)
        basis = [row for row in (own or here) if _how_of(row) == self.how] or own or here
        versions = _versions(max(basis, key=_age)["stack"]) if basis else {}
        left_out: dict[str, None] = {}
        for row in sorted(keep, key=_age, reverse=True):
            stack = _versions(row["stack"])
            clash = next((n for n in stack if versions.get(n, stack[n]) != stack[n]), "")
            if clash:
                left_out[
                    f"runs with {clash}=={stack[clash]} left out: {versions[clash]} is newer"
                ] = None
                continue
            if (layer_key(row), batch_key(row)) in asked:
                versions |= stack
            self._rows[layer_key(row), batch_key(row)].append(row)
        self.notes += left_out
        self.device_kind = str(basis[0]["device_kind"]) if basis else ""
        self.compute_capability = str(basis[0]["compute_capability"] or "") if basis else ""
        self.versions = tuple(f"{name}=={one}" for name, one in sorted(versions.items()))

    def point(self, workload: Workload) -> Point:
        """Everything measured of a layer's batch."""
        columns = workload.columns()
        return self._point(self._rows.get((layer_key(columns), batch_key(columns)), []))

    def grid(self, layer: Workload) -> dict[str, Point]:
        """By workload text, every stored batch of the layer of `layer`."""
        wanted = layer_key(layer.columns())
        return {
            str(rows[0]["workload"]): self._point(rows)
            for (key, _), rows in self._rows.items()
            if key == wanted
        }

    def _point(self, rows: Sequence[Mapping[str, Any]]) -> Point:
        by_run: dict[tuple[Choice, str], list[Mapping[str, Any]]] = defaultdict(list)
        wrong: dict[Choice, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            if _how_of(row) == self.how or self.how is None:
                by_run[_choice(row), row["run_id"]].append(row)
            wrong[_choice(row)].append(row)
        runs = {run for _, run in by_run}
        counts = {
            run: (sum(_is_usable(r) for (_, one), r in by_run.items() if one == run), run)
            for run in runs
        }
        home = max(runs, key=lambda run: counts[run]) if runs else ""
        timed: dict[Choice, Timed] = {}
        ended: dict[Choice, Ended] = {}
        for choice in dict.fromkeys(_choice(row) for row in rows):
            mine = [run for one, run in by_run if one == choice]
            newest = max(wrong[choice], key=_age)["run_id"]
            latest = [r for r in wrong[choice] if r["run_id"] == newest]
            bad = [r for r in latest if r["status"] == Status.INCORRECT]
            if bad:  # a wrong output is wrong however it is timed
                ended[choice] = _ended(choice, Status.INCORRECT, bad)
                continue
            if not mine:
                continue
            last = by_run[choice, max(mine)]
            status = gravest(Status(r["status"]) for r in last)
            if status is not Status.OK:
                ended[choice] = _ended(choice, status, last)
                continue
            used = by_run[choice, home] if home in mine else last
            if not _is_usable(used):
                used = last
            timed[choice] = Timed(
                choice=choice,
                replicates=tuple(statistics.median(r["samples"]) for r in used),
                run_id=used[0]["run_id"],
                started_at=min(r["started_at"] for r in used),
                stack=tuple(used[0]["stack"] or ()),
            )
        return Point(timed, ended, home)


def _is_usable(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(row["status"] == Status.OK and row["samples"] for row in rows)


def _ended(choice: Choice, status: Status, rows: Sequence[Mapping[str, Any]]) -> Ended:
    reasons = dict.fromkeys(
        reason for row in rows if row["status"] == status for reason in row["reasons"] or ()
    )
    return Ended(choice, status, "; ".join(reasons))


def _age(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["started_at"], row["run_id"])


def _choice(row: Mapping[str, Any]) -> Choice:
    return Choice(row["backend"], row["variant"], row["block_size"], row["kv_cache_layout"])


def _how_of(row: Mapping[str, Any]) -> How:
    return How(*(row[name] or "" for name in How.__slots__))


def _how(timed: Sequence[Mapping[str, Any]]) -> How | None:
    """The way that covers most batches and choices, the newest of equals."""
    covered: dict[How, set[Any]] = defaultdict(set)
    newest: dict[How, Any] = {}
    for row in timed:
        how = _how_of(row)
        covered[how].add((layer_key(row), batch_key(row), _choice(row)))
        newest[how] = max(newest.get(how, _age(row)), _age(row))
    if not covered:
        return None
    return max(covered, key=lambda how: (len(covered[how]), newest[how]))


def _versions(stack: Sequence[str] | None) -> dict[str, str]:
    pairs = (one.partition("==") for one in stack or ())
    return {name: version for name, _, version in pairs if name not in _NO_KERNELS}
