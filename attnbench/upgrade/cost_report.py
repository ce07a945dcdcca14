"""Costs told in a few words, as JSON, and as the one command that measures what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

from attnbench.history.rule import Estimate
from attnbench.history.wording import interval_text
from attnbench.upgrade.compare import CellChange
from attnbench.upgrade.cost import Cost, CostVerdict, Part
from attnbench.upgrade.stored import Timed, Wanted

RULE = "docs/verdict.md, by batch; limits of the mix are the weighted sums of the batches' limits"
REPLICATES = 3


def cost_texts(costs: Sequence[Cost]) -> dict[str, str]:
    """By `change_id`: `slower, +18.4 % [+15.9, +21.0] on nvidia-h200`."""
    said: dict[str, dict[str, None]] = {}
    for cost in costs:
        for change in cost.changes:
            said.setdefault(change.change_id, {})[cost_text(cost)] = None
    return {key: "; ".join(texts) for key, texts in said.items()}


def cost_text(cost: Cost) -> str:
    """The verdict with its ratio, and what it rests on."""
    text = str(cost.verdict)
    if cost.ratio is not None and cost.how is not None:
        text += f", {interval_text(cost.ratio)} on {cost.how.device_class}"
    if len(cost.changes) > 1 and cost.ratio is not None:
        text += f" ({len(cost.changes)} kinds of layers together)"
    if cost.why:
        text += f": {cost.why}"
    if not cost.is_certain:
        text += " (whether the default changes is not certain)"
    return text


def costs_json(costs: Sequence[Cost]) -> dict[str, list[dict[str, Any]]]:
    """By `change_id`, one object a device class; seconds are of one layer's call."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cost in costs:
        for change in cost.changes:
            found.setdefault(change.change_id, []).append(_cost(cost, change))
    return found


def _cost(cost: Cost, change: CellChange) -> dict[str, Any]:
    how = cost.how
    return {
        "verdict": str(cost.verdict),
        "why": cost.why,
        "certain": cost.is_certain,
        **_ratio(cost.ratio),
        "rule": RULE,
        "device_class": how.device_class if how else None,
        "timer": how.timer if how else None,
        "l2_state": how.l2_state if how else None,
        "execution": how.execution if how else None,
        "protocol_version": how.protocol_version if how else None,
        "together_with": [one.cell_id for one in cost.changes if one is not change],
        "batches": [_part(part) for one, part in cost.parts if one is change],
        "notes": list(cost.notes),
        "measure": measure_command(cost, change),
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "batch": part.batch,
        "weight": part.weight,
        "same_kernels": part.same_kernels,
        **_ratio(part.ratio),
        "before": _timed(part.before),
        "after": _timed(part.after),
        "why": part.why,
    }


def _ratio(ratio: Estimate | None) -> dict[str, Any]:
    if ratio is None:
        return {"ratio": None, "low": None, "high": None}
    enough = ratio.enough
    return {
        "ratio": ratio.ratio,
        "low": ratio.low if enough else None,
        "high": ratio.high if enough else None,
    }


def _timed(timed: Timed | None) -> dict[str, Any] | None:
    if timed is None:
        return None
    return {
        "backend": timed.kernels,
        "seconds": timed.seconds,
        "replicates": list(timed.replicates),
        "run_id": timed.run_id,
        "stack": list(timed.stack),
    }


def missing_points(costs: Sequence[Cost]) -> list[Wanted]:
    """Both sides of every batch without a pair of times, none twice: together in one run."""
    wanted: dict[Wanted, None] = {}
    for cost in costs:
        if cost.verdict not in (CostVerdict.NOT_MEASURED, CostVerdict.UNDECIDED):
            continue
        for _, part in cost.parts:
            if part.wanted and (part.ratio is None or not part.ratio.enough):
                wanted |= dict.fromkeys(part.wanted)
    return list(wanted)


def measure_command(cost: Cost, change: CellChange) -> str | None:
    """One `attnbench run` for a change's missing batches; None where no one command does it."""
    mine = tuple(pair for pair in cost.parts if pair[0] is change)
    points = missing_points([replace(cost, parts=mine)])
    words = brace([one.workload.text for one in points]) if points else None
    if words is None:
        return None
    requests = dict.fromkeys(f"--backend {one.kernels.request}" for one in points)
    return f"attnbench run {quote(words)} {' '.join(requests)} --replicates {REPLICATES}"


_DEFAULTS = {"block": "16", "layout": "NHD", "kv": "auto", "prefix": "0", "seed": "0"}
"""Values a canonical workload text leaves out, for texts that are written as one."""


def brace(texts: Sequence[str]) -> str | None:
    """One text whose braces stand for all of `texts`, and perhaps for more; None: there is none."""
    words = [text.split() for text in texts]
    specs = list(dict.fromkeys(one[0] for one in words))
    features = [dict(word.split("=", 1) for word in one[1:]) for one in words]
    parts = [_choice(specs)]
    for key in sorted({key for one in features for key in one}):
        if key not in _DEFAULTS and any(key not in one for one in features):
            return None
        values = dict.fromkeys(one.get(key, _DEFAULTS.get(key, "")) for one in features)
        parts.append(f"{key}={_choice(list(values))}")
    return " ".join(parts)


def _choice(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else "{" + ",".join(values) + "}"
