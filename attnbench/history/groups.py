"""One cause is one alarm: regressions of a night that share what broke, told as one.

A kernel family that got slower shows in every shape and batch it is measured at. What the broken
series have in common is looked for from the outside in: the device, the kernel, its phase, its
shape. The first level at which most of what was judged broke in the same way is the alarm.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
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
        runs = [v.since for v in self.members if v.since is not None]
        counts = Counter(run.run_id for run in runs)
        return min(
            runs, key=lambda run: (-counts[run.run_id], run.started_at, run.run_id), default=None
        )

    @property
    def title(self) -> str:
        """`TRITON_ATTN decode`, `everything on nvidia-h200`; a series' own title if alone."""
        if not self.common:
            return self.worst.series.title
        device, *inner = self.common
        return " ".join(inner) or f"everything on {device}"


def group_alarms(verdicts: Sequence[SeriesVerdict]) -> tuple[AlarmGroup, ...]:
    """The regressions among `verdicts`, which are all of a night, grouped; the worst group first.

    Slow-downs and losses of support are never in one group, nor are two statuses.
    """
    judged = [(v, _levels(v)) for v in verdicts]
    broken: dict[str, list[tuple[SeriesVerdict, tuple[str, ...]]]] = defaultdict(list)
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


def _kind(verdict: SeriesVerdict) -> str:
    """What may stand in one group: a loss of support is of the status it ended in."""
    return str(verdict.subject.status) if verdict.is_support_change else "slower"


def _split(
    members: Sequence[tuple[SeriesVerdict, tuple[str, ...]]],
    depth: int,
    totals: Counter[tuple[str, ...]],
) -> list[AlarmGroup]:
    """Groups of `members`, which share the first `depth` - 1 levels."""
    groups: list[AlarmGroup] = []
    inside: dict[tuple[str, ...], list[tuple[SeriesVerdict, tuple[str, ...]]]] = defaultdict(list)
    for member in members:
        inside[member[1][:depth]].append(member)
    for common, own in inside.items():
        # A device is to blame where several kernels broke; one is to blame for itself.
        is_shared = depth > 1 or len({levels[1] for _, levels in own}) > 1
        if is_shared and len(own) >= _MIN_MEMBERS and len(own) > _SHARE * totals[common]:
            groups.append(_group(common, [v for v, _ in own], totals[common]))
        elif depth < len(own[0][1]):
            groups += _split(own, depth + 1, totals)
        else:
            groups += [_group((), [v], 1) for v, _ in own]
    return groups


def _group(common: tuple[str, ...], members: list[SeriesVerdict], judged: int) -> AlarmGroup:
    members.sort(key=lambda v: (-_ratio(v), v.series.title, v.series.id))
    return AlarmGroup(common=common, members=tuple(members), judged=judged)


def _ratio(verdict: SeriesVerdict) -> float:
    return verdict.estimate.ratio if verdict.estimate else 0.0


def _order(group: AlarmGroup) -> tuple[bool, int, float, str]:
    """Losses of support first, then what concerns most series, then what is worst."""
    return (
        not group.is_support_change,
        -len(group.members),
        -_ratio(group.worst),
        group.title,
    )
