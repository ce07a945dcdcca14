"""`attnbench bisect`: which commit or package version made a point slower, by measuring."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.cli.sweeping import TIMER_HELP
from attnbench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnbench.history.bisect import Bisection, Journal
    from attnbench.history.stacks import Stack
    from attnbench.settings import Settings
    from attnbench.upgrade.bisect_sides import Candidate, Measurer

COLUMNS = ("candidate", "outcome", "over_good", "interval", "p", "why")


def bisect(
    workload: Annotated[
        str, typer.Argument(help="The point's workload: '8q1s4k dtype=fp8 shape=llama-3-8b'.")
    ],
    backend: Annotated[str, typer.Option(help="The point's backend, NAME or NAME:variant.")],
    commits: Annotated[
        str, typer.Option(metavar="GOOD..BAD", help="Search the commits between these two.")
    ] = "",
    package: Annotated[
        str,
        typer.Option(
            metavar="NAME==GOOD..BAD",
            help="Search the versions the package index has, e.g. torch==2.11..2.13.",
        ),
    ] = "",
    stacks: Annotated[
        str,
        typer.Option(
            metavar="GOOD..BAD",
            help="Search the stacks measured between two, or between neighbours their packages.",
        ),
    ] = "",
    repo: Annotated[
        Path | None,
        typer.Option(
            help="With --commits: the clone that has them, by default the one here. With --stacks: "
            "the manifest repository, by default that of the settings."
        ),
    ] = None,
    timer: Annotated[str, typer.Option(help=TIMER_HELP)] = "",
    budget: Annotated[
        float | None, typer.Option(help="Seconds of samples per process. Default: settings.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Fresh processes of each side per question, at most.")
    ] = 10,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier, stopped search measured.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where environments are kept. Default: the user's cache.")
    ] = None,
    results: ResultsOption = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Name the first commit, version or stack that made a point slower, by measuring.

    A search that was stopped goes on where it was. Exit 0: found; 2: typed wrong, or the bad end is
    the faster one; 3: the ends do not really differ, or candidates that cannot be built leave
    several suspects; 4: the machine failed.
    """
    from attnbench.history.bisect import MIN_ROUNDS
    from attnbench.history.bisect import bisect as search
    from attnbench.history.rule import VerdictSettings
    from attnbench.settings import load_settings
    from attnbench.workload import Workload

    if sum(map(bool, (commits, package, stacks))) != 1:
        raise UsageError("say what to search: one of --commits, --package and --stacks")
    if rounds < MIN_ROUNDS:
        raise UsageError(f"--rounds {rounds}: {MIN_ROUNDS} or more; fewer show no difference")
    Workload.parse(workload)  # before anything is asked of pip or git
    settings = load_settings()
    folder = results or settings.results
    candidates = _candidates(commits, package, stacks, repo, settings, folder)
    measurer, journal = _measurer(
        candidates, workload, backend, timer, budget, cache_dir, settings, folder, fresh
    )
    note(f"{len(candidates)} candidates, {candidates[0].label} (good) to {candidates[-1].label}")
    if len(journal):
        note(f"going on with {len(journal)} measurements of {journal.path}")
    found = search(
        [candidate.label for candidate in candidates],
        measurer,
        VerdictSettings().noise(measurer.options.timer),
        journal,
        rounds,
        note,
    )
    finer = candidates[found.first_bad].finer if found.is_found else ""
    words = ["attnbench", "bisect", workload, "--backend", backend]
    words += ["--timer", timer] if timer else []
    words += ["--repo", str(repo)] if repo else []
    words += ["--results", str(results)] if results else []
    words += ["--stacks", finer]
    _print(found, shlex.join(words) if finer else "", format)
    raise typer.Exit(exit_code(found))


def exit_code(found: Bisection) -> ExitCode:
    """0: one first bad candidate, confirmed; 2: the ends are swapped; 3: it could not be told."""
    if found.is_wrong_way:
        return ExitCode.USAGE
    return ExitCode.OK if found.is_found else ExitCode.UNDECIDED


def _candidates(
    commits: str, package: str, stacks: str, repo: Path | None, settings: Settings, folder: Path
) -> list[Candidate]:
    from attnbench.upgrade.bisect_sides import commit_candidates, package_candidates

    if repo is not None and package:
        raise UsageError("--repo: versions are those of pip's index; leave it out with --package")
    if commits:
        return commit_candidates(commits, repo or Path("."))
    if package:
        return package_candidates(package)
    from attnbench.upgrade.bisect_stacks import known_stacks, stack_candidates

    known = known_stacks(*_stacks(repo, settings, folder))
    return stack_candidates(stacks, known, note, _device_class)


def _stacks(
    repo: Path | None, settings: Settings, folder: Path
) -> tuple[Sequence[Stack], Sequence[Stack]]:
    """Those of the manifest repository, and those of the stored runs."""
    from attnbench.history.manifest import is_manifest, stacks_of
    from attnbench.history.runs import RUN_COLUMNS, runs_of
    from attnbench.history.stacks import stacks_of_runs
    from attnbench.store import ResultsFolder

    written: Sequence[Stack] = ()
    if repo is not None:
        written = stacks_of(repo)
    elif settings.manifest and is_manifest(Path(settings.manifest)):
        written = stacks_of(Path(settings.manifest))
    # A repository that was named is enough: its stacks may have been measured elsewhere.
    if repo is not None and not folder.is_dir():
        return written, ()
    return written, stacks_of_runs(runs_of(ResultsFolder(folder).table(RUN_COLUMNS)))


def _device_class() -> str:
    from attnbench.measure.environment import read_environment
    from attnbench.selection import current_device

    return read_environment(current_device()).device_class


def _measurer(
    candidates: list[Candidate],
    workload: str,
    backend: str,
    timer: str,
    budget: float | None,
    cache_dir: Path | None,
    settings: Settings,
    folder: Path,
    fresh: bool,
) -> tuple[Measurer, Journal]:
    from dataclasses import asdict

    from attnbench.cli.downloads import TerminalTell
    from attnbench.cli.sweeping import measure_options
    from attnbench.history.bisect import Journal
    from attnbench.measure.environment import read_environment
    from attnbench.selection import current_device
    from attnbench.store.record import short_hash
    from attnbench.upgrade.alternate import PlanPart
    from attnbench.upgrade.bisect_sides import Measurer
    from attnbench.upgrade.cache import default_cache_folder
    from attnbench.workload import Workload

    text = Workload.parse(workload).text
    device = current_device()
    options = measure_options(settings, device, timer, [], 1, budget, None, [])
    around = read_environment(device)
    question: dict[str, Any] = {
        "candidates": [candidate.label for candidate in candidates],
        "workload": text,
        "backend": backend,
        # Candidates have it behind them: times from before it changed belong to another search.
        "here": [around.device_class, around.driver_version, *around.stack],
        # As JSON gives it back.
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()},
    }
    home = folder / ".bisect" / short_hash("bisect", repr(question))
    path = home / "journal.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    part = PlanPart((text,), (backend,))
    cache = cache_dir or default_cache_folder()
    # Rows apart from the history: a commit of last month is no baseline of tomorrow's.
    measurer = Measurer(candidates, part, options, home / "measurements", cache, TerminalTell())
    return measurer, Journal(path, question)


def _print(found: Bisection, finer: str, format: Format) -> None:
    rows: list[dict[str, Any]] = []
    for step in found.steps:
        look = step.over_good
        rows.append(
            {
                "candidate": found.labels[step.place],
                "outcome": str(step.outcome),
                "over_good": look.estimate.ratio if look else None,
                "interval": f"{look.estimate.low:.4g} to {look.estimate.high:.4g}" if look else "",
                "p": look.p if look else None,
                "why": step.why,
            }
        )
    if format is Format.JSON:
        import json

        first = found.suspects[0] if found.is_found else None
        final = found.final
        print(
            json.dumps(
                {
                    "first_bad": first,
                    "suspects": [] if found.problem else list(found.suspects),
                    "ratio": final.estimate.ratio if final else None,
                    "low": final.estimate.low if final else None,
                    "high": final.estimate.high if final else None,
                    "p": final.p if final else None,
                    "status": found.bad_status,
                    "problem": found.problem,
                    "next": finer,
                    "steps": rows,
                },
                indent=2,
            )
        )
    elif rows:
        emit(rows, format, COLUMNS)
    note(found.text)
    if finer:
        note(f"which of its packages it was: {finer}")
