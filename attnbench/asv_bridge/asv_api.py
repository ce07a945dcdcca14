"""Every asv name attnbench touches, in one place. Followed: asv 0.6.6, asv_runner 0.3.2.

asv has no stable Python API. `tests/asv_bridge/test_asv_contract.py` checks each signature used
here, so that a new asv fails there by name and not in the middle of a night.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asv.main
from asv import util
from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.machine import Machine, MachineCollection
from asv.publishing import OutputPublisher
from asv.results import Results, get_filename
from asv.runner import BenchmarkResult
from asv.util import UserError

from attnbench.errors import InfrastructureError, UsageError

__all__ = [
    "CONFIG_NAMES",
    "DISCOVERING",
    "WEB_PAGE",
    "WEB_PAGE_ANCHOR",
    "AsvConfig",
    "CommitResults",
    "OutputPublisher",
    "TrackedSeries",
    "UserError",
    "config_argument",
    "load_config",
    "remember_machine",
    "remove_commits",
    "run_asv",
    "save_benchmarks",
    "save_commit",
    "save_machine",
    "subcommand",
]

#: asv's own names for its configuration file.
CONFIG_NAMES = ("asv.conf.json", "asv.conf.jsonc")

#: asv's subcommands that import the suites.
DISCOVERING = ("run", "continuous", "find", "profile", "check", "quickstart")

#: The page of asv's site that a link is added to, and the text it is put before.
WEB_PAGE = "index.html"
WEB_PAGE_ANCHOR = '<li id="nav-li-graphdisplay">'


@dataclass(frozen=True, slots=True)
class AsvConfig:
    """The keys of asv.conf.json attnbench reads. Paths are absolute."""

    path: Path
    repo: str
    benchmark_dir: Path
    results_dir: Path
    html_dir: Path
    env_dir: Path

    @property
    def folder(self) -> Path:
        """asv's working directory: what the paths in the file are relative to."""
        return self.path.parent


def load_config(path: Path) -> AsvConfig:
    """Read asv.conf.json. Raises UsageError."""
    try:
        conf = Config.load(str(path))
    except (UserError, OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}; see docs/asv.md for one that works") from error
    folder = path.resolve().parent
    return AsvConfig(
        path=path.resolve(),
        repo=conf.repo,
        benchmark_dir=folder / conf.benchmark_dir,
        results_dir=folder / conf.results_dir,
        html_dir=folder / conf.html_dir,
        env_dir=folder / conf.env_dir,
    )


def subcommand(arguments: Sequence[str]) -> str:
    """The asv subcommand among `arguments`, "" if there is none (`--help`, `--version`)."""
    before = ""
    for word in arguments:
        if not word.startswith("-") and before != "--config":
            return word
        before = word
    return ""


def config_argument(arguments: Sequence[str]) -> str | None:
    """What `arguments` give as `--config FILE` or `--config=FILE`; None if nothing."""
    for index, word in enumerate(arguments):
        if word == "--config":
            return "".join(arguments[index + 1 : index + 2])
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def remember_machine() -> Path | None:
    """What `asv machine --yes` does, once: the file written, None if asv knows a machine."""
    path = Path(MachineCollection.get_machine_file_path())
    if path.is_file():
        return None
    facts = Machine.get_defaults()
    MachineCollection.save(facts["machine"], facts)
    return path


def run_asv(arguments: Sequence[str]) -> int:
    """Run asv's command line in this process and return its exit status.

    asv turns its own user errors into status 1; what it lets escape (a git command that failed) is
    raised here as UsageError, so that no traceback becomes a 1.
    """
    before = sys.argv
    sys.argv = ["asv", *arguments]
    try:
        asv.main.main()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise UsageError(f"asv: {stop.code}") from stop
    except util.ProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        what = " ".join(str(word) for word in error.args[0])
        raise UsageError(
            f"asv: `{what}` failed: {said[-1] if said else error}; mend the revision or the "
            "repository and run it again"
        ) from error
    except OSError as error:
        raise InfrastructureError(f"asv: {error}; run `attnbench asv` again") from error
    finally:
        sys.argv = before
    return 0


@dataclass(frozen=True, slots=True)
class TrackedSeries:
    """One asv benchmark: a metric in seconds over `params`, the axes' values as plain text."""

    name: str
    description: str
    version: str
    param_names: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]

    def to_asv(self) -> dict[str, Any]:
        """asv's own description. Parameter values are stored as Python's repr."""
        return {
            "name": self.name,
            "code": self.description,
            "type": "track",
            "unit": "seconds",
            "version": self.version,
            "param_names": list(self.param_names),
            "params": [[repr(value) for value in axis] for axis in self.params],
            "timeout": None,
        }


@dataclass(frozen=True, slots=True)
class CommitResults:
    """What one machine and environment measured at one commit.

    `values`: series name -> one entry per parameter combination, in `itertools.product` order:
    seconds, or samples in seconds (asv keeps their median and its 99 % interval), or None.
    """

    machine: str
    commit: str
    commit_time: datetime
    environment: str
    params: Mapping[str, str]
    started_at: datetime
    values: Mapping[str, Sequence[float | Sequence[float] | None]]


def save_commit(
    results_dir: Path, series: Mapping[str, TrackedSeries], commit: CommitResults
) -> Path:
    """Write one commit's file through asv's own classes, and return its path.

    The same input writes the same bytes; a file that is there is replaced.
    """
    results = Results(
        {"machine": commit.machine, **commit.params},
        {},
        commit.commit,
        util.datetime_to_js_timestamp(commit.commit_time),
        commit.params.get("python", ""),
        commit.environment,
        {},
    )
    for name, values in sorted(commit.values.items()):
        sampled = [v if isinstance(v, Sequence) else None for v in values]
        results.add_result(
            series[name].to_asv(),
            BenchmarkResult(
                # NaN is asv's "not applicable"; None would be shown as a failure.
                result=[
                    True if s is not None else (float("nan") if v is None else v)
                    for v, s in zip(values, sampled, strict=True)
                ],
                samples=[None if s is None else list(s) for s in sampled],
                number=[None if s is None else 1 for s in sampled],
                errcode=0,
                stderr="",
                profile=None,
            ),
            started_at=commit.started_at,
            record_samples=False,
        )
    results.save(str(results_dir))
    file_name: str = get_filename(commit.machine, commit.commit, commit.environment)
    return results_dir / file_name


def remove_commits(results_dir: Path, environment: str, known: Collection[str]) -> None:
    """Remove what was saved for `environment` of commits that are not `known`."""
    for path in sorted(results_dir.glob(f"*/*-{environment}.json")):
        if Results.load(str(path)).commit_hash not in known:
            path.unlink()


def save_benchmarks(results_dir: Path, series: Mapping[str, TrackedSeries]) -> Path:
    """Add `series` to asv's benchmarks.json; what developers' suites put there stays."""
    path = Path(Benchmarks.get_benchmark_file_path(str(results_dir)))
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = util.load_json(str(path), api_version=Benchmarks.api_version)
        except UserError as error:
            raise UsageError(f"{path}: {error}; delete it and run the export again") from error
    known.update({name: one.to_asv() for name, one in series.items()})
    util.write_json(str(path), dict(sorted(known.items())), Benchmarks.api_version)
    return path


def save_machine(results_dir: Path, name: str, facts: Mapping[str, str]) -> Path:
    """Write machine.json, which asv's publisher wants beside a machine's results."""
    machine = Machine()
    machine.__dict__.update({field: "" for field, _ in Machine.fields} | dict(facts))
    machine.machine = name
    machine.save(str(results_dir))
    return results_dir / name / "machine.json"
