"""The candidates of a bisection, and how one is measured: commits, versions, or stacks between two.

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
from attnbench.history.runs import RunSummary
from attnbench.history.series_rows import sample_statistics
from attnbench.measure import MeasureOptions
from attnbench.store import ResultsFolder
from attnbench.store.record import Status
from attnbench.upgrade.alternate import PlanPart, measure_once
from attnbench.upgrade.cache import empty, making, read_stamp, stamp
from attnbench.upgrade.side_env import Side, make_side, make_stack_side
from attnbench.upgrade.tell import Tell
from attnbench.upgrade.versions import git, normalized, parse_source

#: What makes a tree attnbench's own: it is measured as it is, and nothing is built.
_OWN_FILE = "attnbench/selection/__init__.py"

_RANGE = re.compile(r"(.+?)\.\.(.+)")

#: Entries of a stack that no package index has.
_NOT_INSTALLED = frozenset({"python", "gxx"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place of the line. `make` may raise what cannot be built."""

    label: str
    make: Callable[[Path, Tell], Side]


def parse_range(option: str, text: str) -> tuple[str, str]:
    """`A..B`. Raises UsageError."""
    found = _RANGE.fullmatch(text.strip())
    if not found or found[1] == found[2]:
        raise UsageError(f"{option} {text!r}: give the good and the bad one as GOOD..BAD")
    return found[1], found[2]


def commit_candidates(text: str, repository: Path) -> list[Candidate]:
    """The commits of `GOOD..BAD` along first parents, the good one included.

    A merge is one candidate: only along first parents is every candidate a state of the branch,
    and the line one that can be halved. Raises UsageError.
    """
    names = parse_range("--commits", text)
    folder = repository.resolve()
    good, bad = (_commit(folder, name) for name in names)
    if git(folder, "merge-base", "--is-ancestor", good, bad).returncode != 0:
        raise UsageError(
            f"--commits {text}: {names[1]} does not follow {names[0]} (rebased, or swapped?); "
            "name two commits of one line"
        )
    listed = git(folder, "rev-list", "--reverse", "--first-parent", f"{good}..{bad}")
    line = [good, *listed.stdout.split()]
    own = git(folder, "cat-file", "-e", f"{bad}:{_OWN_FILE}").returncode == 0
    subjects = git(folder, "log", "--no-walk=unsorted", "--format=%s", *line, "--")
    titles = subjects.stdout.split("\n")
    return [
        Candidate(
            f"{sha[:12]} {_plain(title)}".strip(), partial(_commit_side, folder, sha, own=own)
        )
        for sha, title in zip(line, titles, strict=False)
    ]


def _plain(text: str) -> str:
    """A subject on a line of a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:60].strip()


def _commit(folder: Path, name: str) -> str:
    found = git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", name + "^{commit}")
    if found.returncode != 0:
        raise UsageError(
            f"{folder}: no commit {name!r}; name a clone that has it with --repo, or fetch it"
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


def stack_candidates(text: str, runs: Sequence[RunSummary]) -> list[Candidate]:
    """From one stored stack to another, one package at a time in order of names.

    Candidate n has the first n of the differing packages at the bad stack's version: a mixture
    that does not work together is skipped. Raises UsageError.
    """
    good, bad = (_stack(runs, one) for one in parse_range("--stacks", text))
    names = sorted(name for name in good.keys() & bad.keys() if good[name] != bad[name])
    names = [name for name in names if name not in _NOT_INSTALLED]
    if not names:
        raise UsageError(
            f"--stacks {text}: no package is in both with different versions; what else differs "
            "(driver, Python, compiler) cannot be installed side by side"
        )
    line = []
    for moved in range(len(names) + 1):
        pins = [f"{n}=={(bad if i < moved else good)[n]}" for i, n in enumerate(names)]
        new = names[moved - 1] if moved else ""
        label = f"{new} {good[new]} -> {bad[new]}" if new else f"stack of {text.partition('..')[0]}"
        line.append(Candidate(label, partial(make_stack_side, label, pins)))
    return line


def _stack(runs: Sequence[RunSummary], name: str) -> dict[str, str]:
    # Named as `history --by stack` does, with the machine's part, or without it.
    keys = ((run.stack_key if "-" in name else run.stack_id, run.stack) for run in runs)
    found = {key: stack for key, stack in keys if key.startswith(name)}
    if len(found) != 1:
        known = ", ".join(dict.fromkeys(run.stack_id for run in reversed(runs))) or "none"
        what = "is no stored stack" if not found else "names several stacks"
        raise UsageError(f"--stacks: {name!r} {what}; stored, newest first: {known}")
    (entries,) = found.values()
    return dict(entry.partition("==")[::2] for entry in entries)


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
