"""`attnbench.toml`: where a project keeps its suites, results and pages, and how it measures.

The nearest `attnbench.toml` from the working directory upwards is read; without one the defaults
hold and paths are relative to the working directory. Command-line flags override it. Every key is
documented here and in docs/settings.md; an unknown key is refused.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from attnbench.errors import SettingsError

FILE_NAME = "attnbench.toml"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one project. Paths are absolute or relative to the settings file's folder."""

    results: Path = field(default=Path("results"), metadata={"help": "folder of stored results"})
    suites: Path = field(default=Path("suites"), metadata={"help": "folder of suite files"})
    dashboards: Path = field(
        default=Path("dashboards"), metadata={"help": "folder that says which pages are shown"}
    )
    site: Path = field(
        default=Path("dashboards/site"), metadata={"help": "folder the pages are written to"}
    )
    device: str = field(
        default="", metadata={"help": "device to ask about, e.g. sm90; empty: the one present"}
    )
    backend: str = field(
        default="",
        metadata={"help": "backend to use instead of the platform's choice; empty: none"},
    )
    preset: str = field(
        default="nightly", metadata={"help": "preset `nightly` measures: smoke, nightly or full"}
    )
    replicates: int = field(
        default=3, metadata={"help": "fresh processes that measure every point of a nightly"}
    )
    budget_s: float = field(
        default=0.5, metadata={"help": "seconds of samples per point before it ends as NOISY"}
    )
    target_rel_ci: float = field(
        default=0.02,
        metadata={"help": "stop when the 95 % interval of the median is this narrow, relative"},
    )
    timeout_s: float = field(
        default=120.0,
        metadata={"help": "wall seconds a point may take before its worker is killed"},
    )
    manifest: str = field(
        default="",
        metadata={
            "help": "git repository with one commit per measured stack; empty: none",
            "path": True,
        },
    )
    reference: str = field(
        default="",
        metadata={
            "help": "python of the build before, measured in turn with what looks slower; "
            "empty: none",
            "program": True,
        },
    )
    confirm_points: int = field(
        default=200, metadata={"help": "points of a nightly that are measured again, at most"}
    )
    choice_days: int = field(
        default=30, metadata={"help": "days after its oldest measurement that a choice holds"}
    )

    acknowledgements: Path = field(
        default=Path("acknowledged.toml"),
        metadata={"help": "file of alarms that are known and accepted until a day"},
    )
    stale_nights: int = field(
        default=7,
        metadata={
            "help": "nights without a row of a backend, its workload measured, that are an alarm"
        },
    )

    @property
    def matrix_file(self) -> Path:
        """Where a nightly leaves the selection matrix for the pages."""
        return self.results / "matrix.json"

    @property
    def answers(self) -> Path:
        """Where answers of `itl` and `choose` are saved for the pages."""
        return self.results / "answers"


def find_settings_file(start: Path | None = None) -> Path | None:
    """The nearest `attnbench.toml` from `start` (default: the working directory) upwards."""
    folder = (start or Path.cwd()).resolve()
    for candidate in (folder, *folder.parents):
        if (candidate / FILE_NAME).is_file():
            return candidate / FILE_NAME
    return None


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings file at `path`, or the nearest one, or the defaults.

    Raises SettingsError for a file that cannot be read, an unknown key or a value of a wrong kind.
    """
    found = path or find_settings_file()
    if found is None:
        return Settings()
    try:
        table = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{found}: cannot be read ({error.strerror}); make it readable"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{found}: not valid TOML: {error}; mend that line") from error
    known = {f.name: f for f in fields(Settings)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise SettingsError(f"{found}: unknown key {key!r}; {hint}")
        values[key] = _checked(found, key, value, known[key])
    return Settings(**values)


def _checked(path: Path, key: str, value: Any, own: Field[Any]) -> Any:
    default = own.default
    assert default is not MISSING
    if isinstance(default, Path):
        if isinstance(value, str) and value:
            return (path.parent / value).resolve()
        expected = 'a path in quotes, e.g. "results"'
    elif isinstance(default, str):
        if isinstance(value, str):
            # Not resolved: the python of a virtual environment is a link, and is one by its place.
            is_path = own.metadata.get("path") and value
            is_path = is_path or (own.metadata.get("program") and "/" in value)
            return str(path.parent.absolute() / Path(value).expanduser()) if is_path else value
        expected = "text in quotes"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        expected = f"a whole number above 0, e.g. {default}"
    else:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            return float(value)
        expected = f"a number above 0, e.g. {default}"
    raise SettingsError(f"{path}: {key} = {value!r} is not {expected}")
