"""What a summary has room for: sections of lines, cut to a number of lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

#: How many entries of one kind are listed before "and N more".
LISTED = 3


class Room(Enum):
    """How much is said of a section, most first."""

    LIST = auto()
    """The first `LISTED` entries."""
    NAMES = auto()
    """The first one, and the first lines of the others."""
    ENTRY = auto()
    """The first one."""
    LINE = auto()
    """Its first line."""


@dataclass(frozen=True, slots=True)
class SummaryLine:
    """One line: `label` may be empty (it continues the line above), `style` is a rich style."""

    label: str
    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """What is said under one label. `entries`: of each its lines, the worst first.

    `count`: how many things these are about, where one entry is about several; 0: one each.
    """

    label: str
    entries: Sequence[Sequence[str]]
    style: str = "yellow"
    see: str = ": attnbench history"  # where the rest of many is
    count: int = 0

    def lines(self, room: Room) -> list[SummaryLine]:
        """What of it fits in `room`, and how many entries more there are."""
        shown = [text for entry in self.entries[:1] for text in entry]
        if room is Room.LINE:
            more = len(self.entries) - 1
            line = shown[0] + (f"   {self._rest(more)}" if more else "")
            return [SummaryLine(self.label, line, self.style)]
        listed = 1 if room is Room.ENTRY else LISTED
        for entry in self.entries[1:listed]:
            shown += entry if room is Room.LIST else entry[:1]
        more = len(self.entries) - listed
        lines = [
            SummaryLine(self.label if i == 0 else "", text, self.style)
            for i, text in enumerate(shown)
        ]
        return lines + [SummaryLine("", self._rest(more))] * (more > 0)

    def _rest(self, more: int) -> str:
        return f"and {more} more{self.see}"


def fitted(sections: Sequence[Section], most: int) -> list[SummaryLine]:
    """The lines of `sections`, at most `most`: of the least important ones less is said first.

    The gravest one keeps the whole of its first entry, with what to type, before others are told.
    """
    rooms = [Room.LIST] * len(sections)
    chosen = list(sections)
    for place in reversed(range(len(chosen))):
        for room in Room if place else tuple(Room)[:-1]:
            rooms[place] = room
            if _num_lines(chosen, rooms) <= most:
                break
    left: list[Section] = []
    while _num_lines(chosen, rooms) + bool(left) > most:
        if len(chosen) == 1 and rooms[0] is not Room.LINE:
            rooms[0] = Room.LINE
        else:
            left.insert(0, chosen.pop())
    # What the last one shortened gave up may be more than was needed.
    for place in range(len(chosen)):
        for room in Room:
            rooms[place] = room
            if _num_lines(chosen, rooms) + bool(left) <= most:
                break
    lines = [line for i, section in enumerate(chosen) for line in section.lines(rooms[i])]
    if left:
        counts = ", ".join(
            f"{section.count or len(section.entries)} {section.label}" for section in left
        )
        lines.append(SummaryLine("more", f"{counts}: attnbench history"))
    return lines


def _num_lines(sections: Sequence[Section], rooms: Sequence[Room]) -> int:
    return sum(len(section.lines(room)) for section, room in zip(sections, rooms, strict=False))
