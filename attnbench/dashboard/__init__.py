"""Static pages that work from disk: what broke, how bad, since when, and what to type.

Nothing here loads torch. Importing the package alone loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnbench.dashboard.answers import Answers as Answers
    from attnbench.dashboard.answers import read_answers as read_answers
    from attnbench.dashboard.pages import Pages as Pages
    from attnbench.dashboard.pages import load_pages as load_pages
    from attnbench.dashboard.pages import read_matrix as read_matrix
    from attnbench.dashboard.pages import write_matrix as write_matrix
    from attnbench.dashboard.site import render as render

_HOMES = {
    "Answers": "answers",
    "read_answers": "answers",
    "Pages": "pages",
    "load_pages": "pages",
    "read_matrix": "pages",
    "write_matrix": "pages",
    "render": "site",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
