"""One cause is one alarm: regressions of a night that share what broke, told as one.

A kernel family that got slower shows in every shape and batch it is measured at. What the broken
series have in common is looked for from the outside in: the device, the kernel, its phase, its
shape. The first level at which most of what was judged broke in the same way is the alarm. What
broke tonight is another cause than what stays broken, and kernels that broke on different nights
have a cause each: they are told apart, or an alarm nobody has mended yet would hide the next.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnbench.history.rule import Verdict
from attnbench.history.series import RunValue
from attnbench.history.series_verdict import SeriesVerdict

#: A level is an alarm of its own where more than this share of its judged series broke alike ...
_SHARE = 0.5

#: ... and at least so many did.
_MIN_MEMBERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmGroup:
    """Regressions told as one.

    Attributes:
        common: what they share, outside in: device class, kernel, phase, shape; as much of it as
            they share. Empty for a series that stands alone.
        members: the worst first.
        judged: how many series of that level were judged.
    """

    common: tuple[str, ...]
    members: tuple[SeriesVerdict, ...]
    judged: int

    @property
    def worst(self) -> SeriesVerdict:
        return self.members[0]

    @property
    def is_support_change(self) -> bool:
        return self.worst.is_support_change

    @property
    def ratio(self) -> float | None:
        """The median of the members' ratios; None where support changed."""
        ratios = [v.estimate.ratio for v in self.members if v.estimate is not None]
        return None if self.is_support_change or not ratios else statistics.median(ratios)

    @property
    def since(self) -> RunValue | None:
        """The run most members say it began with, the earliest of equals."""
        return _most_began(self.members)

    @property
    def title(self) -> str:
        """`TRITON_ATTN decode`, `everything on nvidia-h200`; a series' own title if alone."""
        if not self.common:
            return self.worst.series.title
        device, *inner = self.common
        return " ".join(inner) or f"everything on {device}"


def group_alarms(verdicts: Sequence[SeriesVerdict]) -> tuple[AlarmGroup, ...]:
    """The regressions among `verdicts`, which are all of a night, grouped, as `_order` has them.

    Slow-downs and losses of support are never in one group, nor are two statuses, nor what began
    with this run and what began before it.
    """
    judged = [(v, _levels(v)) for v in verdicts]
    broken: dict[tuple[str, bool], list[tuple[SeriesVerdict, tuple[str, ...]]]] = defaultdict(list)
    for verdict, levels in judged:
        if verdict.verdict is Verdict.REGRESSION:
            broken[_kind(verdict)].append((verdict, levels))
    totals = Counter(levels[:depth] for _, levels in judged for depth in range(1, len(levels) + 1))
    groups: list[AlarmGroup] = []
    for members in broken.values():
        groups += _split(members, 1, totals)
    return tuple(sorted(groups, key=_order))


def _levels(verdict: SeriesVerdict) -> tuple[str, ...]:
    identity = verdict.series.identity
    kernel = str(identity["backend"])
    if identity["variant"]:
        kernel += f"[{identity['variant']}]"
    phase, shape = str(identity["phase"] or ""), str(identity["shape"] or "")
    return verdict.series.key.device_class, kernel, phase, shape


def _kind(verdict: SeriesVerdict) -> tuple[str, bool]:
    """What may stand in one group: a loss of support is of the status it ended in.

    Began with this run or before it, no finer: on noise a step that stays may be told to have begun
    a run apart in two of its series.
    """
    how = str(verdict.subject.status) if verdict.is_support_change else "slower"
    return how, _began_before(verdict)


def _began_before(verdict: SeriesVerdict) -> bool:
    began = verdict.since or verdict.subject
    return began.run_id != verdict.subject.run_id


def _most_began(verdicts: Iterable[SeriesVerdict]) -> RunValue | None:
    runs = [v.since for v in verdicts if v.since is not None]
    counts = Counter(run.run_id for run in runs)
    return min(
        runs, key=lambda run: (-counts[run.run_id], run.started_at, run.run_id), default=None
    )


def _split(
    members: Sequence[tuple[SeriesVerdict, tuple[str, ...]]],
    depth: int,
    totals: Counter[tuple[str, ...]],
) -> list[AlarmGroup]:
    """Groups of `members`, which share the first `depth` - 1 levels."""
    groups: list[AlarmGroup] = []
    inside: dict[tuple[tuple[str, ...], str], list[tuple[SeriesVerdict, tuple[str, ...]]]]
    inside = defaultdict(list)
    began = _kernels_began(members) if depth == 1 else {}
    for member in members:
        inside[member[1][:depth], began.get(member[1][:2], "")].append(member)
    for (common, _), own in inside.items():
        # A device is to blame where several kernels broke; one is to blame for itself.
        is_shared = depth > 1 or len({levels[1] for _, levels in own}) > 1
        if is_shared and len(own) >= _MIN_MEMBERS and len(own) > _SHARE * totals[common]:
            groups.append(_group(common, [v for v, _ in own], totals[common]))
        elif depth < len(own[0][1]):
            groups += _split(own, depth + 1, totals)
        else:
            groups += [_group((), [v], 1) for v, _ in own]
    return groups


def _kernels_began(
    members: Sequence[tuple[SeriesVerdict, tuple[str, ...]]],
) -> dict[tuple[str, ...], str]:
    """The run most of a kernel's series say it began with, of each device's kernels."""
    kernels: dict[tuple[str, ...], list[SeriesVerdict]] = defaultdict(list)
    for verdict, levels in members:
        kernels[levels[:2]].append(verdict)
    most = {kernel: _most_began(verdicts) for kernel, verdicts in kernels.items()}
    return {kernel: run.run_id for kernel, run in most.items() if run is not None}


def _group(common: tuple[str, ...], members: list[SeriesVerdict], judged: int) -> AlarmGroup:
    members.sort(key=lambda v: (-_ratio(v), v.series.title, v.series.id))
    return AlarmGroup(common=common, members=tuple(members), judged=judged)


def _ratio(verdict: SeriesVerdict) -> float:
    return verdict.estimate.ratio if verdict.estimate else 0.0


def _order(group: AlarmGroup) -> tuple[bool, bool, int, float, str]:
    """Losses of support first, then what is new, then what concerns most series or is worst."""
    return (
        not group.is_support_change,
        _began_before(group.worst),
        -len(group.members),
        -_ratio(group.worst),
        group.title,
    )
