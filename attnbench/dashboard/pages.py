"""Which pages are shown (`dashboards/default.toml`), and the selection matrix of one of them."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench.errors import CorruptDataError, SettingsError
from attnbench.store.disk import remove_file, replace_file, writing

FILE_NAME = "default.toml"

#: Pages in the order of the navigation. The overview is always there: the others hang off it.
PAGE_TITLES: Mapping[str, str] = {
    "overview": "Overview",
    "series": "Series",
    "compare": "Compare",
    "backends": "Backends",
    "choices": "Choices",
    "traffic": "Traffic",
    "matrix": "Selection matrix",
    "support": "Support",
    "conditions": "Conditions",
    "gate": "The gate",
}


@dataclass(frozen=True, slots=True)
class Pages:
    """What `dashboards/default.toml` may say.

    Attributes:
        title: shown on every page.
        pages: the pages to write, of `PAGE_TITLES`; those that have nothing to show are left out.
        runs: how many of the newest runs get a conditions page.
    """

    title: str = "attnbench"
    pages: tuple[str, ...] = tuple(PAGE_TITLES)
    runs: int = 60

    def shows(self, page: str) -> bool:
        return page in self.pages


def load_pages(path: Path | None = None, folder: Path | None = None) -> Pages:
    """Read `path`, or `default.toml` in `folder`, or the defaults where that file is not there.

    Raises SettingsError for a file that cannot be read, an unknown key, page or kind of value.
    """
    found = path
    if found is None and folder is not None and (folder / FILE_NAME).is_file():
        found = folder / FILE_NAME
    if found is None:
        return Pages()
    try:
        table = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{found}: cannot be read ({error.strerror}); give a readable --config"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{found}: not valid TOML: {error}; mend that line") from error
    for key in table:
        _check_known(found, "key", key, Pages.__dataclass_fields__)
    title = table.get("title", Pages().title)
    if not isinstance(title, str) or not title.strip():
        raise SettingsError(f'{found}: title = {title!r} is not text; write e.g. title = "nightly"')
    runs = table.get("runs", Pages().runs)
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise SettingsError(f"{found}: runs = {runs!r} is not a whole number above 0")
    return Pages(title=title, pages=_chosen_pages(found, table.get("pages")), runs=runs)


def _chosen_pages(path: Path, names: Any) -> tuple[str, ...]:
    if names is None:
        return tuple(PAGE_TITLES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SettingsError(f'{path}: pages is not a list; write e.g. pages = ["overview"]')
    for name in names:
        _check_known(path, "page", name, PAGE_TITLES)
    return tuple(page for page in PAGE_TITLES if page == "overview" or page in names)


def _check_known(path: Path, kind: str, name: str, known: Mapping[str, Any]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise SettingsError(f"{path}: unknown {kind} {name!r}; {hint}")


def read_matrix(path: Path) -> Sequence[Mapping[str, Any]] | None:
    """The cells a nightly left in `matrix.json`, None if there is no such file.

    Raises CorruptDataError if it is not a list of objects.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"{path}: cannot be read ({error}); delete it") from error
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise CorruptDataError(f"{path}: not JSON ({error}); write it again: {_MEND}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CorruptDataError(f"{path}: not a list of cells; write it again: {_MEND}")
    return rows


def write_matrix(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Leave the cells of the selection matrix in `path`, whole or not at all; see `read_matrix`.

    Raises InfrastructureError on a full disk, ResultsFolderError if `path` cannot be written.
    """
    with writing(path):
        write_text_atomically(path, json.dumps([dict(row) for row in rows], indent=1))


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and give it that name. Raises OSError and leaves no half file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise


_MEND = "attnbench matrix --format json > results/matrix.json"
