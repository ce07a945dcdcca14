"""Data files: JSON assigned to one global by a script tag, for pages opened from disk.

Browsers refuse fetch, XHR and module imports under `file://`; a script tag is all that is left.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

#: The one global of the pages.
GLOBAL = "attnbenchData"

#: `json.dumps` makes one for every call.
_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))

_AFTER = ";\n"

#: Most of what is written: no call for each.
_AS_THEY_ARE = frozenset({str, int, bool, type(None)})


def to_json(value: Any) -> str:
    """JSON that is safe inside a script: ASCII, without `<`, `>` and `&`; NaN becomes null."""
    text = _ENCODER.encode(_plain(value))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data_script(name: str, value: Any) -> str:
    """The text of the data file `name`: it assigns `value` to `attnbenchData[name]`."""
    return text_script(name, to_json(value))


def text_script(name: str, text: str) -> str:
    """The same of a value that is JSON already, as `to_json` writes it."""
    return f"{_before(name)}{text}{_AFTER}"


def script_text(name: str, script: str) -> str | None:
    """The JSON in the text of a data file; None if it is no such file."""
    before = _before(name)
    if not (script.startswith(before) and script.endswith(_AFTER)):
        return None
    return script[len(before) : -len(_AFTER)]


def _before(name: str) -> str:
    return f"(window.{GLOBAL}=window.{GLOBAL}||{{}})[{to_json(name)}]="


def _plain(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, float):
        # Seven digits are far beyond what any timer knows, and halve the files.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, dict):
        return {
            str(key): item if type(item) in _AS_THEY_ARE else _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _AS_THEY_ARE else _plain(item) for item in value]
    return value
