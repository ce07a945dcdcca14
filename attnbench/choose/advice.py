"""From stored times and a mix of batches to the backend to serve with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from attnbench.backends.device import Device
from attnbench.choose.crossover import Crossover, crossovers
from attnbench.choose.flags import Realised, by_phase, kind_of, realise
from attnbench.choose.rank import Outcome, Part, Ranking, Times, rank, ratio_of
from attnbench.choose.stored import Ended, Measured, Point, Timed, unstable
from attnbench.choose.tries import Choice, How
from attnbench.choose.valid import Default, expected, matching, refusal
from attnbench.errors import ExitCode, UsageError
from attnbench.history.rule import Estimate, Verdict, VerdictSettings, decide
from attnbench.store.record import Status
from attnbench.upgrade.batches import BatchShare, UnmeasurableError, workload_of
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.models import num_layers_of
from attnbench.workload import Workload

WHOLE = "whole"
PHASES = ("prefill", "decode", "extend", "mixed")
EXCLUDED = {
    Status.INCORRECT: "wrong result",
    Status.CRASH: "crashed",
    Status.TIMEOUT: "timed out",
    Status.OOM: "out of memory",
    Status.ERROR: "failed",
    Status.NOISY: "unstable: did not settle within the budget",
    Status.UNSUPPORTED: "refused",
    Status.UNTIMED: "correct, and could not be timed",
}
"""Statuses that bar a contender. A throttled point says nothing of it: it is measured again."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """A backend that is not chosen from, where (`whole`, a phase, `everywhere`) and why."""

    name: str
    scope: str
    reason: str


@dataclass(frozen=True, slots=True)
class Regret:
    """What the engine's own default costs: its seconds over the winner's.

    `ratio` is None where the default is not known or was not measured: `why`. `is_tied`: it is
    within the floor or the noise of the winner. `is_valid`: it may be chosen here.
    """

    default: Default
    name: str
    ratio: Estimate | None
    is_tied: bool = False
    is_valid: bool = True
    why: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """What the advice holds for. It expires with any of these, and at `expires_at`."""

    how: How
    device_kind: str
    compute_capability: str
    versions: tuple[str, ...]
    measured_from: datetime
    measured_to: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer. `rankings`: the whole first, then a phase each, where there are several.

    `per_kind` are each kind of layer's own whole mix; `choices` what its winner is.
    """

    parts: tuple[Part, ...]
    rankings: tuple[Ranking, ...]
    per_kind: Mapping[str, Ranking]
    kinds: Mapping[str, Workload]
    by_name: Mapping[str, Choice]
    excluded: tuple[Excluded, ...]
    crossovers: Mapping[str, tuple[Crossover, ...]]
    regret: Regret
    scope: Scope | None
    flags: Realised | None
    flags_per_kind: Realised | None
    missing: tuple[tuple[Choice, Workload], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> Ranking:
        return self.rankings[0]

    @property
    def exit_code(self) -> ExitCode:
        """0: decided, or a tie; 3: open, or something of the chain is not measured."""
        settled = self.whole.verdict in (Outcome.DECIDED, Outcome.TIE, Outcome.ONLY)
        return ExitCode.OK if settled and not self.missing else ExitCode.UNDECIDED


def parts_of(cells: Sequence[Cell], shares: Sequence[BatchShare]) -> tuple[Part, ...]:
    """Every batch on every kind of layer. Raises UsageError for one that is no workload."""
    found = []
    for kind, cell in enumerate(cells):
        for share in shares:
            try:
                workload = workload_of(cell, share)
            except UnmeasurableError as error:
                raise UsageError(f"{cell.text}, {share.text}: {error}; leave it out") from error
            found.append(Part(kind, share.text, share.weight, num_layers_of(cell), workload))
    return tuple(found)


def advise(
    parts: Sequence[Part],
    measured: Measured,
    device: Device,
    defaults: Sequence[Default],
    *,
    version: str,
    choice_days: int,
    block_size: int = 0,
    settings: VerdictSettings | None = None,
) -> Advice:
    """Choose.

    Args:
        parts: see `parts_of`.
        defaults: what the engine takes unasked for each kind of layer, in the kinds' order.
        version: of vLLM, for the flags.
        choice_days: how long after its oldest measurement the advice holds.
        block_size: the only one that is looked at; 0: any.
    """
    settings = settings or VerdictSettings()
    points = [measured.point(part.workload) for part in parts]
    numbered = list(enumerate(parts))
    timer = measured.how.timer if measured.how else ""
    wanted, refused = _expected(parts, device, block_size)
    excluded = [Excluded(name, "everywhere", why) for name, why in refused.items()]
    known = sorted({c for one in points for c in (*one.timed, *one.ended)} | set(wanted))
    valid = []
    for choice in known:
        why = next((w for p in parts if (w := refusal(choice, p.workload, device))), "")
        why = _wrong(choice, numbered, points) or why
        if why and choice.backend not in refused:
            excluded.append(Excluded(choice.text, "everywhere", why))
        elif not why:
            valid.append(choice)
    scopes: list[tuple[str, Callable[[Part], bool]]] = [(WHOLE, lambda part: True)]
    phases = [phase for phase in PHASES if any(part.phase == phase for part in parts)]
    if len(phases) > 1:
        scopes += [(phase, lambda part, p=phase: part.phase == p) for phase in phases]  # type: ignore[misc]
    rankings, missing = [], {}
    for scope, holds in scopes:
        chosen = [(place, part) for place, part in numbered if holds(part)]
        times, barred, absent = _contenders(chosen, points, valid, wanted)
        if scope == WHOLE:
            missing = absent
        if scope == WHOLE or len(phases) > 1:
            excluded += [Excluded(name, scope, why) for name, why in barred.items()]
        names = [choice.text for choice in absent]
        rankings.append(rank(scope, chosen, times, timer, settings, names))
    kinds = {kind_name(parts, kind): kind for kind in dict.fromkeys(part.kind for part in parts)}
    per_kind = {}
    for name, kind in kinds.items():
        chosen = [(place, part) for place, part in numbered if part.kind == kind]
        times, _, absent = _contenders(chosen, points, valid, wanted)
        per_kind[name] = rank(name, chosen, times, timer, settings, [c.text for c in absent])
    by_name = {choice.text: choice for choice in known}
    first = {name: next(p.workload for p in parts if p.kind == k) for name, k in kinds.items()}
    whole = rankings[0]
    flags, flags_per_kind = _flags(whole, per_kind, first, by_name, version)
    notes = list(measured.notes)
    if measured.is_published:
        notes.append("from a published run, perhaps of somebody else's machine")
    if timer == "fake":
        notes.append("made-up times of the fake timer: a rehearsal, and no advice")
    notes += _other_runs(points, valid)
    if len(phases) > 1:
        winners = {one.scope: one.winner.name for one in rankings[1:] if one.winner}
        notes += [said] if (said := by_phase(version, winners)) else []
    return Advice(
        parts=tuple(parts),
        rankings=tuple(rankings),
        per_kind=per_kind,
        kinds=first,
        by_name=by_name,
        excluded=tuple(dict.fromkeys(excluded)),
        crossovers={
            name: tuple(crossovers(measured.grid(one), valid, timer, settings))
            for name, one in first.items()
        },
        regret=_regret(defaults, numbered, points, valid, whole, by_name, timer, settings),
        scope=_scope(measured, points, valid, choice_days),
        flags=flags,
        flags_per_kind=flags_per_kind,
        missing=tuple((choice, one) for choice, listed in missing.items() for one in listed),
        notes=tuple(dict.fromkeys(notes)),
    )


def kind_name(parts: Sequence[Part], kind: int) -> str:
    """vLLM's word for a kind of layer; with its head size where two kinds share the word."""
    mine = next(part.workload for part in parts if part.kind == kind)
    alike = {p.kind for p in parts if kind_of(p.workload) == kind_of(mine)}
    word = kind_of(mine)
    return word if len(alike) == 1 else f"{word} head_size={mine.shape.head_size}"


def _expected(
    parts: Sequence[Part], device: Device, block_size: int
) -> tuple[list[Choice], dict[str, str]]:
    """Of the chain, who is valid for every kind of layer, and who is not, and why."""
    found: list[list[Choice]] = []
    refused: dict[str, str] = {}
    for part in {part.kind: part for part in reversed(parts)}.values():
        choices, no = expected(part.workload, device, block_size)
        found.append(choices)
        refused |= no
    common = [one for one in found[0] if all(one in other for other in found)] if found else []
    return common, refused


def _wrong(choice: Choice, parts: Sequence[tuple[int, Part]], points: Sequence[Point]) -> str:
    """A wrong result on one batch bars a backend from all."""
    for place, part in parts:
        ended = points[place].ended.get(choice)
        if ended is not None and ended.status is Status.INCORRECT:
            return _reason(ended, part)
    return ""


def _reason(ended: Ended, part: Part) -> str:
    more = f": {ended.reason}" if ended.reason else ""
    return f"{EXCLUDED[ended.status]} on {part.batch} ({ended.status}){more}"


def _unstable(times: Times) -> str:
    """Why these times are none to rank by; "": they are."""
    why = unstable(times.values())
    return f"{EXCLUDED[Status.NOISY]} ({Status.NOISY}): {why}" if why else ""


def _contenders(
    parts: Sequence[tuple[int, Part]],
    points: Sequence[Point],
    valid: Sequence[Choice],
    wanted: Sequence[Choice],
) -> tuple[dict[str, Times], dict[str, str], dict[Choice, list[Workload]]]:
    """Who has a time of every part, who is barred and why, what is missing of the chain."""
    times: dict[str, Times] = {}
    barred: dict[str, str] = {}
    absent: dict[Choice, list[Workload]] = {}
    for choice in valid:
        why = ""
        lacking = []
        for place, part in parts:
            ended = points[place].ended.get(choice)
            if ended is not None and ended.status in EXCLUDED:
                why = why or _reason(ended, part)
            elif choice not in points[place].timed:
                lacking.append(part.workload)
        its = {p: timed for p, _ in parts if (timed := points[p].timed.get(choice))}
        if not why and not lacking:
            why = _unstable(its)
        if why:
            barred[choice.text] = why
        elif not lacking:
            times[choice.text] = its
        elif choice in wanted or len(lacking) < len(parts):
            # Measured over another block size or by another variant, the name is known well enough.
            absent[choice] = lacking
    done = {name.partition(" ")[0].partition(":")[0] for name in (*times, *barred)}
    return times, barred, {c: v for c, v in absent.items() if c.backend not in done}


def _regret(
    defaults: Sequence[Default],
    parts: Sequence[tuple[int, Part]],
    points: Sequence[Point],
    valid: Sequence[Choice],
    whole: Ranking,
    by_name: Mapping[str, Choice],
    timer: str,
    settings: VerdictSettings,
) -> Regret:
    names = dict.fromkeys(one.backend or "none" for one in defaults)
    name = ", ".join(names)
    why = next((one.why for one in defaults if one.why), "")
    if whole.winner is None:
        return Regret(defaults[0], name, None, why=why or "nothing was measured")
    best = by_name[whole.winner.name]
    times: dict[int, Timed] = {}
    for place, part in parts:
        timed = points[place].timed
        choice = matching(defaults[part.kind], part.batch, list(timed), part.workload.block_size)
        if choice is None:
            ended = [e for e in points[place].ended.values() if e.choice.backend in names]
            said = _reason(ended[0], part) if ended and ended[0].status in EXCLUDED else ""
            lacks = said or f"not measured on {part.batch}"
            return Regret(defaults[0], name, None, why=why or f"{name}: {lacks}")
        times[place] = timed[choice]
    if said := _unstable(times):
        return Regret(defaults[0], name, None, why=why or f"{name}: {said}")
    base = {place: points[place].timed[best] for place, _ in parts}
    ratio = ratio_of(parts, base, times, timer, settings)
    verdict = decide(ratio, settings.noise(timer))[0]
    tied = verdict not in (Verdict.REGRESSION, Verdict.UNDECIDED)
    wrong = next((c for one in times.values() if (c := one.choice) not in valid), None)
    if wrong is not None:
        why = why or f"{wrong.text} is excluded here"
    return Regret(defaults[0], name, ratio, tied and wrong is None, wrong is None, why)


def _flags(
    whole: Ranking,
    per_kind: Mapping[str, Ranking],
    kinds: Mapping[str, Workload],
    by_name: Mapping[str, Choice],
    version: str,
) -> tuple[Realised | None, Realised | None]:
    """For one backend, and for one a kind of layer where those differ."""
    if whole.winner is None:
        return None, None
    uniform = {kind_of(one): by_name[whole.winner.name] for one in kinds.values()}
    best = {
        kind_of(kinds[name]): by_name[one.winner.name]
        for name, one in per_kind.items()
        if one.winner
    }
    flags = realise(uniform, version)
    if len(best) < len(kinds) or len(set(best.values())) < 2:
        return flags, None
    return flags, realise(best, version)


def _scope(
    measured: Measured, points: Sequence[Point], valid: Sequence[Choice], days: int
) -> Scope | None:
    used = [t for point in points for c, t in point.timed.items() if c in valid]
    if not used or measured.how is None:
        return None
    first, last = min(t.started_at for t in used), max(t.started_at for t in used)
    return Scope(
        how=measured.how,
        device_kind=measured.device_kind,
        compute_capability=measured.compute_capability,
        versions=measured.versions,
        measured_from=first,
        measured_to=last,
        expires_at=first + timedelta(days=days),
    )


def _other_runs(points: Sequence[Point], valid: Sequence[Choice]) -> list[str]:
    strangers: dict[str, set[str]] = defaultdict(set)
    for point in points:
        for choice, timed in point.timed.items():
            if choice in valid and timed.run_id != point.home:
                strangers[choice.text].add(timed.run_id)
    return [
        f"{name} was measured in another run than the others ({', '.join(sorted(runs))})"
        for name, runs in sorted(strangers.items())
    ]
