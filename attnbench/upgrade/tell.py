"""What a long preparation says to the person who waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

Advance = Callable[[int], None]
"""Called with how much more is done."""

Unit = Literal["bytes", "packages"]


class Tell(Protocol):
    """Where notes and progress go. The command line has one for a terminal."""

    def note(self, message: str) -> None:
        """One line for the person at the terminal."""

    def progress(self, label: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        """A bar from 0 to `total` for as long as the context lasts."""


class Silent:
    """Says nothing."""

    def note(self, message: str) -> None:
        return None

    def progress(self, label: str, total: int, unit: Unit) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _more: None)


def megabytes(size: int) -> str:
    """`size` in bytes as people read it: 12.3 MB."""
    return f"{size / 1e6:.1f} MB"
