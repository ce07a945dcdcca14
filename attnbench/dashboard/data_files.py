"""The data files of the pages: written again only where what they are made of changed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from attnbench.dashboard.script import script_text, text_script

#: File name -> what its content was made of, and its size.
_STAMPS = "stamps.json"


class DataFiles:
    """One rendering. At its normal end our own files that it neither wrote nor kept are removed:
    the folder may be anybody's. `kinds` is what the names of ours begin with, up to a dash.

    After a rendering that was killed, what it was about to rewrite counts as not written.
    """

    def __init__(self, folder: Path, kinds: Collection[str]) -> None:
        self._folder = folder
        self._kinds = kinds
        self._current: set[str] = set()
        self._stamps: dict[str, str] = {}
        self._pending: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known = _read_stamps(self._folder / _STAMPS)
        # Whatever happens now, the next rendering must not believe these.
        (self._folder / _STAMPS).unlink(missing_ok=True)
        return self

    def keep(self, name: str, stamp: str) -> bool:
        """Whether the file is there already, made of what `stamp` stands for ("": unknown).

        Where it is not, `write` is expected.
        """
        path = self._path(name)
        if stamp and path.is_file():
            marked = f"{stamp}:{path.stat().st_size}"
            if self._known.get(name) == marked:
                self._stamps[name] = marked
                self._current.add(path.name)
                return True
        self._pending[name] = stamp
        return False

    def text(self, name: str, stamp: str) -> str | None:
        """The JSON that an earlier rendering wrote of what `stamp` stands for; None: not there."""
        path = self._path(name)
        if not stamp or not path.is_file():
            return None
        if self._known.get(name) != f"{stamp}:{path.stat().st_size}":
            return None
        return script_text(name, path.read_text(encoding="ascii"))

    def write(self, name: str, text: str) -> None:
        """`text` is JSON of `to_json`. Raises OSError."""
        path = self._path(name)
        script = text_script(name, text)
        path.write_text(script, encoding="ascii")
        self._current.add(path.name)
        if stamp := self._pending.pop(name, ""):
            self._stamps[name] = f"{stamp}:{len(script)}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        for old in self._folder.glob("*.js"):
            if old.stem.partition("-")[0] in self._kinds and old.name not in self._current:
                old.unlink()
        if self._stamps:
            (self._folder / _STAMPS).write_text(json.dumps(self._stamps), encoding="ascii")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.js"


def _read_stamps(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
