"""What a download and the making of an environment show: notes and a bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attnbench.cli.output import note
from attnbench.upgrade.tell import Advance, Unit


class TerminalTell:
    """Notes as lines on stderr; a progress bar there if it is a terminal, nothing otherwise."""

    def note(self, message: str) -> None:
        note(message)

    @contextmanager
    def progress(self, label: str, total: int, unit: Unit) -> Iterator[Advance]:
        if not sys.stderr.isatty():
            yield lambda _more: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda more: bar.advance(task, more)
