"""The candidates of a bisection, and how one is measured: commits or versions between two.

A candidate is an environment as `side_env` makes them: the changed distributions in front, the
site-packages of this Python behind, so torch is not installed again where it is not what changes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from attnbench.errors import AttnBenchError, DataError, InfrastructureError, UsageError
from attnbench.history.bisect import NOT_BUILT, Reading
from attnbench.history.series_rows import sample_statistics
from attnbench.measure import MeasureOptions
from attnbench.store import ResultsFolder
from attnbench.store.record import Status
from attnbench.upgrade.alternate import PlanPart, measure_once
from attnbench.upgrade.cache import empty, making, read_stamp, stamp
from attnbench.upgrade.side_env import Side, make_side
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import git, normalized, parse_source

#: What makes a tree attnbench's own: it is measured as it is, and nothing is built.
_OWN_FILE = "attnbench/selection/__init__.py"

_RANGE = re.compile(r"(.+?)\.\.(.+)")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place of the line. `make` may raise what cannot be built.

    `finer`: what `--stacks` takes to search within this step; "": it is one change.
    """

    label: str
    make: Callable[[Path, Tell], Side]
    finer: str = ""


def parse_range(option: str, text: str) -> tuple[str, str]:
    """`A..B`. Raises UsageError."""
    found = _RANGE.fullmatch(text.strip())
    if not found or found[2].startswith("."):
        raise UsageError(f"{option} {text!r}: give the good and the bad one as GOOD..BAD")
    if found[1] == found[2]:
        raise UsageError(f"{option} {text!r}: good and bad are the same; name two that differ")
    return found[1], found[2]


def commit_candidates(text: str, repository: Path) -> list[Candidate]:
    """The commits of `GOOD..BAD` along first parents, the good one included.

    A merge is one candidate: only along first parents is every candidate a state of the branch,
    and the line one that can be halved. Raises UsageError.
    """
    names = parse_range("--commits", text)
    folder = repository.resolve()
    good, bad = (_commit(folder, name) for name in names)
    if good == bad:
        raise UsageError(f"--commits {text}: both are {good[:12]}; name two that differ")
    if git(folder, "merge-base", "--is-ancestor", good, bad).returncode != 0:
        raise UsageError(f"--commits {text}: {_why_no_line(folder, names, good, bad)}")
    listed = git(folder, "rev-list", "--reverse", "--first-parent", f"{good}..{bad}")
    line = [good, *listed.stdout.split()]
    own = git(folder, "cat-file", "-e", f"{bad}:{_OWN_FILE}").returncode == 0
    titles = _subjects(folder, good, bad)
    return [
        Candidate(
            f"{sha[:12]} {_plain(titles.get(sha, ''))}".strip(),
            partial(_commit_side, folder, sha, own=own),
        )
        for sha in line
    ]


def _why_no_line(folder: Path, names: tuple[str, str], good: str, bad: str) -> str:
    if git(folder, "merge-base", "--is-ancestor", bad, good).returncode == 0:
        return f"{names[0]} comes after {names[1]}; swap them: the good one is the older"
    told = f"{names[1]} does not follow {names[0]}"
    if _is_shallow(folder):
        return f"{told} as far as this shallow clone goes; `git fetch --unshallow` there"
    return f"{told} (rebased?); name two commits of one line"


def _is_shallow(folder: Path) -> bool:
    return git(folder, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"


def _subjects(folder: Path, good: str, bad: str) -> dict[str, str]:
    told = git(folder, "rev-list", "--first-parent", "--format=%H %s", f"{good}..{bad}").stdout
    told += git(folder, "rev-list", "--no-walk", "--format=%H %s", good).stdout
    pairs = (entry.partition(" ") for entry in told.split("\n"))
    return {sha: subject for sha, _, subject in pairs if sha != "commit"}


def _plain(text: str) -> str:
    """A subject on a line of a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:60].strip()


def _commit(folder: Path, name: str) -> str:
    found = git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", name + "^{commit}")
    if found.returncode != 0:
        fetch = "`git fetch --unshallow` there" if _is_shallow(folder) else "fetch it"
        raise UsageError(
            f"{folder}: no commit {name!r}; name a clone that has it with --repo, or {fetch}"
        )
    return found.stdout.strip()


def _commit_side(folder: Path, sha: str, cache: Path, tell: Tell, own: bool) -> Side:
    if own:
        return make_side(parse_source(f"{folder}@{sha}"), cache, tell)
    source = parse_source(str(_build_wheel(folder, sha, cache, tell)))
    variables = {"ASV_COMMIT": sha, "ASV_CONF_DIR": str(folder)}
    return replace(make_side(source, cache, tell), label=sha[:12], variables=variables)


def _build_wheel(folder: Path, sha: str, cache: Path, tell: Tell) -> Path:
    """The wheel of a commit, built as asv.conf.json builds one: with what is installed here."""
    entry = cache / "wheels" / sha
    with making(entry, tell):
        if read_stamp(entry) is None:
            empty(entry)
            tell.note(f"building {sha[:12]}")
            with tempfile.TemporaryDirectory(prefix="attnbench-build-") as text:
                tree = Path(text)
                _archive(folder, sha, tree)
                pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-input")
                words = [*pip, "-w", str(entry), str(tree), "--no-build-isolation"]
                done = subprocess.run(words, capture_output=True, text=True, check=False)
                if "backend-unavailable" in done.stderr:
                    # Nothing here builds it: pip fetches what the project says it needs.
                    done = subprocess.run(words[:-1], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
                errors = [line.strip() for line in said if "error:" in line.lower()]
                raise DataError(f"no wheel of {sha[:12]}: {errors[0] if errors else said[-1]}")
            stamp(entry, {"commit": sha, "repository": str(folder)})
    return next(entry.glob("*.whl"))


def _archive(folder: Path, sha: str, tree: Path) -> None:
    command = ["git", "-C", str(folder), "archive", "--format=tar", sha]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        try:
            with tarfile.open(fileobj=running.stdout, mode="r|") as archive:
                archive.extractall(tree, filter="data")
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"git cannot give the files of {sha[:12]} ({error})") from error


def package_candidates(text: str) -> list[Candidate]:
    """The versions of `NAME==GOOD..BAD` the package index has, in order. Raises UsageError."""
    from packaging.version import InvalidVersion, Version

    name, equals, versions = text.partition("==")
    if not equals:
        raise UsageError(f"--package {text!r}: give it as NAME==GOOD..BAD, e.g. torch==2.11..2.13")
    name = normalized(name.strip())
    try:
        good, bad = (Version(one) for one in parse_range("--package", versions))
    except InvalidVersion as error:
        raise UsageError(f"--package {text!r}: {error}; e.g. torch==2.11..2.13") from error
    if good == bad:
        raise UsageError(f"--package {text!r}: both are {good}; name two that differ")
    listed = _index_versions(name, any(one.is_prerelease for one in (good, bad)))
    known = {Version(one) for one in listed}
    for end in (good, bad):
        if end not in known and not end.local:
            have = ", ".join(str(one) for one in sorted(known)[-5:])
            raise UsageError(f"--package {text!r}: the index has no {name} {end}; newest: {have}")
    # A newer version may be the good one: what is searched is a step, not a date.
    low, high = min(good, bad), max(good, bad)
    line = sorted({one for one in known if low <= one <= high} | {good, bad}, reverse=good > bad)
    return [Candidate(f"{name} {one}", partial(_package_side, f"{name}=={one}")) for one in line]


def _package_side(pin: str, cache: Path, tell: Tell) -> Side:
    return make_side(parse_source(pin), cache, tell)


def _index_versions(name: str, prereleases: bool) -> list[str]:
    """By pip, which knows its index, mirrors and folders."""
    words = ["--pre"] if prereleases else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", *words, name],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^Available versions:(.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or not found:
        said = (done.stderr.strip().splitlines() or ["no answer"])[0]
        raise UsageError(f"pip finds no versions of {name} ({said}); check `pip config list`")
    return [one.strip() for one in found[1].split(",") if one.strip()]


@dataclass(slots=True)
class Measurer:
    """Measures one point of a candidate in a fresh process; rows go to a folder of their own."""

    candidates: Sequence[Candidate]
    part: PlanPart
    options: MeasureOptions
    results: Path
    cache: Path
    tell: Tell

    def __call__(self, place: int) -> Reading:
        candidate = self.candidates[place]
        try:
            side = candidate.make(self.cache, self.tell)
        except AttnBenchError as error:
            return Reading(None, NOT_BUILT, str(error))
        try:
            run_id = measure_once(side, [self.part], self.options, self.results)
        except (UsageError, InfrastructureError) as error:
            if "InfrastructureError:" in str(error):
                raise  # the machine's failure, such as another sweep on the device: not its own
            # It was built and does not run: a library that does not load is how it ends.
            return Reading(None, str(Status.CRASH), str(error))
        return self._read(run_id)

    def _read(self, run_id: str) -> Reading:
        columns = ["samples", "status", "reasons", "metric"]
        table = ResultsFolder(self.results).table(
            columns, {"run_id": run_id, "metric": "attention"}
        )
        if table.num_rows != 1:
            raise UsageError(
                f"{table.num_rows} points of one workload and backend; name a backend that is one, "
                "e.g. --backend TRITON_ATTN or NAME:variant, and one L2 state"
            )
        (row,) = table.to_pylist()
        medians, _, _ = sample_statistics(table["samples"])
        if not Status(row["status"]).is_timed or medians[0] is None:
            return Reading(None, row["status"], "; ".join(row["reasons"] or ())[:300])
        return Reading(medians[0], row["status"])
