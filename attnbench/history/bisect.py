"""Which step of a line of candidates made a point slower: searched by measuring, step by step.

Candidates are in order, the first known good and the last known bad. Unlike `git bisect` and
`asv find`, which believe one measurement, every answer here is a rank test on fresh processes of
the candidate, the good and the bad end, by turns; what cannot be told is skipped, not guessed.
Who measures is handed in, so nothing here needs a device.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from attnbench.errors import DataError
from attnbench.history.confirm import LARGEST_P, ROUNDS, SecondLook, is_futile, second_look
from attnbench.history.rule import TimerNoise

#: Fewer rounds cannot show that two sides differ.
MIN_ROUNDS = 5

#: The status of a reading whose candidate could not even be started.
NOT_BUILT = "not built"

#: Processes that say whether a candidate works at all.
_STATUS_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Reading:
    """One fresh process of a candidate: `seconds`, or None and how it ended."""

    seconds: float | None
    status: str
    why: str = ""


class Outcome(StrEnum):
    """What is said of a candidate."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "skipped"  # cannot be built, or cannot measure this point
    UNDECIDED = "undecided"  # measured, and neither level for sure


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One candidate looked at; `over_good` is it over the good end, where it was timed."""

    place: int
    outcome: Outcome
    over_good: SecondLook | None = None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """What was found.

    Attributes:
        ends: the bad end over the good one; None where the bad end does not work at all.
        problem: why there was no search; "": there was one.
        last_good, first_bad: the nearest places known to be good and bad.
        final: the first bad candidate over the last good one, measured once more by themselves;
            None where candidates between them were skipped, or where it is a change of status.
    """

    labels: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    ends: SecondLook | None = None
    problem: str = ""
    is_wrong_way: bool = False
    last_good: int = 0
    first_bad: int = 0
    final: SecondLook | None = None
    bad_status: str = ""

    @property
    def suspects(self) -> tuple[str, ...]:
        """One of these is the first bad one; more than one where some were skipped."""
        return self.labels[self.last_good + 1 : self.first_bad + 1]

    @property
    def is_found(self) -> bool:
        """One suspect, whose own step was seen once more."""
        if self.problem or len(self.suspects) != 1:
            return False
        return bool(self.bad_status) or (self.final is not None and self.final.p <= LARGEST_P)

    @property
    def text(self) -> str:
        """One line for people."""
        if self.problem:
            return self.problem
        good = self.labels[self.last_good]
        if len(self.suspects) > 1:
            return (
                f"the first bad one is among {len(self.suspects)}: {', '.join(self.suspects)}; "
                f"{good} is good, and those between could not be told"
            )
        (bad,) = self.suspects
        if self.bad_status:
            return f"the first bad one is {bad}: {self.bad_status}, and {good} works"
        assert self.final is not None
        found = self.final.estimate
        ratio = f"{found.ratio:.4g} times {good} ({found.low:.4g} to {found.high:.4g})"
        if not self.is_found:
            return f"{bad} looked like the first bad one and does not hold up: {ratio}"
        text = f"the first bad one is {bad}: {ratio}, p = {self.final.p:.1g}"
        if self.ends is not None:
            own, whole = math.log(found.ratio), math.log(self.ends.estimate.ratio)
            if own < 0.7 * whole:
                text += (
                    f"; the ends differ by {self.ends.estimate.ratio:.4g}, so others add to it: "
                    "bisect the parts to either side"
                )
        return text


class Journal:
    """Readings as they come, one JSON line each, so that a search that was stopped goes on."""

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        """Raises DataError for a journal of another question, or that cannot be read."""
        self.path = path
        self._readings: dict[str, Reading] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what a killed process left after the last line break is half a line
        try:
            found = [json.loads(line) for line in whole]
            if found and found[0] != {"question": dict(question)}:
                raise DataError(f"{path}: of another question; start anew with --fresh")
            for line in found[1:]:
                self._readings[line["key"]] = Reading(line["seconds"], line["status"], line["why"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); start anew with --fresh") from error
        with path.open("w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in whole))
        if not whole:
            self._append({"question": dict(question)})

    def __len__(self) -> int:
        return len(self._readings)

    def read(self, key: str, measure: Callable[[], Reading]) -> Reading:
        """The reading under `key`, measured now if it is not there."""
        if key not in self._readings:
            reading = measure()
            self._readings[key] = reading
            # What could not be built, perhaps for want of a network, is tried again next time.
            if reading.status != NOT_BUILT:
                self._append({"key": key, **asdict(reading)})
        return self._readings[key]

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


Measure = Callable[[int], Reading]
"""A fresh process of the candidate at a place. A reading without a time says why."""

Told = Callable[[str], None]


@dataclass(slots=True)
class _Search:
    labels: tuple[str, ...]
    measure: Measure
    noise: TimerNoise
    rounds: int
    journal: Journal
    tell: Told

    def timed(
        self, name: str, places: Sequence[int], is_clear: Callable[[list[list[float]]], bool]
    ) -> list[list[float]] | tuple[int, Reading]:
        """Seconds of each place, by turns, until it is clear; or the first that gave none.

        Looked at twice, after half of the rounds and at their end: every further look would be
        another chance of an error. Half is an even number, so that a steady drift of the machine
        is the same for two that take turns.
        """
        half = (max(MIN_ROUNDS, self.rounds // 2) + 1) // 2 * 2
        times: list[list[float]] = [[] for _ in places]
        for round_ in range(self.rounds):
            turn = range(len(places)) if round_ % 2 == 0 else range(len(places) - 1, -1, -1)
            for n in turn:
                reading = self.read(name, round_, places[n])
                if reading.seconds is None:
                    return places[n], reading
                times[n].append(reading.seconds)
            if round_ + 1 == half and is_clear(times):
                break
        return times

    def read(self, name: str, round_: int, place: int) -> Reading:
        key = f"{name} round {round_} of {self.labels[place]}"
        return self.journal.read(key, lambda: self.measure(place))


def bisect(
    labels: Sequence[str],
    measure: Measure,
    noise: TimerNoise,
    journal: Journal,
    rounds: int = ROUNDS,
    tell: Told = lambda _: None,
) -> Bisection:
    """Find the first bad one of `labels`, of which the first is good and the last bad.

    Both ends are measured first: where they do not differ beyond the floor and the noise, or the
    other way round, there is nothing to search, and `problem` says so. A bad end that gives no
    time is bad by its status, and so are the candidates that end alike.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ValueError("two different candidates or more")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"{MIN_ROUNDS} rounds or more")
    search = _Search(tuple(labels), measure, noise, rounds, journal, tell)
    last = len(labels) - 1
    bad_status = _bad_status(search)
    if isinstance(bad_status, Bisection):
        return bad_status
    ends: SecondLook | None = None
    if not bad_status:
        checked = _check_ends(search)
        if isinstance(checked, Bisection):
            return checked
        ends = checked
        tell(f"{labels[last]} is {ends.estimate.ratio:.4g} times {labels[0]}, p = {ends.p:.1g}")
    good, bad = 0, last
    steps: list[Step] = []
    unknown: set[int] = set()
    while candidates := [place for place in range(good + 1, bad) if place not in unknown]:
        # Nearest the middle, as git does; the earlier of two.
        place = min(candidates, key=lambda one: (abs(2 * one - good - bad), one))
        step = _status_step(search, place, bad_status) if bad_status else _time_step(search, place)
        steps.append(step)
        if step.outcome is Outcome.GOOD:
            good = place
        elif step.outcome is Outcome.BAD:
            bad = place
        else:
            unknown.add(place)
        tell(f"{labels[place]} is {step.outcome}{f': {step.why}' if step.why else ''}")
    final = None
    if not bad_status and bad == good + 1:
        times = search.timed("final", (good, bad), lambda t: _is_clear(t[1], t[0]))
        final = second_look(times[1], times[0]) if isinstance(times, list) else None
    return Bisection(
        labels=search.labels,
        steps=tuple(steps),
        ends=ends,
        last_good=good,
        first_bad=bad,
        final=final,
        bad_status=bad_status,
        problem=""
        if final is not None or bad_status or bad > good + 1
        else f"{labels[bad]} could not be measured once more; run it again",
    )


def _bad_status(search: _Search) -> str | Bisection:
    """How the bad end fails, "" where it is timed; a Bisection where there is nothing to search."""
    last = len(search.labels) - 1
    # The bad end costs an installation and a process, and the good one says it all.
    if search.read("ends", 0, 0).seconds is None:
        return _no_good_end(search, search.read("ends", 0, 0))
    for n in range(_STATUS_ROUNDS):
        for place in (0, last) if n % 2 == 0 else (last, 0):
            search.read("ends", n, place)
    for place in (0, last):
        readings = [search.read("ends", n, place) for n in range(_STATUS_ROUNDS)]
        failed = [one for one in readings if one.seconds is None]
        if not failed:
            continue
        told = _told(failed[0])
        if place == 0:
            return _no_good_end(search, failed[0])
        if len(failed) < len(readings) or len({one.status for one in failed}) > 1:
            problem = f"the bad end, {search.labels[last]}, ends now so, now so: {told}"
            return Bisection(labels=search.labels, problem=f"{problem}; measure it with verify")
        if failed[0].status == NOT_BUILT:
            problem = f"the bad end, {search.labels[last]}, cannot be built: {failed[0].why}"
            return Bisection(labels=search.labels, problem=f"{problem}; name another")
        return failed[0].status
    return ""


def _no_good_end(search: _Search, reading: Reading) -> Bisection:
    problem = f"the good end, {search.labels[0]}, gives no time: {_told(reading)}; name another"
    return Bisection(labels=search.labels, problem=problem)


def _check_ends(search: _Search) -> SecondLook | Bisection:
    last = len(search.labels) - 1

    def is_clear(times: list[list[float]]) -> bool:
        good, bad = times
        return (
            second_look(bad, good).is_slower(search.noise)
            or is_futile(bad, good, search.noise)
            or second_look(good, bad).is_slower(search.noise)
        )

    times = search.timed("ends", (0, last), is_clear)
    if isinstance(times, tuple):
        place, reading = times
        problem = f"{search.labels[place]} gave no time: {_told(reading)}"
        return Bisection(labels=search.labels, problem=f"{problem}; run it again")
    good, bad = times
    found = second_look(bad, good)
    if found.is_slower(search.noise):
        return found
    one = found.estimate
    told = (
        f"{search.labels[last]} is {one.ratio:.4g} times {search.labels[0]} "
        f"({one.low:.4g} to {one.high:.4g}, p = {found.p:.2g}, {len(good)} processes each)"
    )
    is_wrong_way = second_look(good, bad).is_slower(search.noise)
    if is_wrong_way:
        problem = f"{told}: the bad end is the faster one; swap the ends"
    else:
        problem = (
            f"good and bad do not really differ here: {told}, and slower is beyond "
            f"{search.noise.limit:.4g} with p <= {LARGEST_P:g}; a quieter machine, more rounds or "
            "other ends"
        )
    return Bisection(labels=search.labels, problem=problem, ends=found, is_wrong_way=is_wrong_way)


def _is_clear(slow: Sequence[float], fast: Sequence[float]) -> bool:
    return second_look(slow, fast).p <= LARGEST_P


def _level(good: Sequence[float], own: Sequence[float], bad: Sequence[float]) -> Outcome:
    """The end the candidate is nearer to, if it surely differs from the other one."""
    middle = math.sqrt(statistics.median(good) * statistics.median(bad))
    if statistics.median(own) > middle:
        return Outcome.BAD if _is_clear(own, good) else Outcome.UNDECIDED
    return Outcome.GOOD if _is_clear(bad, own) else Outcome.UNDECIDED


def _time_step(search: _Search, place: int) -> Step:
    last = len(search.labels) - 1
    # Alone first: what cannot be built costs the ends no time.
    name = f"step {search.labels[place]},"
    first = search.read(name, 0, place)
    if first.seconds is None:
        return _skipped(place, first)
    times = search.timed(name, (place, 0, last), lambda t: _decided(t[1], t[0], t[2]))
    if isinstance(times, tuple):
        failed, reading = times
        if failed == place:
            return _skipped(place, reading)
        why = f"{search.labels[failed]} gave no time: {_told(reading)}"
        return Step(place=place, outcome=Outcome.UNDECIDED, why=why)
    own, good, bad = times
    outcome = _level(good, own, bad)
    look = second_look(own, good)
    why = ""
    if outcome is Outcome.UNDECIDED:
        why = f"{look.estimate.ratio:.4g} times {search.labels[0]}, p = {look.p:.2g}"
    return Step(place=place, outcome=outcome, over_good=look, why=why)


def _decided(good: Sequence[float], own: Sequence[float], bad: Sequence[float]) -> bool:
    return _level(good, own, bad) is not Outcome.UNDECIDED


def _status_step(search: _Search, place: int, bad_status: str) -> Step:
    readings = [search.read("status", n, place) for n in range(_STATUS_ROUNDS)]
    statuses = {"" if one.seconds is not None else one.status for one in readings}
    if statuses == {""}:
        return Step(place=place, outcome=Outcome.GOOD)
    if statuses == {bad_status}:
        return Step(place=place, outcome=Outcome.BAD)
    if len(statuses) > 1:
        return Step(place=place, outcome=Outcome.UNDECIDED, why="ends now so, now so")
    return _skipped(place, readings[0])


def _skipped(place: int, reading: Reading) -> Step:
    return Step(place=place, outcome=Outcome.SKIPPED, why=_told(reading))


def _told(reading: Reading) -> str:
    return f"{reading.status}{f' ({reading.why})' if reading.why else ''}"
