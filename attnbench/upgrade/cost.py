"""What a changed default costs a user's mix of batches, by stored measurements of both sides.

The rule of each batch is that of `attnbench compare` (docs/verdict.md): medians of processes, an
interval of their ratio moderated by what is known of the timer, and the timer's practical floor.
The mix is the ratio of both sides' summed seconds, weighted by batch and by layers; its limits are
the sums of the batches' limits, weighted alike, which holds however their errors go together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from attnbench.errors import ExitCode
from attnbench.history.rule import (
    Estimate,
    Reason,
    Verdict,
    VerdictSettings,
    decide,
    estimate_groups,
)
from attnbench.upgrade.batches import BatchShare, UnmeasurableError, workload_of
from attnbench.upgrade.compare import CellChange, ChangeKind, Step
from attnbench.upgrade.kernels import BEHIND_KERNELS, own_kernels, vllm_kernels
from attnbench.upgrade.models import num_layers_of
from attnbench.upgrade.stored import How, StoredTimes, Timed, Wanted


class CostVerdict(StrEnum):
    """What is said of a changed cell, or of a model's."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    """The ratio is within the timer's practical floor, or the batches meet the same kernels."""
    UNDECIDED = "undecided"
    NOT_MEASURED = "not measured"
    LOST = "lost"
    """No backend takes it any more."""


@dataclass(frozen=True, slots=True)
class Part:
    """One batch of a changed cell. `seconds` are of one layer's call.

    `wanted` are both sides as attnbench would measure them here, None where it cannot; `why` says
    so, or why a stored time is missing. `ratio` is None where a side is missing.
    """

    batch: str
    weight: float
    wanted: tuple[Wanted, Wanted] | None
    before: Timed | None = None
    after: Timed | None = None
    ratio: Estimate | None = None
    same_kernels: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one changed cell, or with several `changes`, of a model's that change.

    `how` is None where nothing was found; `notes` say what a reader must know of the numbers.
    """

    changes: tuple[CellChange, ...]
    verdict: CostVerdict
    why: str
    parts: tuple[tuple[CellChange, Part], ...]
    how: How | None = None
    ratio: Estimate | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_certain(self) -> bool:
        """Whether the change itself can be trusted."""
        return not any(change.untrusted for change in self.changes)

    @property
    def exit_code(self) -> ExitCode:
        if self.verdict in (CostVerdict.SAME, CostVerdict.FASTER):
            return ExitCode.OK if self.is_certain else ExitCode.UNDECIDED
        if self.verdict in (CostVerdict.SLOWER, CostVerdict.LOST) and self.is_certain:
            return ExitCode.REGRESSION
        return ExitCode.UNDECIDED


def judge_costs(
    steps: Sequence[Step],
    batches: Sequence[BatchShare],
    stored: StoredTimes,
    settings: VerdictSettings | None = None,
) -> list[Cost]:
    """The cost of every change that makes other kernels run: a model's cells together.

    One entry for each device class that both sides were measured on. No batch: nothing is judged.
    """
    if not batches:
        return []
    settings = settings or VerdictSettings()
    groups: dict[tuple[str, ...], list[CellChange]] = {}
    for change in (one for step in steps for one in step.changes if is_judged(one)):
        cell = change.before.cell
        whose = cell.model.removesuffix("-local") or cell.text
        versions = (change.capability, change.before_version, change.after_version)
        groups.setdefault((*versions, whose), []).append(change)
    return [
        cost for changes in groups.values() for cost in _judge(changes, batches, stored, settings)
    ]


def is_judged(change: CellChange) -> bool:
    """Whether other kernels run: a longer list of block sizes, say, changes none."""
    if change.kind is ChangeKind.BEHIND:
        # A latent cache has no head dimension, whatever its layout is called.
        says_nothing = {"kv_cache_layout"} if change.before.cell.mla else set()
        return any(key in BEHIND_KERNELS - says_nothing for key, _, _ in change.behind)
    return change.kind is not ChangeKind.GAINED


def _judge(
    changes: Sequence[CellChange],
    batches: Sequence[BatchShare],
    stored: StoredTimes,
    settings: VerdictSettings,
) -> list[Cost]:
    if any(change.kind is ChangeKind.LOST for change in changes):
        lost = next(change for change in changes if change.kind is ChangeKind.LOST)
        why = f"no backend takes {lost.before.cell.text} any more"
        return [Cost(tuple(changes), CostVerdict.LOST, why, ())]
    pairs = [(change, share) for change in changes for share in batches]
    parts = [(change, _plan(change, share)) for change, share in pairs]
    # vLLM's own classes are what is deployed; a mix of theirs and ours would compare adapters.
    routes = ([deployed(*pair) for pair in pairs], [part.wanted for _, part in parts])
    found: dict[How, list[tuple[Timed, Timed] | None]] = {}
    for wanted in routes:
        by_how: dict[How, list[tuple[Timed, Timed] | None]] = {}
        for place, (both, (change, _)) in enumerate(zip(wanted, parts, strict=True)):
            for how, pair in (stored.pair(*both, change.capability) if both else {}).items():
                by_how.setdefault(how, [None] * len(parts))[place] = pair
        for how, listed in by_how.items():
            if _count(listed) > _count(found.get(how, ())):
                found[how] = listed
    chosen = _one_a_device(found)
    if not chosen:
        told = [(change, _explained(change, part, stored)) for change, part in parts]
        return [_total(changes, told, None, settings)]
    costs = []
    for how in chosen:
        filled = [
            (
                change,
                _timed(part, pair, how, settings) if pair else _explained(change, part, stored),
            )
            for (change, part), pair in zip(parts, found[how], strict=True)
        ]
        costs.append(_total(changes, filled, how, settings))
    return costs


def _plan(change: CellChange, share: BatchShare) -> Part:
    """A batch as attnbench's own adapters can measure both sides of it, or why not."""
    try:
        sides = []
        for answer in (change.before, change.after):
            workload = workload_of(answer.cell, share, answer.behind)
            sides.append(Wanted(workload, own_kernels(answer, workload, change.capability)))
    except UnmeasurableError as error:
        return Part(share.text, share.weight, None, why=str(error))
    same = sides[0] == sides[1] and change.kind is ChangeKind.BEHIND
    return Part(share.text, share.weight, (sides[0], sides[1]), same_kernels=same)


def deployed(change: CellChange, share: BatchShare) -> tuple[Wanted, Wanted] | None:
    """Both sides as `VLLM:NAME` in an environment with that side's vLLM."""
    try:
        before, after = (
            Wanted(
                workload_of(answer.cell, share, answer.behind),
                vllm_kernels(answer),
                (f"vllm=={version}",),
            )
            for answer, version in (
                (change.before, change.before_version),
                (change.after, change.after_version),
            )
        )
    except UnmeasurableError:
        return None
    return before, after


def _count(pairs: Sequence[tuple[Timed, Timed] | None]) -> int:
    return sum(pair is not None for pair in pairs)


def _one_a_device(found: dict[How, list[tuple[Timed, Timed] | None]]) -> list[How]:
    """For each device class the way that covers most batches, the newest of equals."""
    best: dict[str, tuple[int, str, How]] = {}
    for how, pairs in found.items():
        newest = max(max(pair[0].run_id, pair[1].run_id) for pair in pairs if pair)
        rank = (_count(pairs), newest, how)
        best[how.device_class] = max(best.get(how.device_class, rank), rank)
    return [best[device][2] for device in sorted(best)]


def _timed(part: Part, pair: tuple[Timed, Timed], how: How, settings: VerdictSettings) -> Part:
    before, after = pair
    if part.same_kernels and before.run_id == after.run_id and before.kernels == after.kernels:
        ratio = Estimate(1.0, 1.0, 1.0)
    else:
        noise = settings.noise(how.timer)
        ratio = estimate_groups([before.replicates], [after.replicates], noise, settings.confidence)
    return replace(part, before=before, after=after, ratio=ratio, why="")


def _explained(change: CellChange, part: Part, stored: StoredTimes) -> Part:
    """Why there is no pair of times: how a side's points ended, if they were tried."""
    if part.wanted is None:
        return part
    ends = [
        f"{one.kernels.request} ended as {status}"
        for one in part.wanted
        if (status := stored.ended_as(one, change.capability))
    ]
    return replace(part, why="; ".join(ends))


def _total(
    changes: Sequence[CellChange],
    parts: Sequence[tuple[CellChange, Part]],
    how: How | None,
    settings: VerdictSettings,
) -> Cost:
    base = Cost(tuple(changes), CostVerdict.NOT_MEASURED, "", tuple(parts), how)
    if all(part.same_kernels for _, part in parts):
        why = "these batches run on the same kernels on both sides"
        return replace(base, verdict=CostVerdict.SAME, why=why)
    missing = [part for _, part in parts if part.ratio is None]
    if how is None or missing:
        reasons = dict.fromkeys(part.why for part in missing if part.why)
        why = (
            "; ".join(reasons) or f"{len(missing)} of {len(parts)} batches without a pair of times"
        )
        return replace(base, why=why)
    seconds = []
    for change, part in parts:
        assert part.before is not None
        layers = num_layers_of(change.before.cell)
        seconds.append(part.weight * layers * part.before.seconds)
    ratios = [part.ratio for _, part in parts if part.ratio is not None]
    ratio = weighted_ratio(ratios, seconds)
    verdict, why = judge_ratio(ratio, how.timer, settings)
    return replace(
        base, verdict=verdict, why=why, ratio=ratio, notes=tuple(dict.fromkeys(_notes(base)))
    )


def weighted_ratio(ratios: Sequence[Estimate], seconds: Sequence[float]) -> Estimate:
    """The ratio of sums, from parts' ratios and their seconds before."""
    total = sum(seconds)

    def mean(values: Iterable[float]) -> float:
        return sum(s * value for s, value in zip(seconds, values, strict=True)) / total

    return Estimate(
        mean(one.ratio for one in ratios),
        mean(one.low for one in ratios),
        mean(one.high for one in ratios),
        enough=all(one.enough for one in ratios),
    )


def judge_ratio(ratio: Estimate, timer: str, settings: VerdictSettings) -> tuple[CostVerdict, str]:
    """After over before, by the verdict rule; what lies beyond the floor within noise is open."""
    verdict, reason = decide(ratio, settings.noise(timer))
    if verdict is Verdict.REGRESSION:
        return CostVerdict.SLOWER, ""
    if verdict is Verdict.IMPROVEMENT:
        return CostVerdict.FASTER, ""
    floor = f"{settings.noise(timer).floor:.1%}".replace(".0%", "%")
    if reason is Reason.WITHIN_FLOOR:
        return CostVerdict.SAME, f"within the floor of timer {timer}, {floor}"
    if reason is Reason.TOO_FEW_REPLICATES:
        return CostVerdict.UNDECIDED, "too few processes for an interval"
    return CostVerdict.UNDECIDED, "within noise"


def _notes(cost: Cost) -> Iterable[str]:
    for change, part in cost.parts:
        assert part.before is not None
        assert part.after is not None
        if not part.before.kernels.startswith("VLLM:"):
            yield "by attnbench's adapters, not vLLM's own classes"
        if part.before.run_id != part.after.run_id:
            yield "the sides were measured in different runs"
        versions = ((change.before_version, part.before), (change.after_version, part.after))
        for version, timed in versions:
            if timed.kernels.startswith("FLASH_ATTN") and not timed.kernels.endswith("UPSTREAM"):
                measured = next((one for one in timed.stack if one.startswith("vllm==")), "")
                if measured and measured != f"vllm=={version}":
                    yield f"{timed.kernels} measured by the build of {measured}, not of {version}"
