"""One upgrade as one page: everything `attnbench upgrade --format json` says, in a single file.

The page is to be sent to somebody, so style, scripts and data are inside it and nothing is loaded
from elsewhere. Summary and table are in the HTML and read without scripts; a script filters the
table and opens a cell's details, which are too many to be laid out beforehand.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from attnbench.dashboard.pages import write_text_atomically
from attnbench.dashboard.script import to_json
from attnbench.store.disk import writing

_KINDS = {
    "lost": "no backend any more",
    "default": "another default",
    "behind": "same name, another kernel or setting",
    "gained": "a backend for the first time",
}
_COSTS = ("slower", "lost", "undecided", "not measured", "faster", "same")
"""Verdicts on a cost, what needs action first."""

_SIGNS = {
    "slower": "▲",
    "faster": "▼",
    "same": "=",
    "undecided": "?",
    "not measured": "?",
    "lost": "×",
}
_CLASSES = {
    "slower": "regression",
    "lost": "regression",
    "faster": "improvement",
    "same": "unchanged",
    "undecided": "undecided",
    "not measured": "undecided",
}


def write_upgrade_page(answer: Mapping[str, Any], path: Path) -> None:
    """Write the page of `answer`, the document of `attnbench upgrade --format json`, to `path`.

    Raises InfrastructureError on a full disk, ResultsFolderError if `path` cannot be written.
    """
    in_site = (path.parent / "data" / "index.js").is_file()
    text = upgrade_page(answer, home="index.html" if in_site else "")
    with writing(path):
        write_text_atomically(path, text)


def upgrade_page(answer: Mapping[str, Any], *, home: str = "") -> str:
    """The page as text; `home` is the address of the overview it belongs to."""
    from attnbench.dashboard.site import jinja_environment

    assets = resources.files("attnbench.dashboard") / "assets"
    steps = answer["steps"]
    context = {
        "home": home,
        "title": f"vLLM {' → '.join(_versions(steps))}: attention backends",
        "devices": _unique(step["capability"] for step in steps),
        "obtained": list(_obtained(steps)),
        "assumed": _assumed(steps),
        "verdict": _verdict(steps),
        "tallies": _tallies(steps),
        "judged": any(change["cost"] for step in steps for change in step["changes"]),
        "rows": _rows(steps),
        "kinds": _KINDS,
        "settings": answer.get("settings") or [],
        "undecided": list(_undecided(steps)),
        "pins": list(_pins(steps)),
        "styles": [
            (assets / name).read_text(encoding="utf-8") for name in ("style.css", "upgrade.css")
        ],
        "scripts": [
            (assets / name).read_text(encoding="utf-8") for name in ("common.js", "upgrade.js")
        ],
        "data": to_json(_details(steps)),
    }
    return jinja_environment().get_template("upgrade.html.j2").render(**context)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _versions(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return _unique(step[side]["version"] for step in steps for side in ("from", "to"))


def _device(capability: str) -> str:
    return "CPU" if capability == "cpu" else capability


def _obtained(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One line a version: how its answers came about, and how many cannot be relied on."""
    found: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for step in steps:
        for side in (step["from"], step["to"]):
            counts = found.setdefault((side["version"], side["how"]), {})
            counts[step["capability"]] = (side["not_trusted"], step["cells"])
    for (version, how), counts in found.items():
        doubtful = sum(one for one, _ in counts.values())
        total = sum(cells for _, cells in counts.values())
        trust = f"{doubtful:,} of {total:,} not certain" if doubtful else "all certain"
        yield f"{version}: {total:,} answers, {how}; {trust}"


def _assumed(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (name, "yes" if holds else "no")
        for name, holds in (steps[0]["from"]["assumed"] if steps else {}).items()
    ]


def _cost_of(changes: Iterable[Mapping[str, Any]]) -> str:
    """The verdict that needs action first, "" where nothing was judged."""
    found = {cost["verdict"] for change in changes for cost in change["cost"] or ()}
    return next((one for one in _COSTS if one in found), "")


def _tallies(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a step and device: changed cells by kind, and by cost; slower ones first."""
    tallies = []
    for step in steps:
        grouped = {cell for group in step["groups"] for cell in group["cells"]}
        kinds: Counter[str] = Counter()
        costs: Counter[str] = Counter()
        for change in step["changes"]:
            if change["cell_id"] in grouped:
                kinds[change["kind"]] += 1
                costs[_cost_of([change])] += 1
        tallies.append(
            {
                "device": _device(step["capability"]),
                "versions": f"{step['from']['version']} → {step['to']['version']}",
                "kinds": kinds,
                "costs": [(one, _CLASSES[one], costs[one]) for one in _COSTS if costs[one]],
                "slower": costs["slower"],
                "undecided": len(step["undecided"]),
                "cells": step["cells"],
                "same": step["cells"] - len(step["undecided"]) - sum(kinds.values()),
            }
        )
    return sorted(tallies, key=lambda one: -one["slower"])


def _verdict(steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The box on top: the one thing to know, in a word and a sentence."""
    changes = [change for step in steps for change in step["changes"]]
    slower = _cells(one for one in changes if _cost_of([one]) == "slower")
    lost = _cells(one for one in changes if one["kind"] == "lost")
    default = _cells(one for one in changes if one["kind"] == "default")
    judged = any(one["cost"] for one in changes)
    if slower:
        first = ("regression", "▲", f"SLOWER in {_count(slower)}")
    elif lost:
        first = ("regression", "×", f"NO BACKEND any more for {_count(lost)}")
    elif default:
        first = ("undecided", "→", f"ANOTHER DEFAULT for {_count(default)}")
    else:
        first = ("unchanged", "=", "NO DEFAULT CHANGES")
    also = [
        f"{_count(found)} {text}"
        for found, text in ((lost, "without a backend"), (default, "with another default"))
        if found and not first[2].endswith(_count(found))
    ]
    if not judged and changes:
        also.append("whether any is slower was not asked (--batch)")
    return {
        "class": first[0],
        "sign": first[1],
        "word": first[2],
        "sentence": "; ".join(also)[:1].upper() + "; ".join(also)[1:] + ("." if also else ""),
    }


def _cells(changes: Iterable[Mapping[str, Any]]) -> set[str]:
    return {change["cell_id"] for change in changes}


def _count(cells: set[str]) -> str:
    return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}"


def _rows(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a change group: slower ones first, then by kind, then the larger ones."""
    rows = []
    for step in steps:
        changes = {change["cell_id"]: change for change in step["changes"]}
        for group in step["groups"]:
            cost = _cost_of(changes[cell] for cell in group["cells"])
            rows.append(
                {
                    "device": _device(step["capability"]),
                    "versions": f"{step['from']['version']} → {step['to']['version']}",
                    "kind": group["kind"],
                    "headline": group["headline"],
                    "why": group["why"],
                    "trusted": group["trusted"],
                    "cells": [(one, one.partition(" ")[2]) for one in group["cells"]],
                    "cost": cost or "not judged",
                    "cost_class": _CLASSES.get(cost, "quiet"),
                    "cost_sign": _SIGNS.get(cost, ""),
                    "cost_text": _cost_text(changes[cell] for cell in group["cells"]),
                }
            )
    order = {kind: place for place, kind in enumerate(_KINDS)}
    costs = {cost: place for place, cost in enumerate(_COSTS)}
    return sorted(
        rows,
        key=lambda row: (
            row["cost"] != "slower",
            order[row["kind"]],
            costs.get(row["cost"], len(costs)),
            -len(row["cells"]),
        ),
    )


def _cost_text(changes: Iterable[Mapping[str, Any]]) -> str:
    """The change of time of the group's cells, from the least to the greatest, and where."""
    ratios = []
    devices = []
    for change in changes:
        for cost in change["cost"] or ():
            if cost["ratio"] is not None:
                ratios.append(cost["ratio"])
                devices.append(cost["device_class"])
    if not ratios:
        return ""
    ends = _unique(f"{(ratio - 1) * 100:+.1f} %" for ratio in (min(ratios), max(ratios)))
    return f"{' … '.join(ends).replace('-', '−')} on {', '.join(_unique(devices))}"


def _undecided(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in steps:
        for one in step["undecided"]:
            yield {
                "device": _device(step["capability"]),
                "versions": f"{step['from']['version']} → {step['to']['version']}",
                **one,
            }


def _pins(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every package once for each pair of versions: pins do not depend on the device."""
    told = set()
    for step in steps:
        versions = f"{step['from']['version']} → {step['to']['version']}"
        for pin in step["pins"]:
            if (versions, pin["package"]) not in told:
                told.add((versions, pin["package"]))
                yield {"versions": versions, **pin}


def _details(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every changed cell by its id; sides and candidate lists that repeat are kept once."""
    kept: dict[str, list[Any]] = {"candidates": [], "sides": []}
    places: dict[tuple[str, str], int] = {}

    def place(what: str, value: Any) -> int:
        key = (what, json.dumps(value, sort_keys=True))
        if key not in places:
            places[key] = len(kept[what])
            kept[what].append(value)
        return places[key]

    cells: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        for change in step["changes"]:
            one = {key: value for key, value in change.items() if key != "cell_id"}
            one["versions"] = [step["from"]["version"], step["to"]["version"]]
            one["how"] = [step["from"]["how"], step["to"]["how"]]
            for side in ("before", "after"):
                full = dict(change[side])
                full["candidates"] = place("candidates", full["candidates"])
                one[side] = place("sides", full)
            cells.setdefault(change["cell_id"], []).append(one)
    return {**kept, "cells": cells, "kinds": _KINDS, "signs": _SIGNS}
