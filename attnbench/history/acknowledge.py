"""Acknowledgements: alarms that people know of and accept until a day, in a reviewed file.

The file (`acknowledged.toml` beside attnbench.toml) has one table `[[known]]` per entry. Here it is
read, checked and written; `alarms.py` decides what an entry covers. docs/acknowledge.md has the
keys.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attnbench.errors import InfrastructureError, SettingsError
from attnbench.store.record import Status

#: An entry holds at most so many days from today: what is accepted for longer is the new level, and
#: what nobody looks at for half a year is forgotten.
LONGEST_DAYS = 180

#: Keys that say which series, each a pattern with `*` and `?`; `alarms.point_fields` fills them.
PATTERNS = ("series", "backend", "variant", "phase", "workload", "shape", "device", "metric")

#: Patterns of which an entry needs one: a device or metric alone would accept a whole night.
_NARROWING = PATTERNS[:6]

_TABLE = "known"


class AlarmKind(StrEnum):
    """What an alarm is about."""

    SLOWER = "slower"
    STATUS = "status"  # a point works no longer, or gives a wrong output
    MISSING = "missing"  # planned, and the run has no row of it
    STALE = "stale"  # not measured for many nights, though its workload is


#: Statuses an entry may accept. A wrong output is none of them.
ACCEPTABLE = tuple(
    s
    for s in Status
    if s not in (Status.OK, Status.NOISY, Status.UNTIMED, Status.THROTTLED, Status.INCORRECT)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """One entry.

    Attributes:
        patterns: which points: key of `PATTERNS` -> pattern; what is not there is any.
        since: a run id, a commit (both may be shortened) or a day, `2026-11-21`.
        up_to: of kind `slower` the largest ratio accepted, to the level before `since`.
        statuses: of kind `status` those accepted.
        expires: the last day it holds, UTC.
        place: `acknowledged.toml, line 12`, for messages.
    """

    kind: AlarmKind
    patterns: Mapping[str, str]
    since: str
    reason: str
    by: str
    expires: date
    up_to: float = 0.0
    statuses: tuple[Status, ...] = ()
    place: str = field(default="", compare=False)

    def matches(self, fields: Mapping[str, str]) -> bool:
        """Whether it is about the point that `fields` (`alarms.point_fields`) describes."""
        return all(
            matches_series(pattern, fields) if name == "series" else _fits(fields[name], pattern)
            for name, pattern in self.patterns.items()
        )

    def holds(self, day: date) -> bool:
        """Whether it has not expired on `day`."""
        return day <= self.expires


def matches_series(pattern: str, fields: Mapping[str, str]) -> bool:
    """Whether `pattern` is the point's title, or its series' or own id or eight digits of one."""
    ids = (fields["series"], fields["point"])
    is_id = len(pattern) >= 8 and any(one.startswith(pattern) for one in ids)
    return is_id or _fits(fields["title"], pattern)


def load_acknowledgements(path: Path, today: date | None = None) -> tuple[Acknowledgement, ...]:
    """The entries of the file, in its order; none if there is no such file.

    `today` (default: now, UTC) is what `LONGEST_DAYS` counts from. Raises SettingsError naming the
    line and the mend.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise SettingsError(
            f"{path}: cannot be read ({error.strerror}); make it a readable file or remove it"
        ) from error
    return parse_acknowledgements(data, path.name, today)


def parse_acknowledgements(
    data: bytes, name: str, today: date | None = None
) -> tuple[Acknowledgement, ...]:
    """`load_acknowledgements` of a file's content; `name` is what messages call it."""
    try:
        text = data.decode("utf-8")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError(f"{name}, line {line}: not UTF-8; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name}: not valid TOML: {error}; mend that line") from error
    lines = _Lines(name, text)
    for key in table:
        if key != _TABLE:
            raise SettingsError(
                f"{lines.of_key(None, key)}: {key!r} is not known here; entries begin with "
                f"[[{_TABLE}]]"
            )
    entries = table.get(_TABLE, [])
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise SettingsError(f"{name}: write [[{_TABLE}]], with both brackets, above each entry")
    lines.count(len(entries))
    latest = (today or datetime.now(UTC).date()) + timedelta(days=LONGEST_DAYS)
    return tuple(_entry(one, lines, number, latest) for number, one in enumerate(entries))


def entry_text(entry: Acknowledgement) -> str:
    """The entry as TOML; `parse_acknowledgements` reads an equal one back.

    Whatever is not printable is written as `\\uXXXX`: a reviewer sees what is there.
    """
    rows = [f"[[{_TABLE}]]", f"kind = {quoted(entry.kind)}"]
    rows += [
        f"{name} = {quoted(entry.patterns[name])}" for name in PATTERNS if name in entry.patterns
    ]
    if entry.kind is AlarmKind.SLOWER:
        rows.append(f"up_to = {entry.up_to!r}")
    if entry.kind is AlarmKind.STATUS:
        rows.append(f"statuses = [{', '.join(quoted(status) for status in entry.statuses)}]")
    rows += [f"{name} = {quoted(getattr(entry, name))}" for name in ("since", "reason", "by")]
    rows.append(f"expires = {entry.expires.isoformat()}")
    return "\n".join(rows) + "\n"


def append_entry(path: Path, entry: Acknowledgement, today: date | None = None) -> None:
    """Add `entry` at the end of the file, which is made if it is not there; whole or not at all.

    Raises SettingsError for a file or an entry that would not be read again, or a file that cannot
    be written, InfrastructureError for a full disk.
    """
    load_acknowledgements(path, today)
    try:
        before = path.read_bytes() if path.exists() else b""
        gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
        after = before + gap + entry_text(entry).encode("utf-8")
        parse_acknowledgements(after, path.name, today)
        target = path.resolve()  # a link stays one
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(after)
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
            os.chmod(temporary, mode)
            os.replace(temporary, target)
        except BaseException:  # Ctrl-C as well: nothing half-written stays behind
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        from attnbench.store.disk import DISK_FULL

        kind = InfrastructureError if error.errno in DISK_FULL else SettingsError
        raise kind(
            f"{path}: cannot be written ({error.strerror}); add the entry by hand, --print shows it"
        ) from error


def quoted(text: str) -> str:
    """`text` as a TOML string on one line."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    shown = []
    for c in text:
        if 0xD800 <= ord(c) < 0xE000:
            c = "\N{REPLACEMENT CHARACTER}"  # half of a pair: no text at all
        if c in escapes:
            shown.append(escapes[c])
        elif c.isprintable():
            shown.append(c)
        else:
            shown.append(f"\\u{ord(c):04x}" if ord(c) <= 0xFFFF else f"\\U{ord(c):08x}")
    return '"' + "".join(shown) + '"'


def _fits(text: str, pattern: str) -> bool:
    # Titles have brackets, `FLASH_ATTN[fa3]`: only * and ? are special.
    return fnmatchcase(text, pattern.replace("[", "[[]"))


class _Lines:
    """Where entries and keys stand in the text."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines = text.splitlines()
        header = re.compile(rf"\s*\[\[\s*[\"']?{_TABLE}[\"']?\s*\]\]")
        self._starts = [i for i, line in enumerate(self._lines) if header.match(line)]

    def count(self, entries: int) -> None:
        """How many entries there are: other headers are in texts of several lines, or inline."""
        if entries != len(self._starts):
            self._starts = []

    def of_entry(self, number: int) -> str:
        if not self._starts:
            return f"{self._name}, entry {number + 1}"
        return f"{self._name}, line {self._starts[number] + 1}"

    def of_key(self, number: int | None, key: str) -> str:
        """`acknowledged.toml, line 12`; of the entry where the key has no line of its own."""
        if number is not None and not self._starts:
            return self.of_entry(number)
        start, end = 0, len(self._lines)
        if number is not None:
            start = self._starts[number]
            end = min((s for s in self._starts if s > start), default=end)
        own = re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[\]=.]")
        for i in range(start, end):
            if own.match(self._lines[i]):
                return f"{self._name}, line {i + 1}"
        return self._name if number is None else self.of_entry(number)


_EXAMPLES: Mapping[str, str] = {
    "kind": '"slower"',
    "since": '"20261121T015500Z-abc123" (a run or commit) or 2026-11-21',
    "reason": '"torch 2.13 checks bounds; fixed in 2.13.1"',
    "by": '"A. Person"',
    "expires": "2026-12-31",
    "up_to": "1.08",
    "statuses": '["UNSUPPORTED"]',
}


def _entry(values: Mapping[str, Any], lines: _Lines, number: int, latest: date) -> Acknowledgement:
    def wrong(key: str, text: str) -> SettingsError:
        return SettingsError(f"{lines.of_key(number, key)}: {text}")

    known = (*_EXAMPLES, *PATTERNS)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise wrong(key, f"unknown key {key!r}; {hint}")
    kind = _kind(values, lines, number)
    needed = ["since", "reason", "by", "expires"]
    needed += {AlarmKind.SLOWER: ["up_to"], AlarmKind.STATUS: ["statuses"]}.get(kind, [])
    for key in needed:
        if key not in values:
            raise SettingsError(
                f"{lines.of_entry(number)}: {key} is missing; add {key} = {_EXAMPLES[key]}"
            )
    for key in ("up_to", "statuses"):
        if key in values and key not in needed:
            raise wrong(key, f"{key} says nothing of kind {kind.value!r}; leave it out")
    for key in ("reason", "by", *PATTERNS):
        value = values.get(key, "any")
        if not isinstance(value, str) or not value.strip():
            example = _EXAMPLES.get(key, '"decode*"')
            raise wrong(key, f"{key} = {value!r} is not a text; write {key} = {example}")
    if not any(values.get(key, "*").strip("*") for key in _NARROWING):
        raise SettingsError(
            f"{lines.of_entry(number)}: it would accept every point; name a "
            f"{', '.join(_NARROWING[:-1])} or {_NARROWING[-1]}"
        )
    return Acknowledgement(
        kind=kind,
        patterns={key: values[key] for key in PATTERNS if key in values},
        since=_since(values["since"], lines, number),
        reason=values["reason"],
        by=values["by"],
        expires=_expires(values["expires"], lines, number, latest),
        up_to=_up_to(values["up_to"], lines, number) if "up_to" in values else 0.0,
        statuses=_statuses(values["statuses"], lines, number) if "statuses" in values else (),
        place=lines.of_entry(number),
    )


def _kind(values: Mapping[str, Any], lines: _Lines, number: int) -> AlarmKind:
    listed = ", ".join(kind.value for kind in AlarmKind)
    if "kind" not in values:
        raise SettingsError(
            f"{lines.of_entry(number)}: kind is missing; add one of {listed}: "
            f"kind = {_EXAMPLES['kind']}"
        )
    try:
        return AlarmKind(values["kind"])
    except ValueError:
        raise SettingsError(
            f"{lines.of_key(number, 'kind')}: kind = {values['kind']!r} is not known; use one of "
            f"{listed}"
        ) from None


def _since(value: Any, lines: _Lines, number: int) -> str:
    if isinstance(value, datetime):
        value = value.date()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str) and len(value) >= 7:
        return value
    raise SettingsError(
        f"{lines.of_key(number, 'since')}: since = {value!r} is neither a run, a commit (seven "
        f"digits or more) nor a day; write since = {_EXAMPLES['since']}"
    )


def _expires(value: Any, lines: _Lines, number: int, latest: date) -> date:
    place = lines.of_key(number, "expires")
    if isinstance(value, datetime) or not isinstance(value, date):
        raise SettingsError(
            f"{place}: expires = {value!r} is not a day; write it without quotes: expires = "
            f"{_EXAMPLES['expires']}"
        )
    if value > latest:
        raise SettingsError(
            f"{place}: expires = {value} is more than {LONGEST_DAYS} days from now; write a day up "
            f"to {latest}, and look at it again then"
        )
    return value


def _up_to(value: Any, lines: _Lines, number: int) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 < value < 1000:
        raise SettingsError(
            f"{lines.of_key(number, 'up_to')}: up_to = {value!r} is not a ratio above 1; write "
            f"up_to = {_EXAMPLES['up_to']} to accept 8 % more than the level before"
        )
    return float(value)


def _statuses(value: Any, lines: _Lines, number: int) -> tuple[Status, ...]:
    place = lines.of_key(number, "statuses")
    listed = ", ".join(ACCEPTABLE)
    if not isinstance(value, list) or not value:
        raise SettingsError(
            f"{place}: statuses = {value!r} is not a list; write statuses = "
            f"{_EXAMPLES['statuses']}, of {listed}"
        )
    if Status.INCORRECT in value:
        raise SettingsError(
            f"{place}: a wrong output is never accepted; take the point out of its suite, or the "
            "backend out of the night"
        )
    for one in value:
        if one not in ACCEPTABLE:
            raise SettingsError(f"{place}: {one!r} is no status to accept; use {listed}")
    return tuple(Status(one) for one in value)
