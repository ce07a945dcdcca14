"""`attnbench doctor`: can this machine measure, and what would make it better?"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit
from attnbench.errors import ExitCode

if TYPE_CHECKING:
    from attnbench.measure.checks import Check

#: `values` is an object of numbers: for JSON only.
_COLUMNS = ("check", "result", "measured", "meaning", "mend", "values")

_NAME_WIDTH = 15
_RESULT_WIDTH = 8
_COLORS = {"ok": "32", "warn": "33", "fail": "31", "not run": "2"}


def doctor(
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Test this machine: timers, clocks, rates, noise, backends, and what to mend."""
    from attnbench.measure.checks import can_measure
    from attnbench.measure.doctor import examine
    from attnbench.selection import current_device
    from attnbench.settings import load_settings

    started = time.perf_counter()
    found = examine(results or load_settings().results, current_device())
    if format is Format.TABLE:
        checks = _print_as_they_come(found)
        print(_last_line(checks, time.perf_counter() - started))
    else:
        checks = list(found)
        columns = _COLUMNS if format is Format.JSON else _COLUMNS[:-1]
        emit([check.row() for check in checks], format, columns)
    raise typer.Exit(ExitCode.OK if can_measure(checks) else ExitCode.INCOMPLETE)


def _print_as_they_come(found: Iterable[Check]) -> list[Check]:
    color = sys.stdout.isatty()
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    checks = []
    for check in found:
        print("\n".join(_lines(check, width, color)), flush=True)
        checks.append(check)
    return checks


def _lines(check: Check, width: int, color: bool) -> list[str]:
    """Result and name on the left, the words beside them, the mend last and marked."""
    indent = _RESULT_WIDTH + _NAME_WIDTH
    room = max(30, width - indent)
    paragraphs = [check.measured, check.meaning]
    texts = [line for text in paragraphs if text for line in _wrap(text, room)]
    if check.mend:
        texts += _wrap(f"mend: {check.mend}", room, "      ")
    result = f"{check.result:<{_RESULT_WIDTH}}"
    if color:
        result = f"\033[{_COLORS[check.result]}m{result}\033[0m"
    first = f"{result}{check.name:<{_NAME_WIDTH}}{texts[0]}"
    return [first, *(" " * indent + text for text in texts[1:])]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width`; a number and its unit stay together."""
    joined = re.sub(r"(?<=\d) (?=\S)", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(joined, width, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _last_line(checks: Sequence[Check], seconds: float) -> str:
    from attnbench.measure.checks import CheckResult, can_measure

    failed = [check.name for check in checks if check.result is CheckResult.FAIL]
    warned = sum(check.result is CheckResult.WARN for check in checks)
    if not can_measure(checks):
        verdict = f"This machine cannot measure: {', '.join(dict.fromkeys(failed))}"
    elif warned:
        verdict = f"This machine can measure; {warned} thing{'s' * (warned > 1)} could be better"
    else:
        verdict = "This machine can measure, and nothing needs mending"
    code = ExitCode.OK if can_measure(checks) else ExitCode.INCOMPLETE
    return f"\n{verdict}. {seconds:.0f} s, exit {int(code)}"
