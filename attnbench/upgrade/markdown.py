"""An upgrade as Markdown that reads well in a pull request.

Devices on which the same cells change in the same way share a row: on most upgrades there are few
different answers, and a device each would hide that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attnbench.upgrade.compare import ChangeKind, Step
from attnbench.upgrade.report import ChangeGroup, groups_of, headline, sentences

_TITLES = {
    ChangeKind.LOST: "No backend any more",
    ChangeKind.DEFAULT: "Another default",
    ChangeKind.BEHIND: "The same name, another kernel or setting behind it",
    ChangeKind.GAINED: "A backend for the first time",
}


def markdown(steps: Sequence[Step], costs: Mapping[str, str], title: str, command: str = "") -> str:
    """The whole answer. `costs` says the cost of a change by its `change_id`.

    `command` is what writes the same again, "" to leave it out.
    """
    lines = [f"# {title}", ""]
    if command:
        lines += [f"Written by `{command}`.", ""]
    lines += [*_basis(steps), ""]
    for pair, mine in _by_versions(steps).items():
        lines += [f"## {pair[0]} → {pair[1]}", "", *_section(mine, costs)]
    return "\n".join(lines).rstrip() + "\n"


def _by_versions(steps: Iterable[Step]) -> dict[tuple[str, str], list[Step]]:
    found: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        found.setdefault((step.before.version, step.after.version), []).append(step)
    return found


def _basis(steps: Sequence[Step]) -> Iterator[str]:
    """How the answers came about, what they assume, and how many of them are doubtful."""
    answers = {
        (side.version, side.capability): side
        for step in steps
        for side in (step.before, step.after)
    }
    cells = [cell for side in answers.values() for cell in side.cells.values()]
    how = " and ".join(sorted({side.how for side in answers.values()}))
    doubtful = sum(not cell.trusted for cell in cells)
    trust = f"{doubtful:,} of them are not certain" if doubtful else "none of them is doubtful"
    facts = next(iter(answers.values())).facts if answers else {}
    assumed = ", ".join(f"{name} {'yes' if holds else 'no'}" for name, holds in facts.items())
    yield f"{len(cells):,} answers ({how}); {trust}. Assumed of the host: {assumed}."
    yield "A cell is one attention layer; what its text leaves out is head size 128, 32 query"
    yield "heads on 8 KV heads, bf16, a plain causal decoder. Device numbers are compute"
    yield "capabilities."


def _section(steps: Sequence[Step], costs: Mapping[str, str]) -> Iterator[str]:
    groups = [group for step in steps for group in groups_of([step])]
    yield from _tally(steps, groups)
    pins = dict.fromkeys(pin for step in steps for pin in step.pins)
    if pins:
        texts = (f"{name} {old} → {new}" for name, old, new in pins)
        yield f"Pinned versions: {'; '.join(texts)}."
        yield ""
    for kind, title in _TITLES.items():
        rows = _merged((group for group in groups if group.kind is kind), costs)
        if rows:
            yield from [f"### {title}", "", *_table(rows, costs), ""]
    undecided = Counter(
        (answer.cell.text, "; ".join(answer.not_evaluated))
        for step in steps
        for answer in step.undecided
    )
    if undecided:
        yield from ["### Not decided", ""]
        for (cell, why), count in undecided.items():
            yield f"- `{cell}` on {count} {'device' if count == 1 else 'devices'}: {_flat(why)}"
        yield ""


def _tally(steps: Sequence[Step], groups: Sequence[ChangeGroup]) -> Iterator[str]:
    counts: dict[str, Counter[ChangeKind]] = {step.capability: Counter() for step in steps}
    for group in groups:
        counts[group.capability][group.kind] += len(group.changes)
    same = [step for step in steps if not counts[step.capability] and not step.undecided]
    if len(same) < len(steps):
        yield f"| device | {' | '.join(_TITLES.values())} | unchanged | not decided |"
        yield "|---|" + "--:|" * (len(_TITLES) + 2)
        for step in steps:
            if step in same:
                continue
            kinds = counts[step.capability]
            rest = len(step.before.cells) - kinds.total() - len(step.undecided)
            numbers = [*(kinds[kind] for kind in _TITLES), rest, len(step.undecided)]
            yield f"| {step.capability} | {' | '.join(map(str, numbers))} |"
        yield ""
    if same:
        where = ", ".join(step.capability for step in same)
        yield f"Nothing changes on {where} ({len(same[0].before.cells)} cells)."
        yield ""


def _merged(groups: Iterable[ChangeGroup], costs: Mapping[str, str]) -> list[list[ChangeGroup]]:
    """Groups that differ in nothing but the device as one; the largest first."""
    found: dict[tuple[object, ...], list[ChangeGroup]] = {}
    for group in groups:
        said = tuple(_without_device(text, group.capability) for text in sentences(group))
        cells = tuple(cell.text for cell in group.cells)
        key = (headline(group), said, cells, _costs([group], costs))
        found.setdefault(key, []).append(group)
    return sorted(found.values(), key=lambda same: -len(same[0].changes) * len(same))


def _without_device(text: str, capability: str, devices: str = "…") -> str:
    return text.replace(f" on {capability}", f" on {devices}")


def _table(rows: Sequence[Sequence[ChangeGroup]], costs: Mapping[str, str]) -> Iterator[str]:
    names = ["device", "change", "cells", "which", "why", *(["cost"] if costs else [])]
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        first = row[0]
        devices = ", ".join(group.capability for group in row)
        why = [_without_device(text, first.capability, devices) for text in sentences(first)]
        values = [
            devices,
            _flat(headline(first)),
            str(len(first.changes)),
            _cells(first),
            _flat(". ".join(why)),
            *([_flat(_costs(row, costs))] if costs else []),
        ]
        yield f"| {' | '.join(values)} |"


def _costs(groups: Iterable[ChangeGroup], costs: Mapping[str, str]) -> str:
    changes = [change for group in groups for change in group.changes]
    said = {costs[one.change_id]: None for one in changes if one.change_id in costs}
    return "; ".join(said)


def _cells(group: ChangeGroup, limit: int = 4) -> str:
    """The first few cells of many, as code."""
    texts = [cell.text.replace("`", "'").replace("|", "\\|") for cell in group.cells]
    rest = len(texts) - limit
    shown = "; ".join(f"`{text}`" for text in texts[:limit])
    return shown + (f"; and {rest} more" if rest > 0 else "")


def _flat(text: str) -> str:
    """Text for a table: one line, and no markup of its own."""
    line = " ".join(text.split())
    for character in "\\|<*`":
        line = line.replace(character, f"\\{character}")
    return line
