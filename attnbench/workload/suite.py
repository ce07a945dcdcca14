"""Suites: named sweeps, written as Python files that anybody can add.

A suite file `suites/decode.py` sets `SUITE = Suite(...)`: lists of workload texts, with brace
ranges, for three presets. `smoke` proves that everything runs, `nightly` is watched, `full` is for
a long look at a large device.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attnbench.errors import AttnBenchError, UsageError, WorkloadError
from attnbench.workload.closest import did_you_mean
from attnbench.workload.identity import short_hash
from attnbench.workload.ranges import expand_ranges
from attnbench.workload.workload import Workload

PRESETS = ("smoke", "nightly", "full")
_EXAMPLE = 'SUITE = Suite("decode", "One new token", smoke=["8q1s1k"], nightly=[...], full=[...])'


def expand_workloads(texts: Iterable[str]) -> tuple[Workload, ...]:
    """The workloads of `texts` after their ranges are expanded; what means the same comes once."""
    found: dict[Workload, None] = {}
    for line in texts:
        for text in expand_ranges(line):
            try:
                found.setdefault(Workload.parse(text))
            except WorkloadError as error:
                if text == line:
                    raise
                raise WorkloadError(f"{line!r} stands for {text!r}, and {error}") from None
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Suite:
    """A named sweep. Every text is read when the suite is made, so that a typo is found at once.

    Args:
        name: what `attnbench run --suite` takes; part of no stored key.
        description: one line for a person.
        smoke, nightly, full: workload texts with brace ranges.
        backends: names to measure; empty: every backend of the device.

    Raises:
        WorkloadError: a text cannot be read.
    """

    name: str
    description: str
    smoke: Sequence[str] = ()
    nightly: Sequence[str] = ()
    full: Sequence[str] = ()
    backends: tuple[str, ...] = ()
    _workloads: Mapping[str, tuple[Workload, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        expanded = {}
        for preset in PRESETS:
            texts = getattr(self, preset)
            if isinstance(texts, str):
                raise WorkloadError(
                    f"suite {self.name!r}: {preset} is one text; write a list, {preset}=[{texts!r}]"
                )
            object.__setattr__(self, preset, tuple(texts))
            try:
                expanded[preset] = expand_workloads(texts)
            except WorkloadError as error:
                raise WorkloadError(f"suite {self.name!r}, {preset}: {error}") from None
        object.__setattr__(self, "backends", tuple(self.backends))
        object.__setattr__(self, "_workloads", expanded)

    def workloads(self, preset: str = "nightly") -> tuple[Workload, ...]:
        """The workloads of a preset, ranges expanded, each once, in the order written.

        Raises:
            UsageError: there is no such preset.
        """
        if preset not in self._workloads:
            raise UsageError(f"unknown preset {preset!r}; {did_you_mean(preset, PRESETS)}")
        return self._workloads[preset]


def load_suites(folder: Path) -> dict[str, Suite]:
    """Every suite of `folder`, by name, in the order of the file names.

    Files whose name starts with an underscore are helpers and are not loaded.

    Raises:
        UsageError: the folder has no suites, a file cannot be loaded, or two have one name.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder; set `suites` in attnbench.toml to the folder that holds "
            "the suite files, or write some to start from with `attnbench init`"
        )
    owners: dict[str, Path] = {}
    suites: dict[str, Suite] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        suite = _load_suite(path)
        if suite.name in suites:
            raise UsageError(
                f"{path}: the suite name {suite.name!r} is taken by {owners[suite.name]}; "
                "rename one"
            )
        owners[suite.name] = path
        suites[suite.name] = suite
    if not suites:
        raise UsageError(f"{folder} has no suite files; write {folder / 'decode.py'}: {_EXAMPLE}")
    return suites


def _load_suite(path: Path) -> Suite:
    # A name of its own, so that `decode.py` here and `decode.py` there do not meet.
    name = f"attnbench_suite_{path.stem}_{short_hash(str(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling in the file look their module up here.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except AttnBenchError as error:
        del sys.modules[name]
        raise UsageError(f"{path}{_line_of(error, path)}: {error}") from error
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"{path}{_line_of(error, path)}: {type(error).__name__}: {_first_line(error)}; "
            f"mend the file, its form is {_EXAMPLE}"
        ) from error
    suite = getattr(module, "SUITE", None)
    if not isinstance(suite, Suite):
        problem = "sets no SUITE" if suite is None else f"sets SUITE to a {type(suite).__name__}"
        raise UsageError(f"{path} {problem}; write {_EXAMPLE}")
    return suite


def _line_of(error: Exception, path: Path) -> str:
    """` line 12`: the last line of the suite file that was running."""
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}" if error.lineno else ""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path
    ]
    return f" line {lines[-1]}" if lines else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]
