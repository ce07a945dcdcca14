"""An upgrade told as a table and as JSON; `markdown.py` has it for a pull request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import CellChange, ChangeKind, Step
from attnbench.upgrade.probe import CellAnswer, VersionAnswer

SCHEMA_VERSION = 1
"""Of the JSON; docs/upgrade.md says what changed with each."""

_MINOR = frozenset({"kernel_block_sizes"})
"""Wider lists of what a kernel takes: no other kernel runs for it. In the JSON only."""


@dataclass(frozen=True, slots=True)
class ChangeGroup:
    """Changes of several cells that are one change: same backends, same reasons."""

    capability: str
    kind: ChangeKind
    before: str
    after: str
    before_version: str
    after_version: str
    reasons: tuple[str, ...]
    behind: tuple[tuple[str, str, str], ...]
    depends_on: tuple[str, ...]
    untrusted: tuple[str, ...]
    changes: tuple[CellChange, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(change.before.cell for change in self.changes)


def groups_of(steps: Iterable[Step], *, minor: bool = False) -> list[ChangeGroup]:
    """The changes of all steps, those that are one change together, defaults first.

    Args:
        minor: keep cells in which only a list of accepted block sizes grew.
    """
    found: dict[tuple[Any, ...], list[CellChange]] = {}
    for step in steps:
        for change in step.changes:
            if not minor and _is_minor(change):
                continue
            found.setdefault(_key(change), []).append(change)
    groups = [_group(key, changes) for key, changes in found.items()]
    order = [ChangeKind.LOST, ChangeKind.DEFAULT, ChangeKind.BEHIND, ChangeKind.GAINED]
    return sorted(groups, key=lambda group: order.index(group.kind))


def _is_minor(change: CellChange) -> bool:
    return change.kind is ChangeKind.BEHIND and all(key in _MINOR for key, _, _ in change.behind)


def _key(change: CellChange) -> tuple[Any, ...]:
    # What is behind two different backends is no news of its own: the default's change is.
    behind = change.behind if change.kind is ChangeKind.BEHIND else ()
    return (
        change.before_version,
        change.after_version,
        change.capability,
        change.kind,
        change.before.backend,
        change.after.backend,
        change.reasons,
        tuple((key, _say(old), _say(new)) for key, old, new in behind if key not in _MINOR),
        change.after.depends_on,
        change.untrusted,
    )


def _group(key: tuple[Any, ...], changes: Sequence[CellChange]) -> ChangeGroup:
    first = changes[0]
    return ChangeGroup(
        capability=first.capability,
        kind=first.kind,
        before=first.before.backend or "",
        after=first.after.backend or "",
        before_version=first.before_version,
        after_version=first.after_version,
        reasons=first.reasons,
        behind=key[7],
        depends_on=first.after.depends_on,
        untrusted=first.untrusted,
        changes=tuple(changes),
    )


def _say(value: Any) -> str:
    return "not stated" if value is None else str(value)


_WHAT = {
    "flash_attn_version": "FlashAttention",
    "flashinfer_decode": "decode kernels",
    "flashinfer_prefill": "prefill kernels",
    "mla_prefill_backend": "MLA prefill backend",
    "kernel_block_sizes": "kernel block sizes",
    "preferred_block_size": "block size",
    "kv_cache_layout": "KV cache layout",
    "effective_kv_cache_dtype": "KV cache dtype",
    "cudagraph_support": "CUDA graphs",
    "reorder_batch_threshold": "decode up to (new tokens)",
}


def headline(group: ChangeGroup) -> str:
    """The change in a few words: `FLASHINFER → FLASH_ATTN`."""
    if group.kind is ChangeKind.LOST:
        return f"{group.before} → no backend"
    if group.kind is ChangeKind.GAINED:
        return f"no backend → {group.after}"
    if group.kind is ChangeKind.DEFAULT:
        return f"{group.before} → {group.after}"
    changed = "; ".join(f"{_WHAT.get(key, key)} {old} → {new}" for key, old, new in group.behind)
    return f"{group.before}: {changed}"


def why(group: ChangeGroup) -> str:
    """`sentences` as one text."""
    return ". ".join(sentences(group))


def sentences(group: ChangeGroup) -> list[str]:
    """Every reason, dependency and doubt of the change."""
    said = list(group.reasons)
    said += [f"holds with {one}" for one in group.depends_on]
    said += [f"not certain: {one}" for one in group.untrusted]
    unasked: dict[str, int] = {}
    for change in group.changes:
        for name in change.before.not_asked:
            unasked[name] = unasked.get(name, 0) + 1
    for name, count in sorted(unasked.items()):
        of = f" (in {count} of these cells)" if count < len(group.changes) else ""
        said.append(f"{group.before_version}'s selector does not ask about {name}{of}")
    return said


def cell_texts(group: ChangeGroup, limit: int = 4) -> str:
    """The group's cells, the first few of many."""
    texts = [cell.text for cell in group.cells]
    rest = len(texts) - limit
    return "; ".join(texts[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def table_rows(groups: Iterable[ChangeGroup], costs: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a group. `costs` says the cost of a change by its `change_id`."""
    return [
        {
            "device": group.capability,
            "from": group.before_version,
            "to": group.after_version,
            "change": headline(group),
            "cells": len(group.changes),
            "which": cell_texts(group),
            "why": why(group),
            "cost": _cost_of(group, costs),
        }
        for group in groups
    ]


def _cost_of(group: ChangeGroup, costs: Mapping[str, str]) -> str:
    said = {costs[one.change_id]: None for one in group.changes if one.change_id in costs}
    return "; ".join(said)


def summary(step: Step) -> str:
    """One line of a step: how many cells change, and how far the answers can be trusted."""
    kinds = Counter(change.kind for change in step.changes if not _is_minor(change))
    words = {
        ChangeKind.DEFAULT: "another default backend",
        ChangeKind.LOST: "none any more",
        ChangeKind.GAINED: "one for the first time",
        ChangeKind.BEHIND: "the same name with another kernel or setting behind it",
    }
    counts = ", ".join(f"{kinds[kind]} {text}" for kind, text in words.items() if kinds[kind])
    undecided = f"; {len(step.undecided)} not decided" if step.undecided else ""
    return (
        f"{step.before.version} → {step.after.version} on {step.capability}: of "
        f"{len(step.before.cells)} cells {counts or 'none changes'}{undecided}; {_trust(step)}"
    )


def _trust(step: Step) -> str:
    both = [*step.before.cells.values(), *step.after.cells.values()]
    doubtful = sum(not answer.trusted for answer in both)
    how = {step.before.how, step.after.how}
    said = " and ".join(sorted(how))
    return f"answers {said}" + (f", {doubtful} of {len(both)} not certain" if doubtful else "")


def to_json(steps: Sequence[Step], costs: Mapping[str, Any]) -> dict[str, Any]:
    """The answer in full (docs/upgrade.md describes every key)."""
    return {
        "schema_version": SCHEMA_VERSION,
        "steps": [
            {
                "capability": step.capability,
                "from": _version(step.before),
                "to": _version(step.after),
                "cells": len(step.before.cells),
                "unchanged": step.unchanged,
                "pins": [
                    {"package": name, "before": old, "after": new} for name, old, new in step.pins
                ],
                "groups": [_group_json(group) for group in groups_of([step])],
                "changes": [_change(change, costs) for change in step.changes],
                "undecided": [
                    {"cell": answer.cell.text, "why": list(answer.not_evaluated)}
                    for answer in step.undecided
                ],
            }
            for step in steps
        ],
    }


def _group_json(group: ChangeGroup) -> dict[str, Any]:
    return {
        "kind": str(group.kind),
        "headline": headline(group),
        "before": group.before or None,
        "after": group.after or None,
        "why": sentences(group),
        "trusted": not group.untrusted,
        "cells": [change.cell_id for change in group.changes],
    }


def _version(answer: VersionAnswer) -> dict[str, Any]:
    return {
        "version": answer.version,
        "how": answer.how,
        "platform": answer.platform,
        "assumed": dict(answer.facts),
        "requires": dict(answer.requires),
        "not_trusted": sum(not one.trusted for one in answer.cells.values()),
    }


def _change(change: CellChange, costs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cell_id": change.cell_id,
        "kind": str(change.kind),
        "reasons": list(change.reasons),
        "behind": [{"what": key, "before": old, "after": new} for key, old, new in change.behind],
        "before": _side(change.before),
        "after": _side(change.after),
        "cost": costs.get(change.change_id),
    }


def _side(answer: CellAnswer) -> dict[str, Any]:
    return {
        "backend": answer.backend,
        "class": answer.backend_class,
        "behind": dict(answer.behind),
        "valid": [one.backend for one in answer.candidates if not one.reasons],
        "candidates": [asdict(one) for one in answer.candidates],
        "refused": answer.refused,
        "depends_on": list(answer.depends_on),
        "trusted": answer.trusted,
        "untrusted": list(answer.untrusted),
        "not_evaluated": list(answer.not_evaluated),
        "not_asked": list(answer.not_asked),
        "model_override": answer.model_override,
    }
