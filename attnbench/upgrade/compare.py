"""What changes between two versions, cell by cell, and why, in words a person can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from attnbench.upgrade.overrides import plain
from attnbench.upgrade.probe import Candidate, CellAnswer, VersionAnswer


class ChangeKind(StrEnum):
    """What kind of change a cell sees; a cell has one, the first that holds."""

    DEFAULT = "default"
    """Another backend is chosen."""
    LOST = "lost"
    """No backend accepts it any more."""
    GAINED = "gained"
    """A backend accepts it for the first time."""
    BEHIND = "behind"
    """The same name, and something behind it changed: kernel version, block size, layout…"""


@dataclass(frozen=True, slots=True)
class CellChange:
    """One cell that changed between `before` and `after`.

    Each of `reasons` is a sentence; `behind` holds what changed behind the names, as
    `(what, before, after)`. `untrusted` names what makes either side's answer doubtful.
    """

    capability: str
    kind: ChangeKind
    before: CellAnswer
    after: CellAnswer
    before_version: str
    after_version: str
    reasons: tuple[str, ...]
    behind: tuple[tuple[str, Any, Any], ...]

    @property
    def cell_id(self) -> str:
        return f"{self.capability} {self.before.cell.text}"

    @property
    def change_id(self) -> str:
        """The cell and both versions: a cell may change at every step of several."""
        return f"{self.cell_id} {self.before_version} {self.after_version}"

    @property
    def untrusted(self) -> tuple[str, ...]:
        return (*self.before.untrusted, *self.after.untrusted)


@dataclass(frozen=True, slots=True)
class Step:
    """One version to the next on one device: what changed, and what could not be compared."""

    capability: str
    before: VersionAnswer
    after: VersionAnswer
    changes: tuple[CellChange, ...]
    unchanged: int
    undecided: tuple[CellAnswer, ...]
    pins: tuple[tuple[str, str, str], ...]


def compare(before: VersionAnswer, after: VersionAnswer) -> Step:
    """Lay the answers of two versions side by side.

    A cell whose selection could not be evaluated on either side is in `undecided`, and in no count.
    """
    changes = []
    undecided = []
    unchanged = 0
    for text, old in before.cells.items():
        new = after.cells[text]
        doubtful = next((one for one in (old, new) if not _evaluated(one)), None)
        if doubtful is not None:
            undecided.append(doubtful)
            continue
        behind = tuple(_behind(old, new))
        kind = _kind(old, new, behind)
        if kind is None:
            unchanged += 1
            continue
        changes.append(
            CellChange(
                capability=before.capability,
                kind=kind,
                before=old,
                after=new,
                before_version=before.version,
                after_version=after.version,
                reasons=tuple(_reasons(old, new, before, after)),
                behind=behind,
            )
        )
    return Step(
        before.capability,
        before,
        after,
        tuple(changes),
        unchanged,
        tuple(undecided),
        tuple(_pin_changes(before, after)),
    )


def _evaluated(answer: CellAnswer) -> bool:
    return not any(text.startswith("selection") for text in answer.not_evaluated)


def _kind(
    old: CellAnswer, new: CellAnswer, behind: Sequence[tuple[str, Any, Any]]
) -> ChangeKind | None:
    if old.backend != new.backend:
        if new.backend is None:
            return ChangeKind.LOST
        return ChangeKind.GAINED if old.backend is None else ChangeKind.DEFAULT
    return ChangeKind.BEHIND if behind else None


_LAYOUTS = {"NHD": "LBNHC", "HND": "LBHNC"}
"""0.2x's names of a cache layout in the words of 0.30 and later."""


def _behind(old: CellAnswer, new: CellAnswer) -> Iterator[tuple[str, Any, Any]]:
    """What differs behind the names; a part that one side could not tell is left out.

    0.2x names the one layout a backend demands, later versions list those it takes, the preferred
    one first: the first is compared.
    """
    for key in dict.fromkeys([*old.behind, *new.behind]):
        before, after = old.behind.get(key), new.behind.get(key)
        untold = {text.partition(":")[0] for text in (*old.not_evaluated, *new.not_evaluated)}
        if before == after or key in untold:
            continue
        if key == "kv_cache_layout" and _first_layout(before) == _first_layout(after):
            continue
        if old.backend is not None and new.backend is not None:
            yield key, before, after


def _first_layout(text: str | None) -> str:
    """The layout that is used; where a backend names none, the engine's own."""
    first = (text or "NHD").partition(",")[0]
    return _LAYOUTS.get(first, first)


def _reasons(
    old: CellAnswer, new: CellAnswer, before: VersionAnswer, after: VersionAnswer
) -> Iterator[str]:
    """Why the choice moved: what happened to the old backend, and to the new one."""
    if old.model_override != new.model_override:
        if new.model_override:
            yield f"{new.model_override} since {after.version}"
        if old.model_override:
            yield f"{old.model_override} up to {before.version} only"
    if old.backend == new.backend:
        return
    if old.backend is not None:
        yield from _fate_of_old(old.backend, new, before, after)
    if new.backend is not None:
        yield from _rise_of_new(new.backend, old, before, after)


def _fate_of_old(
    name: str, new: CellAnswer, before: VersionAnswer, after: VersionAnswer
) -> Iterator[str]:
    where = before.capability
    now = _find(new.candidates, name)
    if new.forced and new.backend is None and name in after.registered:
        yield f"{name} was asked for, and is refused since {after.version}: {plain(new.refused)}"
    elif now is None:
        if name not in after.registered:
            yield f"{name} no longer exists in {after.version}"
        elif new.candidates:
            yield f"{name} is no longer tried on {where} for such a layer since {after.version}"
        elif new.refused:
            yield f"{after.version} refuses the cell: {plain(new.refused)}"
    elif now.reasons:
        yield f"{name} was dropped on {where}: {', '.join(now.reasons)} since {after.version}"
    elif new.backend is not None:
        yield f"{name} is still valid on {where}; {new.backend} is tried before it"


def _rise_of_new(
    name: str, old: CellAnswer, before: VersionAnswer, after: VersionAnswer
) -> Iterator[str]:
    then = _find(old.candidates, name)
    if old.forced and old.backend is None and name in before.registered:
        yield f"{name} was asked for, and {before.version} refused it: {plain(old.refused)}"
    elif name not in before.registered:
        yield f"{name} is new since {after.version}"
    elif then is None:
        if old.candidates:
            yield f"{name} is tried for such a layer since {after.version}"
        elif old.refused:
            yield f"{before.version} refused the cell: {plain(old.refused)}"
    elif then.reasons:
        yield f"{name} was refused by {before.version}: {', '.join(then.reasons)}"
    elif old.backend is not None:
        yield f"{name} was valid in {before.version} too, after {old.backend}"


def _find(candidates: Sequence[Candidate], name: str) -> Candidate | None:
    return next((one for one in candidates if one.backend == name), None)


def _pin_changes(before: VersionAnswer, after: VersionAnswer) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys([*before.requires, *after.requires]):
        old, new = before.requires.get(name, "not pinned"), after.requires.get(name, "not pinned")
        if old != new:
            yield name, old, new
