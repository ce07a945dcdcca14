"""What `attnbench upgrade` measures and judges: costs of changed defaults, and dependencies."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, emit, note
from attnbench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.measure import MeasureOptions
    from attnbench.settings import Settings
    from attnbench.upgrade.alternate import PlanPart
    from attnbench.upgrade.batches import BatchShare
    from attnbench.upgrade.cells import Cell
    from attnbench.upgrade.compare import Step
    from attnbench.upgrade.cost import Cost
    from attnbench.upgrade.dependency import SidesReport
    from attnbench.upgrade.side_env import Side
    from attnbench.upgrade.versions import Source

BatchOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A batch of the user's mix, with its share of the steps: 0.7*32q1s4k; repeat. "
        "Default: nothing is judged."
    ),
]
MeasureOption = Annotated[
    bool, typer.Option("--measure", help="Measure here what the costs need and nobody stored.")
]
BackendOption = Annotated[
    list[str] | None,
    typer.Option(help="Of another dependency than vLLM: only this family; repeat for several."),
]
SuiteOption = Annotated[
    list[str] | None,
    typer.Option(help="Of another dependency than vLLM: measure this suite; repeat for several."),
]
ReplicatesOption = Annotated[
    int, typer.Option(help="Fresh processes that measure each point of each side.")
]


@dataclass(frozen=True, slots=True)
class CostRequest:
    """The options of this half of the verb, as they were given."""

    batches: tuple[str, ...] = ()
    results: Path | None = None
    measure: bool = False
    timer: str = ""
    replicates: int = 3
    backends: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    preset: str = "smoke"


def check_request(request: CostRequest, capabilities: Sequence[str]) -> None:
    """Before anything is downloaded. Raises UsageError for what cannot be done."""
    from attnbench.upgrade.batches import parse_batches

    parse_batches(request.batches)
    if request.backends or request.suites:
        raise UsageError(
            "--backend and --suite are of another dependency than vLLM; its changed defaults say "
            "which backends are measured, --batch on which batches"
        )
    if not request.measure:
        return
    if not request.batches:
        raise UsageError("--measure: name the batches to measure, e.g. --batch 32q1s4k")
    device = _present_device()
    if [_capability(device)] != list(capabilities):
        raise UsageError(
            f"--measure: this machine has {_words(device)} and the question is of "
            f"{', '.join(_name(one) for one in capabilities)}; run it on such a machine: "
            f"attnbench {shlex.join(sys.argv[1:])}"
        )


def find_costs(
    steps: Sequence[Step], request: CostRequest, sources: Sequence[Source]
) -> list[Cost]:
    """The cost of every change for the user's batches; measures what is missing if asked to."""
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder
    from attnbench.upgrade.batches import parse_batches
    from attnbench.upgrade.cost import judge_costs
    from attnbench.upgrade.stored import StoredTimes

    shares = parse_batches(request.batches)
    if not shares:
        note("no --batch was given: whether a change is slower for you is not judged")
        return []
    settings = load_settings()
    folder = ResultsFolder(request.results or settings.results)
    costs = judge_costs(steps, shares, StoredTimes.read(folder, request.timer))
    if request.measure:
        if _measure_missing(costs, shares, request, settings, sources):
            costs = judge_costs(steps, shares, StoredTimes.read(folder, request.timer))
    elif costs:
        _tell_commands(costs)
    return costs


def exit_code(costs: Sequence[Cost], steps: Sequence[Step], request: CostRequest) -> ExitCode:
    """1: slower for these batches; 3: not known of some cell; else, or without batches, 0."""
    codes = [cost.exit_code for cost in costs]
    if request.batches and any(step.undecided for step in steps):
        codes.append(ExitCode.UNDECIDED)
    return ExitCode.join(*codes)


def _tell_commands(costs: Sequence[Cost]) -> None:
    from attnbench.upgrade.cost_report import measure_command, missing_points

    commands = dict.fromkeys(
        command
        for cost in costs
        for change in cost.changes
        if (command := measure_command(cost, change)) is not None
    )
    listed = list(commands)[:5]
    for command in listed:
        note(f"to measure: {command}")
    if len(commands) > len(listed) or (not commands and missing_points(costs)):
        note(f"to measure all that is missing: attnbench {shlex.join(sys.argv[1:])} --measure")


def _measure_missing(
    costs: Sequence[Cost],
    shares: Sequence[BatchShare],
    request: CostRequest,
    settings: Settings,
    sources: Sequence[Source],
) -> bool:
    """Whether there was anything to measure."""
    from attnbench.measure import PlannedPoint
    from attnbench.store import ResultsFolder
    from attnbench.upgrade.cost_report import missing_points
    from attnbench.upgrade.versions import SourceKind

    device = _present_device()
    options = _options(request, settings, device)
    if len(sources) == 2 and all(one.kind is SourceKind.INSTALLED for one in sources):
        return _measure_deployed(costs, shares, request, settings, sources, options)
    points = missing_points(costs)
    if not points:
        note("nothing to measure: every batch has times of both sides, or no adapter here")
        return False
    from attnbench.cli.sweeping import Sweep

    plan = [
        PlannedPoint(one.workload, one.kernels.backend, one.kernels.variants[0]) for one in points
    ]
    folder = ResultsFolder(request.results or settings.results)
    # One run with both sides: backends of a workload follow each other within seconds.
    with Sweep.planned(folder, plan, options, device).held() as sweep:
        sweep.measure("measuring")
    return True


def _measure_deployed(
    costs: Sequence[Cost],
    shares: Sequence[BatchShare],
    request: CostRequest,
    settings: Settings,
    sources: Sequence[Source],
    options: MeasureOptions,
) -> bool:
    """vLLM's own classes, each side in its own environment, by turns."""
    from attnbench.upgrade.alternate import PlanPart, measure_by_turns
    from attnbench.upgrade.cost import deployed
    from attnbench.upgrade.side_env import Side

    parts: tuple[dict[PlanPart, None], dict[PlanPart, None]] = ({}, {})
    for cost in costs:
        for change in cost.changes if cost.ratio is None else ():
            for share in shares:
                for place, wanted in enumerate(deployed(change, share) or ()):
                    texts = (wanted.workload.text,)
                    parts[place][PlanPart(texts, (wanted.kernels.backend,))] = None
    if not parts[0]:
        note("nothing to measure: every batch has times of both sides, or no workload")
        return False
    sides = [
        Side(source.text, source.distribution, source.path or Path(), None) for source in sources
    ]
    measure_by_turns(
        (sides[0], sides[1]),
        (list(parts[0]), list(parts[1])),
        options,
        request.results or settings.results,
        _by_turns,
    )
    return True


def upgrade_dependency(
    sources: Sequence[Source],
    request: CostRequest,
    cells: Sequence[Cell],
    format: Format,
    cache: Path | None,
) -> ExitCode:
    """Measure two versions of one dependency side by side, and say which families got slower."""
    from dataclasses import replace

    from attnbench.cli.downloads import TerminalTell
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder
    from attnbench.upgrade.alternate import measure_by_turns, read_matrix
    from attnbench.upgrade.cache import default_cache_folder
    from attnbench.upgrade.dependency import SidesReport, judge_sides, matrix_changes, read_rows
    from attnbench.upgrade.side_env import OWN, make_side

    _check_sources(sources, request)
    settings = load_settings()
    parts, weights = _plan_parts(request, settings, cells)
    own = sources[0].distribution == OWN
    if not parts and not own:
        raise UsageError(
            f"{sources[0].distribution} has no selector, so its speed is what can change; say what "
            "to measure, e.g. --batch 32q1s4k --backend FLASHINFER, or --suite decode"
        )
    folder = cache or default_cache_folder()
    tell = TerminalTell()
    sides: tuple[Side, Side] = (
        make_side(sources[0], folder, tell),
        make_side(sources[1], folder, tell),
    )
    labels = (sides[0].label, sides[1].label)
    report = SidesReport(*labels, ("", ""), ())
    if parts:
        options = _options(request, settings, _present_device())
        results = request.results or settings.results
        runs = measure_by_turns(sides, (parts, parts), options, results, _by_turns)
        table = read_rows(ResultsFolder(results), runs)
        report = judge_sides(table, labels, runs, weights)
    if own:
        changed = matrix_changes(read_matrix(sides[0]), read_matrix(sides[1]))
        report = replace(report, defaults=changed)
    _print_sides(report, format)
    return report.exit_code


def _check_sources(sources: Sequence[Source], request: CostRequest) -> None:
    if len(sources) != 2:
        raise UsageError("--via is of vLLM's selector; two sides are measured, --from and --to")
    names = [source.distribution for source in sources]
    if names[0] != names[1]:
        raise UsageError(
            f"--from is {names[0]} and --to is {names[1]}; name two versions of one distribution"
        )
    if request.batches and request.suites:
        raise UsageError("--batch does not go with --suite; leave one of them out")


def _plan_parts(
    request: CostRequest, settings: Settings, cells: Sequence[Cell]
) -> tuple[list[PlanPart], dict[str, float] | None]:
    """What to measure, and each workload's weight where the user gave a mix."""
    from attnbench.cli.sweeping import choose_suites
    from attnbench.upgrade.alternate import PlanPart
    from attnbench.upgrade.batches import UnmeasurableError, parse_batches, workload_of

    if request.suites:
        chosen = choose_suites(settings, request.suites)
        return [
            PlanPart(
                tuple(one.text for one in suite.workloads(request.preset)),
                request.backends or tuple(suite.backends),
                suite.name,
            )
            for suite in chosen
        ], None
    weights: dict[str, float] = {}
    for cell in cells:
        for share in parse_batches(request.batches):
            try:
                text = workload_of(cell, share).text
            except UnmeasurableError as error:
                raise UsageError(f"{cell.text}, {share.text}: {error}") from error
            weights[text] = weights.get(text, 0.0) + share.weight
    if not weights:
        return [], None
    return [PlanPart(tuple(weights), request.backends)], weights


def _print_sides(report: SidesReport, format: Format) -> None:
    from attnbench.upgrade.dependency import family_rows, report_json

    if format is Format.JSON:
        import json

        print(json.dumps(report_json(report), indent=2))
        return
    defaults = [
        {"cell": one.cell, report.before: one.before, report.after: one.after}
        for one in report.defaults
    ]
    if format is Format.MARKDOWN:
        print(f"# {report.before} → {report.after}\n")
    if report.families:
        emit(family_rows(report), format)
    if defaults:
        emit(defaults, format)
    elif not report.families:
        note("no default of our selector changes")
    for title in report.missing:
        note(f"measured on one side only: {title}")
    if report.runs[0]:
        note(f"stored as runs {report.runs[0]} and {report.runs[1]}")


def _options(request: CostRequest, settings: Settings, device: Device) -> MeasureOptions:
    from attnbench.cli.sweeping import measure_options

    return measure_options(settings, device, request.timer, [], request.replicates, None, None, [])


def _present_device() -> Device:
    from attnbench.selection import current_device

    return current_device()


def _capability(device: Device) -> str:
    """As `--capability` takes it; of a GPU that has none, its name."""
    if device.kind == "cpu":
        return "cpu"
    return str(device.capability or device)


def _words(device: Device) -> str:
    if device.kind == "cpu":
        return "no GPU that torch can use"
    return f"a GPU of {_name(_capability(device))}"


def _name(capability: str) -> str:
    return "a CPU" if capability == "cpu" else f"compute capability {capability}"


def _by_turns(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rmeasured {done} of {total} replicates", end=end, file=sys.stderr, flush=True)
