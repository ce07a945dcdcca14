"""Backends under a traffic, told: table, JSON, and the command that measures what is missing.

Seconds become milliseconds, and shares percent, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from shlex import quote
from typing import Any

from attnbench.choose.itl import VALUES, Answer, Unanswered, UserAnswer
from attnbench.choose.loads import SHARES, Load
from attnbench.choose.report import REPLICATES
from attnbench.upgrade.cost_report import brace

KIND = "itl"
"""By which the pages know a saved answer."""
_LONGEST = 2000
"""Characters of batches that anybody would paste."""


def columns(found: Answer) -> dict[str, tuple[float, float, float]]:
    """By the names on the way out: value, low, high."""
    told = {}
    for name in VALUES:
        one, scale = found.values[name], _scale(name)
        told[_name(name)] = (scale * one.value, scale * one.low, scale * one.high)
    return told


def text_rows(found: UserAnswer) -> list[dict[str, Any]]:
    """A line a backend, each number with its limits behind it."""
    return [
        {
            "backend": one.name,
            **{name: _text(*three) for name, three in columns(one).items()},
            "steps": one.num_steps,
            "extrapolated_pct": "" if one.choice is None else f"{100 * one.beyond:.3g}",
        }
        for one in found.answers
    ]


def number_rows(found: UserAnswer) -> list[dict[str, Any]]:
    """The same with a column a number; the roofline has no limits."""
    rows = []
    for one in found.answers:
        row: dict[str, Any] = {"backend": one.name, "scope": found.scope}
        for name, (value, low, high) in columns(one).items():
            row |= {name: _none(value), f"{name}_low": _none(low), f"{name}_high": _none(high)}
        rows.append(row | _rest(one))
    return rows


def to_json(
    found: UserAnswer, measure: str, asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything, for programs and for the pages; `asked`: what was asked, of which times."""
    return {
        "kind": KIND,
        **(asked or {}),
        "scope": found.scope,
        "shares": list(SHARES),
        "batches": found.num_batches,
        "backends": [
            {
                "backend": one.name,
                "is_bound": one.choice is None,
                **{
                    name: dict(zip(("value", "low", "high"), map(_none, three), strict=True))
                    for name, three in columns(one).items()
                },
                **_rest(one),
                "curves": {
                    f"{name.removesuffix('_s')}_ms": [1e3 * value for value in values]
                    for name, values in one.curves.items()
                },
                "loads": [_load(load, one.choice is None) for load in one.loads],
            }
            for one in found.answers
        ],
        "not_measured": [
            {"backend": one.request, "reason": one.reason, "batches": len(one.to_measure)}
            for one in found.unanswered
        ],
        "measure": measure,
    }


def measure_command(
    lacking: Sequence[Unanswered],
    suites: Mapping[str, str],
    run_words: str,
    is_empty: bool = False,
) -> str:
    """The one line for all that is missing and a run can mend; "": nothing.

    Args:
        suites: the batches as suites: taken where they are too many to paste; by their names, the
            `attnbench traffic` commands that write them.
        run_words: how the other times were measured, ` --timer event` and the like.
        is_empty: nothing is stored and nobody asked for: whoever can is measured.
    """
    wanted = [one for one in lacking if one.to_measure]
    if not wanted and not is_empty:
        return ""
    tail = "".join(f" --backend {quote(one.request)}" for one in wanted)
    tail += f" --replicates {REPLICATES}{run_words}"
    texts = dict.fromkeys(workload.text for one in wanted for workload in one.to_measure)
    words = brace(list(texts)) if wanted else None
    if words is not None and len(words) <= _LONGEST:
        return f"attnbench run {quote(words)}{tail}"
    names = "".join(f" --suite {name}" for name in suites)
    return f"{' && '.join(suites.values())} && attnbench run{names} --preset full{tail}"


def _rest(one: Answer) -> dict[str, Any]:
    is_bound = one.choice is None
    return {
        "steps": one.num_steps,
        "extrapolated_pct": None if is_bound else 100 * one.beyond,
        "left_out_error_pct": None if is_bound else 100 * one.left_out_error,
        "replicates": None if is_bound else one.replicates,
    }


def _load(load: Load, is_bound: bool) -> dict[str, Any]:
    return {
        "load": load.load,
        "requests_per_s": _none(load.requests_per_s),
        "concurrency": load.concurrency,
        **{_name(name): _none(_scale(name) * load.values[name]) for name in VALUES},
        "extrapolated_pct": None if is_bound else 100 * load.beyond,
    }


def _name(name: str) -> str:
    if name.endswith("_share"):
        return name.removesuffix("_share") + "_pct"
    return name if name.startswith("tokens") else name.removesuffix("_s") + "_ms"


def _scale(name: str) -> float:
    if name.endswith("_share"):
        return 100.0
    return 1.0 if name.startswith("tokens") else 1e3


def _none(value: float) -> float | None:
    return None if isnan(value) else value


def _text(value: float, low: float, high: float) -> str:
    if isnan(value):
        return ""
    return f"{value:.4g}" + (f" [{low:.4g}, {high:.4g}]" if not isnan(low) else "")
