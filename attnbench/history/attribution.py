"""What a change of level came with: other code, another environment, both, or neither.

A change point says between which two runs a series changed; here is what else changed between
them. It names suspects, it proves nothing: `attnbench bisect` does, by measuring.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np

from attnbench.history.change_points import ChangePoint, change_points
from attnbench.history.runs import EnvironmentChange, RunSummary, environment_change
from attnbench.history.series import RunValue, Series
from attnbench.store import ResultsFolder

#: Facts of a run, beside its software, that a time depends on; and what people call them.
_MACHINE = {"hostname": "host", "device_uuid": "device", "compute_capability": "capability"}

#: Names in an environment change that are no package: nothing installs another version of them.
_NOT_INSTALLED = frozenset(
    {"driver", "cuda", "container", "stack", "python", "gxx", "clocks", *_MACHINE.values()}
)

#: Subjects of so many commits are listed.
_LISTED = 3

_SHA = re.compile(r"[0-9a-f]{7,64}")

#: What ends the commit of a run whose tree had local edits.
_DIRTY = "+dirty"


class Cause(StrEnum):
    """What differs between the runs to either side of a change."""

    CODE = "code"
    ENVIRONMENT = "environment"
    BOTH = "both"
    UNKNOWN = "unknown"  # nothing that is recorded


@dataclass(frozen=True, slots=True)
class CommitRange:
    """The commits of the two runs. `count` is how many lie in (first, last]; None: not known.

    `subjects` are those of the newest few of them, as `sha subject`.
    """

    first: str
    last: str
    count: int | None = None
    subjects: tuple[str, ...] = ()
    is_line: bool = True  # False: `last` does not descend from `first`

    @property
    def can_be_bisected(self) -> bool:
        return self.is_line and not (self.first + self.last).count(_DIRTY)

    @property
    def text(self) -> str:
        """`commits 1a2b3c4..5d6e7f8 (4 commits)`, for people."""
        first, last = short(self.first), short(self.last)
        if not self.is_line:
            return f"commits {first} and {last}, of which neither follows the other"
        if self.count == 1:
            return f"commit {self.subjects[0] if self.subjects else last}"
        known = f" ({self.count} commits)" if self.count else ""
        return f"commits {first}..{last}{known}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Between which runs a series changed, and what else changed there.

    `environment` has the software, and as names of their own `clocks`, `host`, `device` and
    `capability`. `num_runs` are the runs of the series from `before` to `after`, without `before`:
    more than 1 where noise hides which of them was the first.
    """

    before: RunSummary
    after: RunSummary
    num_runs: int
    environment: EnvironmentChange | None
    commits: CommitRange | None
    bisect: str = ""  # the command that would find out; "": there is nothing to bisect

    @property
    def cause(self) -> Cause:
        if self.commits and self.environment:
            return Cause.BOTH
        if self.commits:
            return Cause.CODE
        return Cause.ENVIRONMENT if self.environment else Cause.UNKNOWN

    @property
    def text(self) -> str:
        """One line without markup; names and subjects in it are as they were stored."""
        parts = []
        if self.commits:
            parts.append(self.commits.text)
        if self.environment:
            parts.append(self.environment.text)
        if not parts:
            return "same commit, software and machine on both sides: nothing recorded explains it"
        text = " and ".join(parts)
        return f"{text} changed together" if self.cause is Cause.BOTH else text


def series_changes(series: Series) -> tuple[ChangePoint, ...]:
    """The change points of a series; indices are those of its own, timed runs (`timed_runs`)."""
    return change_points([value.median_s or np.nan for value in timed_runs(series)])


def timed_runs(series: Series) -> tuple[RunValue, ...]:
    """One's own runs that were timed, oldest first."""
    return tuple(v for v in series.values if v.is_timed and not v.is_published)


def attribute(
    series: Series,
    change: ChangePoint,
    runs: Mapping[str, RunSummary],
    repository: Path | None = None,
    clocks: Mapping[str, str] | None = None,
) -> Attribution:
    """What changed with `change`, one of `series_changes(series)`.

    Args:
        runs: by run id, all that the series has.
        repository: a clone that has the commits; None, or one that does not know them: they are
            named and not counted.
        clocks: `locked_clocks` of the runs; None: not looked at.
    """
    values = timed_runs(series)
    return attribute_between(
        series, values[change.low], values[change.high], runs, repository, clocks
    )


def attribute_since(
    series: Series,
    since: RunValue,
    runs: Mapping[str, RunSummary],
    repository: Path | None = None,
    clocks: Mapping[str, str] | None = None,
) -> Attribution | None:
    """What changed with the run a verdict names as the first of its level; None: it has none
    before it. The run before is the last that did what `since` did, or failed to."""
    earlier = [v for v in series.before(since) if not v.is_published]
    if not since.commit.endswith(_DIRTY):
        # A tree with local edits is nobody's level but its own.
        earlier = [v for v in earlier if not v.commit.endswith(_DIRTY)]
    if since.is_timed and any(v.is_timed for v in earlier):
        earlier = [v for v in earlier if v.is_timed]
    if not earlier:
        return None
    return attribute_between(series, earlier[-1], since, runs, repository, clocks)


def attribute_between(
    series: Series,
    old: RunValue,
    new: RunValue,
    runs: Mapping[str, RunSummary],
    repository: Path | None = None,
    clocks: Mapping[str, str] | None = None,
) -> Attribution:
    """What differs between two runs of a series, `old` before `new`."""
    before, after = runs[old.run_id], runs[new.run_id]
    start, end = ((v.started_at, v.run_id) for v in (old, new))
    between = sum(
        start < (v.started_at, v.run_id) <= end for v in series.values if not v.is_published
    )
    environment = environment_between(before, after, clocks or {})
    commits = _commits(before.commit, after.commit, repository)
    return Attribution(
        before=before,
        after=after,
        num_runs=max(1, between),
        environment=environment,
        commits=commits,
        bisect=_command(series, before, after, commits, environment),
    )


def locked_clocks(folder: ResultsFolder, run_ids: Sequence[str]) -> dict[str, str]:
    """What each run did with the GPU's clock: `locked at 1500 MHz` or `free`.

    Runs whose header does not say are left out.
    """
    found, headers = {}, folder.headers()
    for run_id in run_ids:
        hz = headers[run_id].options.get("locked_clock_hz")
        if isinstance(hz, (int, float)):
            found[run_id] = f"locked at {hz / 1e6:g} MHz" if hz else "free"
    return found


def short(commit: str) -> str:
    """Seven digits of a commit, keeping what says that the tree was not clean."""
    name, plus, mark = commit.partition("+")
    return name[:7] + plus + mark


def environment_between(
    before: RunSummary, after: RunSummary, clocks: Mapping[str, str]
) -> EnvironmentChange | None:
    """What differs between the software and machines of two runs; `clocks` as for `attribute`."""
    software = environment_change(before, after)
    changed = list(software.changed) if software else []
    for fact, name in _MACHINE.items():
        # An older file may lack a fact; that is no change of the machine.
        old, new = before.facts.get(fact, ""), after.facts.get(fact, "")
        if old and new and old != new:
            changed.append((name, old, new))
    old, new = clocks.get(before.run_id, ""), clocks.get(after.run_id, "")
    if old and new and old != new:
        changed.append(("clocks", old, new))
    if not changed:
        return None
    return EnvironmentChange(before=before.run_id, after=after.run_id, changed=tuple(changed))


def _commits(first: str, last: str, repository: Path | None) -> CommitRange | None:
    if first == last or not (first and last):
        return None
    names = first.partition("+")[0], last.partition("+")[0]
    # What is stored may be anything; only a hash is handed to git.
    if not all(_SHA.fullmatch(name) for name in names):
        return CommitRange(first, last)
    if repository is None or not all(_is_known(repository, name) for name in names):
        return CommitRange(first, last)
    if names[0] == names[1]:
        return CommitRange(first, last)  # one of them with local edits
    if _git(repository, "merge-base", "--is-ancestor", *names) is None:
        return CommitRange(first, last, is_line=False)
    count = _git(repository, "rev-list", "--count", "..".join(names))
    log = _git(
        repository, "log", "-z", f"-n{_LISTED}", "--abbrev=7", "--format=%h %s", "..".join(names)
    )
    subjects = tuple(line.strip() for line in (log or "").split("\0") if line.strip())
    return CommitRange(first, last, int(count) if count else None, subjects)


def _is_known(repository: Path, commit: str) -> bool:
    return _git(repository, "cat-file", "-e", f"{commit}^{{commit}}") is not None


@lru_cache(maxsize=4096)
def _git(repository: Path, *words: str) -> str | None:
    """What git prints; None where it fails. Many series share their commits: asked once."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command(
    series: Series,
    before: RunSummary,
    after: RunSummary,
    commits: CommitRange | None,
    environment: EnvironmentChange | None,
) -> str:
    """`attnbench bisect ...`: packages first, for a commit does not change what is installed."""
    identity = series.identity
    backend = str(identity["backend"]) + (f":{identity['variant']}" if identity["variant"] else "")
    point = [str(identity["workload"]), "--backend", backend]
    changed = environment.changed if environment else ()
    packages = [
        (name, old, new) for name, old, new in changed if name not in _NOT_INSTALLED and old and new
    ]
    if len(packages) == 1:
        name, old, new = packages[0]
        point += ["--package", f"{name}=={old}..{new}"]
    elif packages:
        point += ["--stacks", f"{before.stack_id}..{after.stack_id}"]
    elif commits and commits.can_be_bisected and commits.count != 1:
        point += ["--commits", f"{commits.first}..{commits.last}"]
    else:
        return ""
    return shlex.join(["attnbench", "bisect", *point])
