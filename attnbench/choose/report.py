"""An advice told: tables, sentences, JSON, and the one command that measures what is missing."""

from __future__ import annotations

from shlex import quote
from typing import Any

from attnbench.choose.advice import EXCLUDED, PHASES, Advice
from attnbench.choose.flags import Realised, quoted
from attnbench.choose.rank import Line, Outcome, Ranking, Standing
from attnbench.history.rule import Estimate
from attnbench.history.wording import interval_text
from attnbench.store.record import Status
from attnbench.upgrade.cost_report import brace
from attnbench.workload import Workload

KIND = "choose"
"""By which the pages know a saved answer."""
REPLICATES = 3
_LONGEST = 2000
"""Characters of batches that anybody would paste."""


def ranking_rows(advice: Advice) -> list[dict[str, Any]]:
    """A line a contender and scope. `us`: seconds of attention in a mean step, all layers."""
    rankings = [*advice.rankings]
    if len(advice.per_kind) > 1:
        rankings += advice.per_kind.values()
    return [
        {
            "scope": ranking.scope,
            "rank": place,
            "backend": line.name,
            "us_per_step": line.seconds * 1e6,
            "over_winner": "" if line.standing is Standing.WINNER else interval_text(line.ratio),
            "standing": _standing(line),
        }
        for ranking in rankings
        for place, line in enumerate(ranking.lines, 1)
    ]


def excluded_rows(advice: Advice) -> list[dict[str, Any]]:
    """Who is not chosen from, where and why."""
    return [
        {"excluded": one.name, "scope": one.scope, "why": one.reason} for one in advice.excluded
    ]


def sentences(advice: Advice) -> list[str]:
    """The answer in words, the most important first."""
    said = [_verdict(advice.whole, advice)]
    said += [
        f"{ranking.scope}: {_short(ranking)}"
        for ranking in advice.rankings
        if ranking.scope in PHASES
    ]
    if len(advice.per_kind) > 1:
        said += [f"layers of {name}: {_short(one)}" for name, one in advice.per_kind.items()]
    said.append(_regret(advice))
    said += _flags("flags", advice.flags)
    said += _flags("flags for a backend per kind of layer", advice.flags_per_kind)
    for name, found in advice.crossovers.items():
        kind = f"{name}, " if len(advice.crossovers) > 1 else ""
        said += [f"crossover: {kind}{one.text}" for one in found]
    if (scope := advice.scope) is not None:
        versions = ", ".join(scope.versions) or "no package versions stored"
        driver = f", driver {scope.how.driver_version}" if scope.how.driver_version else ""
        said.append(
            f"holds for {scope.how.text}{driver}, {versions}; measured "
            f"{scope.measured_from:%Y-%m-%d} to {scope.measured_to:%Y-%m-%d}, expires "
            f"{scope.expires_at:%Y-%m-%d} or when any of these changes"
        )
    return said + list(advice.notes)


def measure_command(advice: Advice) -> str | None:
    """One command for what is missing or open; "": nothing is. None: no one command does it."""
    points = _to_measure(advice)
    if not points:
        return ""
    words = brace([workload.text for _, workload in points])
    if words is None or len(words) > _LONGEST:
        return None
    requests = dict.fromkeys(f"--backend {quote(request)}" for request, _ in points)
    return f"attnbench run {quote(words)} {' '.join(requests)} --replicates {REPLICATES}"


def _to_measure(advice: Advice) -> list[tuple[str, Workload]]:
    choices = [*advice.missing]
    if not advice.whole.lines:
        unsteady = [advice.by_name[name] for name in _unstable(advice)]
        choices += [(one, part.workload) for one in unsteady for part in advice.parts]
    if advice.whole.verdict is Outcome.OPEN or advice.missing:
        # In one run with what they are compared with: within seconds of one another.
        standings = (Standing.WINNER, Standing.OPEN)
        names = [line.name for line in advice.whole.lines if line.standing in standings]
        lacking = list(dict.fromkeys(workload for _, workload in advice.missing))
        workloads = lacking or [part.workload for part in advice.parts]
        choices += [(advice.by_name[name], one) for name in names for one in workloads]
    return [
        (
            choice.request,
            one.replace(block_size=choice.block_size, kv_cache_layout=choice.kv_cache_layout),
        )
        for choice, one in choices
    ]


def _unstable(advice: Advice) -> list[str]:
    """Who has no time to be used only because it did not settle: a quieter machine may do."""
    barred = EXCLUDED[Status.NOISY]
    return [one.name for one in advice.excluded if one.reason.startswith(barred)]


def to_json(advice: Advice) -> dict[str, Any]:
    """Everything, for programs. Seconds; ratios over the winner."""
    scope = advice.scope
    return {
        "kind": KIND,
        "layers": [
            {"layer_kind": name, "workload": one.text} for name, one in advice.kinds.items()
        ],
        "batches": [
            {"batch": batch, "weight": weight}
            for batch, weight in {part.batch: part.weight for part in advice.parts}.items()
        ],
        "verdict": str(advice.whole.verdict),
        "rankings": [_ranking(one) for one in advice.rankings],
        "layer_kinds": [_ranking(one) for one in advice.per_kind.values()],
        "excluded": [
            {"backend": one.name, "scope": one.scope, "reason": one.reason}
            for one in advice.excluded
        ],
        "crossovers": [
            {
                "layer_kind": name,
                "axis": one.axis,
                **{f"at_{key}": value for key, value in one.fixed.items()},
                "below": one.below,
                "above": one.above,
                "between": [one.low, one.high],
                "interpolated": one.at,
            }
            for name, found in advice.crossovers.items()
            for one in found
        ],
        "default": {
            "engine": advice.regret.default.engine,
            "backend": advice.regret.name,
            "tied_with_winner": advice.regret.is_tied,
            "why": advice.regret.why,
            "regret": _estimate(advice.regret.ratio),
        },
        "scope": scope
        and {
            "device_class": scope.how.device_class,
            "compute_capability": scope.compute_capability,
            "driver_version": scope.how.driver_version,
            "timer": scope.how.timer,
            "l2_state": scope.how.l2_state,
            "execution": scope.how.execution,
            "versions": list(scope.versions),
            "measured_from": scope.measured_from.isoformat(),
            "measured_to": scope.measured_to.isoformat(),
            "expires_at": scope.expires_at.isoformat(),
        },
        "flags": _flags_json(advice.flags),
        "flags_per_kind": _flags_json(advice.flags_per_kind),
        "missing": [
            {"backend": choice.text, "workload": one.text} for choice, one in advice.missing
        ],
        "measure": measure_command(advice),
        "notes": list(advice.notes),
    }


def _verdict(ranking: Ranking, advice: Advice) -> str:
    text = _short(ranking)
    if ranking.winner is not None and advice.missing:
        names = ", ".join(dict.fromkeys(choice.text for choice, _ in advice.missing))
        text += f" (of those measured: {names} has no time on every batch)"
    return f"whole mix: {text}"


def _short(ranking: Ranking) -> str:
    """The verdict of one scope."""
    if ranking.winner is None:
        return "not measured"
    first = ranking.winner.name
    if ranking.verdict is Outcome.ONLY:
        lacks = f"; not measured: {', '.join(ranking.missing)}" if ranking.missing else ""
        return f"{first}, the only one with a time" + (lacks or ", and the only valid one")
    second = ranking.lines[1]
    behind = f"{second.name} {interval_text(second.ratio)}"
    if ranking.verdict is Outcome.DECIDED:
        return f"{first}, before {behind}"
    if ranking.verdict is Outcome.TIE:
        tied = ", ".join(line.name for line in ranking.tied[1:])
        outside = next((line for line in ranking.lines if line.standing is Standing.SLOWER), None)
        beyond = f"; then {outside.name} {interval_text(outside.ratio)}" if outside else ""
        return f"a tie of {first} and {tied} ({behind}){beyond}"
    opened = ", ".join(line.name for line in ranking.lines if line.standing is Standing.OPEN)
    return f"{first} leads, and {opened} cannot be told from it ({behind})"


def _regret(advice: Advice) -> str:
    one = advice.regret
    text = f"{one.default.engine} takes {one.name} by itself"
    if one.ratio is None:
        return f"{text}; its regret is not known: {one.why}"
    why = f" ({one.why})" if one.why else ""
    if not one.is_valid:
        return f"{text}, and must not be served with it{why}"
    if advice.whole.winner is not None and one.ratio == Estimate(1.0, 1.0, 1.0):
        return f"{text}, which is the winner: no flag is needed{why}"
    if one.is_tied:
        return f"{text}, no slower than the winner ({interval_text(one.ratio)}): keep it{why}"
    return f"{text}: regret {interval_text(one.ratio)} against the winner{why}"


def _flags(title: str, realised: Realised | None) -> list[str]:
    if realised is None:
        return []
    if not realised.words:
        return [f"{title} (vLLM {realised.version}): none, {realised.why}"]
    why = f" ({realised.why})" if realised.why else ""
    return [f"{title} (vLLM {realised.version}): {quoted(realised.words)}{why}"]


def _flags_json(realised: Realised | None) -> dict[str, Any] | None:
    if realised is None:
        return None
    return {"vllm": realised.version, "words": list(realised.words), "why": realised.why}


def _ranking(ranking: Ranking) -> dict[str, Any]:
    return {
        "scope": ranking.scope,
        "verdict": str(ranking.verdict),
        "winner": ranking.lines[0].name if ranking.lines else None,
        "runner_up": ranking.lines[1].name if len(ranking.lines) > 1 else None,
        "margin": _estimate(ranking.margin),
        "tie_class": [line.name for line in ranking.tied],
        "lines": [
            {
                "backend": line.name,
                "seconds_per_step": line.seconds,
                "standing": str(line.standing),
                "through": line.through,
                "over_winner": _estimate(line.ratio),
            }
            for line in ranking.lines
        ],
        "missing": list(ranking.missing),
    }


def _estimate(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    limits = (found.low, found.high) if found.enough else (None, None)
    return {"ratio": found.ratio, "low": limits[0], "high": limits[1]}


def _standing(line: Line) -> str:
    return f"{line.standing} through {line.through}" if line.through else str(line.standing)
