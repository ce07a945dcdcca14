"""Answers of `attnbench itl` and `attnbench choose` that were saved for the pages.

`results/answers/NAME.json` is what `--format json` printed. A file that is none is told of and left
out: a night's pages do not depend on a file that somebody typed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LATENCIES = ("itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms")
NUMBERS = (*_LATENCIES, "ttft_attention_pct", "tokens_per_s", "tokens_per_busy_s")
_OF_LOADS = ("load", "requests_per_s", "concurrency", *NUMBERS, "extrapolated_pct")
_CURVES = ("itl_ms", "itl_request_p99_ms", "ttft_ms")


@dataclass(frozen=True, slots=True)
class Answers:
    """Saved answers as plain values, each with `name`, its file's; `problems` are sentences."""

    traffic: tuple[Mapping[str, Any], ...] = ()
    advice: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()


def read_answers(folder: Path) -> Answers:
    """Read `*.json` of `folder`, in order of their names; nothing where there is no such folder."""
    found: dict[str, list[Mapping[str, Any]]] = {"itl": [], "choose": []}
    problems = []
    for path in sorted(folder.glob("*.json"), key=lambda one: one.stem):
        try:
            answer = json.loads(path.read_text(encoding="utf-8"))
            kind = answer["kind"]
            found[kind].append({"name": path.stem, **_READERS[kind](answer)})
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: cannot be read as JSON ({error}); {_MEND}")
        except (LookupError, TypeError, AttributeError) as error:
            problems.append(f"{path}: no answer of this version ({error!r}); {_MEND}")
    return Answers(tuple(found["itl"]), tuple(found["choose"]), tuple(problems))


_MEND = "save it again: attnbench itl or attnbench choose with --format json"


def _itl(answer: Mapping[str, Any]) -> dict[str, Any]:
    shares = _numbers(answer["shares"])
    return {
        "trace": str(answer["trace"]),
        "requests": _number(answer["requests"]),
        "rate_scale": _number(answer["rate_scale"]),
        "model": str(answer["model"]),
        "tp": _number(answer["tensor_parallel_size"]),
        "layer": str(answer["layer"]),
        "device": str(answer["device"]),
        "times": str(answer["times"] or ""),
        "made_up": answer["timer"] == "fake",
        "published": bool(answer["published"]),
        "driver": str(answer["driver_version"] or ""),
        "versions": _texts(answer["versions"]),
        "scope": str(answer["scope"]),
        "batches": _number(answer["batches"]),
        "shares": shares,
        "backends": [_backend(one, len(shares)) for one in answer["backends"]],
        "not_measured": [
            {"backend": str(one["backend"]), "reason": str(one["reason"])}
            for one in answer["not_measured"]
        ],
        "measure": str(answer["measure"]),
    }


def _backend(one: Mapping[str, Any], num_shares: int) -> dict[str, Any]:
    curves = {name: _numbers(one["curves"][name]) for name in _CURVES if name in one["curves"]}
    if any(len(values) != num_shares for values in curves.values()):
        raise TypeError("a curve has not as many values as there are shares")
    return {
        "backend": str(one["backend"]),
        "is_bound": bool(one["is_bound"]),
        "numbers": {
            name: [_number(one[name][limit]) for limit in ("value", "low", "high")]
            for name in NUMBERS
        },
        "steps": _number(one["steps"]),
        "extrapolated_pct": _number(one["extrapolated_pct"]),
        "left_out_error_pct": _number(one["left_out_error_pct"]),
        "replicates": _number(one["replicates"]),
        "curves": curves,
        "loads": [{name: _number(load[name]) for name in _OF_LOADS} for load in one["loads"]],
    }


def _choose(answer: Mapping[str, Any]) -> dict[str, Any]:
    whole = answer["rankings"][0]
    scope = answer["scope"] or {}
    default = answer["default"]
    flags = answer["flags"] or {"vllm": "", "words": [], "why": ""}
    return {
        "layers": _texts(one["workload"] for one in answer["layers"]),
        "batches": [
            {"batch": str(one["batch"]), "weight": _number(one["weight"])}
            for one in answer["batches"]
        ],
        "verdict": str(answer["verdict"]),
        "winner": str(whole["winner"] or ""),
        "runner_up": str(whole["runner_up"] or ""),
        "tie_class": _texts(whole["tie_class"]),
        "margin": _estimate(whole["margin"]),
        "engine": str(default["engine"]),
        "default": str(default["backend"]),
        "regret": _estimate(default["regret"]),
        "default_tied": bool(default["tied_with_winner"]),
        "default_why": str(default["why"]),
        "device": str(scope.get("device_class", "")),
        "timer": str(scope.get("timer", "")),
        "made_up": scope.get("timer") == "fake",
        "expires_at": str(scope.get("expires_at", "")),
        "measured_to": str(scope.get("measured_to", "")),
        "versions": _texts(scope.get("versions", ())),
        "vllm": str(flags["vllm"]),
        "flags": _texts(flags["words"]),
        "flags_why": str(flags["why"]),
        "excluded": [
            {"backend": str(one["backend"]), "scope": str(one["scope"]), "why": str(one["reason"])}
            for one in answer["excluded"]
        ],
        "notes": _texts(answer["notes"]),
    }


_READERS = {"itl": _itl, "choose": _choose}


def _estimate(found: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    return (
        None if found is None else {name: _number(found[name]) for name in ("ratio", "low", "high")}
    )


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    raise TypeError(f"{value!r} is no number")


def _numbers(values: Sequence[Any]) -> list[float]:
    found = [_number(value) for value in values]
    return [value for value in found if value is not None]


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values]
