"""`attnbench upgrade`: what changes for my models between two versions, and what it costs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli import upgrade_cost
from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.cli.sweeping import TIMER_HELP, PresetOption
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.upgrade.cells import Cell
    from attnbench.upgrade.compare import Step
    from attnbench.upgrade.cost import Cost
    from attnbench.upgrade.overrides import Verdict
    from attnbench.upgrade.user_settings import Setting
    from attnbench.upgrade.versions import Source


def upgrade(
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="The version before: vllm==0.22.1, a wheel file, a source tree or PATH@COMMIT.",
        ),
    ] = "",
    to: Annotated[str, typer.Option("--to", help="The version after, named the same way.")] = "",
    from_python: Annotated[
        Path | None,
        typer.Option(help="Instead of --from: the vLLM installed beside this Python."),
    ] = None,
    to_python: Annotated[
        Path | None, typer.Option(help="Instead of --to: the vLLM installed beside this Python.")
    ] = None,
    via: Annotated[
        list[str] | None,
        typer.Option(help="A version between the two, to tell since when; repeat for several."),
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(
            "--capability",
            "-c",
            help="Compute capability that serves: 9.0, 10.0, cpu, ...; repeat for several.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this model's layers: a registered name (llama-3-8b) or a config.json; "
            "repeat for several. Default: the whole grid."
        ),
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel size the models are served at.")] = 1,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="The models' KV cache dtype, in the engine's words: auto, fp8, ...")
    ] = "auto",
    block_size: Annotated[
        int, typer.Option(help="The models' --block-size. Default: the engine chooses.")
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            help="The server's settings: a file of variables, a shell script, a YAML, or the "
            "command line in quotes; repeat for several. They are checked against each version, "
            "and the cells are asked with them."
        ),
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="Something about the host: flashinfer-cubin=no, tokenspeed_mla=yes, ...; repeat "
            "for several."
        ),
    ] = None,
    probe_requirement: Annotated[
        list[str] | None,
        typer.Option(help="A package the probe's environment lacks; repeat for several."),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where wheels and environments are kept. Default: ~/.cache/attnbench."),
    ] = None,
    batch: upgrade_cost.BatchOption = None,
    results: ResultsOption = None,
    measure: upgrade_cost.MeasureOption = False,
    timer: Annotated[str, typer.Option(help=TIMER_HELP)] = "",
    replicates: upgrade_cost.ReplicatesOption = 3,
    backend: upgrade_cost.BackendOption = None,
    suite: upgrade_cost.SuiteOption = None,
    preset: PresetOption = "smoke",
    all: Annotated[
        bool, typer.Option("--all", help="Also list where only accepted block sizes grew.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write everything as one page, e.g. upgrade.html.", dir_okay=False),
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Say which default backends change between two versions of vLLM, why, and what it costs.

    vLLM's own selector is executed for the compute capability, no GPU is needed. The first use
    downloads the versions (it says how much) and keeps them. Another dependency (flashinfer-python,
    triton, torch, attnbench itself at two commits) is measured side by side instead.
    """
    from attnbench.cli.downloads import TerminalTell
    from attnbench.upgrade.assess import assess
    from attnbench.upgrade.probe import parse_capability, parse_facts

    sources = _sources(from_, from_python, via or [], to, to_python)
    request = upgrade_cost.CostRequest(
        batches=tuple(batch or ()),
        results=results,
        measure=measure,
        timer=timer,
        replicates=replicates,
        backends=tuple(backend or ()),
        suites=tuple(suite or ()),
        preset=preset,
    )
    if html is not None and not html.parent.is_dir():
        raise UsageError(f"--html {html}: there is no folder {html.parent}; make it first")
    if any(source.distribution != "vllm" for source in sources):
        if html is not None:
            raise UsageError("--html is of two versions of vLLM; leave it out")
        models = _cells(model or ["llama-3-8b"], tp, kv_cache_dtype, block_size, ())
        raise typer.Exit(
            upgrade_cost.upgrade_dependency(sources, request, models, format, cache_dir)
        )
    if not capability:
        raise UsageError("name the device that serves, e.g. --capability 9.0 (H100, H200)")
    where = list(dict.fromkeys(parse_capability(one) for one in capability))
    upgrade_cost.check_request(request, where)
    facts = parse_facts(assume or [])
    given = _settings(settings or [])
    cells = _cells(model or [], tp, kv_cache_dtype, block_size, given)
    steps = assess(
        sources,
        where,
        cells,
        facts,
        tell=TerminalTell(),
        cache=cache_dir,
        requirements=probe_requirement or [],
        progress=_probing,
        settings=given,
    )
    costs = upgrade_cost.find_costs(steps, request, sources)
    verdicts = _lint(given, steps)
    if html is not None:
        from attnbench.dashboard.upgrade_page import write_upgrade_page

        write_upgrade_page(_document(steps, costs, verdicts), html)
        note(f"page: {html}")
    _print(steps, format, costs, minor=all, verdicts=verdicts)
    raise typer.Exit(upgrade_cost.exit_code(costs, steps, request))


def _sources(
    from_: str, from_python: Path | None, via: Sequence[str], to: str, to_python: Path | None
) -> list[Source]:
    from attnbench.upgrade.versions import installed_source, parse_source

    sides = []
    for flag, text, python in (("--from", from_, from_python), ("--to", to, to_python)):
        if bool(text) == (python is not None):
            raise UsageError(f"name one of {flag} VERSION and {flag}-python PATH")
        sides.append(installed_source(python) if python is not None else parse_source(text))
    return [sides[0], *(parse_source(text) for text in via), sides[1]]


def _settings(texts: Sequence[str]) -> tuple[Setting, ...]:
    from attnbench.upgrade.user_settings import read_settings

    found = [one for text in texts for one in read_settings(text)]
    if texts and not found:
        note("no setting of --settings bears on attention")
    return tuple(found)


def _lint(settings: Sequence[Setting], steps: Sequence[Step]) -> list[Verdict]:
    from attnbench.upgrade.overrides import lint

    sides = [side for step in steps for side in (step.before, step.after)]
    each = {(side.version, side.capability): side for side in sides}
    return lint(settings, list(each.values()))


def _cells(
    models: Sequence[str],
    tp: int,
    kv_cache_dtype: str,
    block_size: int,
    settings: Sequence[Setting],
) -> tuple[Cell, ...]:
    from attnbench.upgrade.cells import default_grid
    from attnbench.upgrade.models import cells_of_model
    from attnbench.upgrade.user_settings import served_with

    if not models:
        if tp != 1 or kv_cache_dtype != "auto" or block_size:
            raise UsageError("--tp, --kv-cache-dtype and --block-size are of a --model; name one")
        return default_grid()
    served = served_with(settings)
    found = [
        replace(cell, dcp=served.dcp, pcp=served.pcp)
        for model in models
        for cell in cells_of_model(
            model,
            tensor_parallel_size=served.tp if tp == 1 else tp,
            kv_cache_dtype=served.kv_cache_dtype if kv_cache_dtype == "auto" else kv_cache_dtype,
            block_size=block_size or served.block_size,
        )
    ]
    return tuple(dict.fromkeys(found))


def _document(
    steps: Sequence[Step], costs: Sequence[Cost], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    from attnbench.upgrade import cost_report, overrides, report

    answer = report.to_json(steps, cost_report.costs_json(costs))
    return answer | {"settings": overrides.to_json(verdicts)}


def _print(
    steps: Sequence[Step],
    format: Format,
    costs: Sequence[Cost],
    *,
    minor: bool,
    verdicts: Sequence[Verdict],
) -> None:
    from attnbench.upgrade import cost_report, markdown, overrides, report

    if format is Format.JSON:
        import json

        print(json.dumps(_document(steps, costs, verdicts), indent=2))
        return
    told = cost_report.cost_texts(costs)
    if format is Format.MARKDOWN:
        first, last = steps[0].before.version, steps[-1].after.version
        title = f"vLLM {first} → {last}: attention backends"
        command = shlex.join(["attnbench", *sys.argv[1:]])
        print(markdown.markdown(steps, told, title, command), end="")
        for line in overrides.markdown(verdicts):
            print(line)
        return
    if verdicts and format is Format.TABLE:
        emit(overrides.rows(verdicts), format)
        print()
    elif verdicts:
        note("the settings' verdicts are in the other formats: a CSV holds one table")
    groups = report.groups_of(steps, minor=minor)
    emit(report.table_rows(groups, told), format)
    for step in steps:
        note(report.summary(step))


def _probing(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rasked {done} of {total}", end=end, file=sys.stderr, flush=True)
