"""What a person who mistyped a name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of an error message: the closest of `options`, or all of them when none is close."""
    names = list(options)
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.55)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"choose one of: {', '.join(names)}"
