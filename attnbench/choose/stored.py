"""Stored times of one device class, of layers and batches, whatever ran them.

Times stand side by side only where device class, protocol version, timer, L2 state, execution and
driver are the same, and no package of their environments has two versions. Of each batch the run
that timed most contenders counts, so that they were measured within seconds of one another; what
it lacks is the newest other run's.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from math import isnan
from typing import Any

from attnbench.choose.tries import Choice, How, Key, Try, What, batch_key, layer_key
from attnbench.errors import UsageError
from attnbench.history.series import gravest
from attnbench.store.record import PROTOCOL_VERSION, Status
from attnbench.workload import Workload

_NO_KERNELS = ("python",)
"""Packages of a stack whose version changes no kernel."""

_ALL_OK = {Status.OK}

MOST_NOISY = 0.25
"""A contender more of whose processes than this did not settle is unstable."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One choice on one batch in one run. `replicates`: each process's median, in seconds.

    `num_noisy` of them did not settle; one at least did.
    """

    choice: Choice
    replicates: tuple[float, ...]
    run_id: str
    started_at: datetime
    stack: tuple[str, ...]
    num_noisy: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.replicates)


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice on one batch that has no time to be used, and what it ended as."""

    choice: Choice
    status: Status
    reason: str


@dataclass(frozen=True, slots=True)
class Point:
    """What one batch of one layer was measured as."""

    timed: Mapping[Choice, Timed]
    ended: Mapping[Choice, Ended]
    home: str = ""


def unstable(timed: Iterable[Timed]) -> str:
    """Why one choice's times of these batches are none to rank it by; "": they are."""
    listed = list(timed)
    noisy = sum(one.num_noisy for one in listed)
    if not noisy:
        return ""
    processes = sum(len(one.replicates) for one in listed)
    if noisy <= MOST_NOISY * processes:
        return ""
    return f"{noisy} of {processes} processes"


def used_replicates(tried: Try) -> tuple[list[float], int, Status]:
    """Medians to be used of a try, how many of them are of NOISY processes, and what it ended as.

    A throttled process says nothing of the backend: it is left out where another was timed. One
    that did not settle has a median all the same, and would be slower than most: left out, it would
    flatter. None are used, and the status says why, where a process ended in any other way or none
    settled.
    """
    if set(tried.statuses) == _ALL_OK and not any(map(isnan, tried.seconds)):
        return list(tried.seconds), 0, Status.OK
    timed = [
        (one, seconds)
        for one, seconds in zip(tried.statuses, tried.seconds, strict=True)
        if one.is_timed and not isnan(seconds)
    ]
    others = [one for one in tried.statuses if not one.is_timed and one is not Status.THROTTLED]
    settled = sum(one is Status.OK for one, _ in timed)
    if others or not settled:
        status = gravest(tried.statuses)
        return [], 0, Status.ERROR if status is Status.OK else status
    return [seconds for _, seconds in timed], len(timed) - settled, Status.OK


def device_class_of(tries: Iterable[Try], text: str, capability: str) -> str:
    """The stored device class that `text` names, or that has this compute capability; "": none.

    Raises UsageError where several would do: devices are never mixed.
    """
    whats = {one.what for one in tries}
    classes = {one.how.device_class for one in whats}
    if text.strip().lower() in classes:
        return text.strip().lower()
    found = sorted({one.how.device_class for one in whats if _is_on(one, capability)})
    if len(found) > 1:
        raise UsageError(
            f"--device {text or capability}: stored are {', '.join(found)}; name one of them, "
            f"e.g. --device {found[0]}"
        )
    return found[0] if found else ""


def _is_on(what: What, capability: str) -> bool:
    if capability == "cpu":
        return what.device_kind == "cpu"
    return what.device_kind != "cpu" and what.compute_capability == capability


class Measured:
    """The tries of one device class that an answer may rest on, in memory."""

    def __init__(
        self,
        tries: Iterable[Try],
        device_class: str,
        wanted: Iterable[Workload],
        published: Iterable[str] = (),
        block_size: int = 0,
    ) -> None:
        """`wanted` decide how the times used were measured; `block_size` 0: any one counts."""
        asked = {(layer_key(c), batch_key(c)) for c in (one.columns() for one in wanted)}
        self._take(tries, device_class, asked, frozenset(published), block_size)

    @classmethod
    def all_of(
        cls, tries: Iterable[Try], device_class: str, published: Iterable[str] = ()
    ) -> Measured:
        """Where everything that was tried is wanted."""
        listed = list(tries)
        asked = {(one.layer, one.batch) for one in {one.what for one in listed}}
        made = cls.__new__(cls)
        made._take(listed, device_class, asked, frozenset(published), 0)
        return made

    def _take(
        self,
        tries: Iterable[Try],
        device_class: str,
        asked: set[tuple[Key, Key]],
        hidden: frozenset[str],
        block_size: int,
    ) -> None:
        self.device_class = device_class
        listed = list(tries)
        usable = {
            what: (what.layer, what.batch) in asked
            for what in {one.what for one in listed}
            if what.how.device_class == device_class
            and what.protocol_version == PROTOCOL_VERSION
            and not what.choice.backend.startswith("VLLM:")
            and block_size in (0, what.choice.block_size)
        }
        mine = [one for one in listed if one.what in usable]
        here = [one for one in mine if usable[one.what]]
        own = [one for one in here if one.run_id not in hidden]
        self.is_published = bool(here) and not own
        # A published run may be a stranger's machine: it stands beside itself only.
        last = max(here, key=lambda one: one.age).run_id if self.is_published else ""
        keep = [t for t in mine if (t.run_id == last if last else t.run_id not in hidden)]
        basis = own or here
        self.how = _how([one for one in basis if any(status.is_timed for status in one.statuses)])
        basis = [one for one in basis if one.what.how == self.how] or basis
        self.notes: list[str] = []
        self._tries: dict[tuple[Key, Key], list[Try]] = defaultdict(list)
        versions = dict(_versions(max(basis, key=lambda one: one.age).stack)) if basis else {}
        left_out: dict[str, None] = {}
        for one in sorted(keep, key=lambda one: one.age, reverse=True):
            stack = _versions(one.stack)
            if not stack.items() <= versions.items():
                clash = next((n for n in stack if versions.get(n, stack[n]) != stack[n]), "")
                if clash:
                    left_out[
                        f"runs with {clash}=={stack[clash]} left out: {versions[clash]} is newer"
                    ] = None
                    continue
                if usable[one.what]:
                    versions |= stack
            self._tries[one.what.layer, one.what.batch].append(one)
        self.notes += left_out
        self.device_kind = basis[0].what.device_kind if basis else ""
        self.compute_capability = basis[0].what.compute_capability if basis else ""
        self.versions = tuple(f"{name}=={one}" for name, one in sorted(versions.items()))

    def point(self, workload: Workload) -> Point:
        """Everything measured of a layer's batch."""
        columns = workload.columns()
        return self._point(self._tries.get((layer_key(columns), batch_key(columns)), []))

    def points(self) -> dict[str, Point]:
        """By workload text, every stored batch of every layer."""
        return {tries[0].what.workload: self._point(tries) for tries in self._tries.values()}

    def grid(self, layer: Workload) -> dict[str, Point]:
        """By workload text, every stored batch of the layer of `layer`."""
        wanted = layer_key(layer.columns())
        return {
            tries[0].what.workload: self._point(tries)
            for (key, _), tries in self._tries.items()
            if key == wanted
        }

    def _point(self, tries: Sequence[Try]) -> Point:
        mine: dict[Choice, list[Try]] = defaultdict(list)
        every: dict[Choice, list[Try]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        used = {}
        for one in tries:
            every[one.what.choice].append(one)
            if self.how is None or one.what.how == self.how:
                used[one] = used_replicates(one)
                mine[one.what.choice].append(one)
                counts[one.run_id] += used[one][2] is Status.OK
        home = max(counts, key=lambda run: (counts[run], run), default="")
        timed: dict[Choice, Timed] = {}
        ended: dict[Choice, Ended] = {}
        for choice, tried in every.items():
            newest = max(tried, key=lambda one: one.age).run_id
            wrong = [
                one for one in tried if one.run_id == newest and Status.INCORRECT in one.statuses
            ]
            if wrong:  # a wrong output is wrong however it is timed
                ended[choice] = _ended(choice, Status.INCORRECT, wrong)
                continue
            if not mine[choice]:
                continue
            last = max(mine[choice], key=lambda one: one.run_id)
            status = used[last][2]
            if status is not Status.OK:
                ended[choice] = _ended(choice, status, [last])
                continue
            at_home = (one for one in mine[choice] if one.run_id == home)
            taken = next((one for one in at_home if used[one][2] is Status.OK), last)
            replicates, noisy, _ = used[taken]
            timed[choice] = Timed(
                choice, tuple(replicates), taken.run_id, taken.started_at, taken.stack, noisy
            )
        return Point(timed, ended, home)


def _ended(choice: Choice, status: Status, tries: Sequence[Try]) -> Ended:
    reasons = dict.fromkeys(
        reason
        for one in tries
        for its, listed in zip(one.statuses, one.reasons, strict=True)
        for reason in listed
        if its is status
    )
    return Ended(choice, status, "; ".join(reasons))


def _how(timed: Sequence[Try]) -> How | None:
    """The way that covers most batches and choices, the newest of equals."""
    newest: dict[What, tuple[Any, ...]] = {}
    for one in timed:
        age = one.age
        if age > newest.get(one.what, ()):
            newest[one.what] = age
    covered: dict[How, set[tuple[Key, Key, Choice]]] = defaultdict(set)
    ages: dict[How, list[tuple[Any, ...]]] = defaultdict(list)
    for what, age in newest.items():
        covered[what.how].add((what.layer, what.batch, what.choice))
        ages[what.how].append(age)
    if not covered:
        return None
    return max(covered, key=lambda how: (len(covered[how]), max(ages[how])))


@lru_cache(maxsize=256)
def _versions(stack: tuple[str, ...]) -> Mapping[str, str]:
    pairs = (one.partition("==") for one in stack)
    return {name: version for name, _, version in pairs if name not in _NO_KERNELS}
