"""`attnbench choose`: which backend to serve a model with, how sure that is, and how to get it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note, visible
from attnbench.cli.stored_times import StoredL2Option, StoredTimerOption, check_how
from attnbench.cli.sweeping import PresetOption
from attnbench.cli.trace_options import (
    HeadroomOption,
    MaxModelLenOption,
    ModelOption,
    RateScaleOption,
    RepresentativesOption,
    RequestRateOption,
    RequestsOption,
    SortArrivalsOption,
    TraceFormatOption,
    option_words,
    trace_options,
)
from attnbench.errors import DeviceError, ExitCode, UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.choose.advice import Advice
    from attnbench.choose.rank import Part
    from attnbench.choose.tries import Try
    from attnbench.choose.valid import Default
    from attnbench.settings import Settings
    from attnbench.store import ResultsFolder
    from attnbench.upgrade.batches import BatchShare
    from attnbench.upgrade.cells import Cell


def choose(
    ctx: typer.Context,
    model: ModelOption,
    device: Annotated[
        str,
        typer.Option(
            help="A stored device class (nvidia-h200), or sm90, 9.0, cpu, ...; auto: this machine. "
            "Default: settings, else auto."
        ),
    ] = "",
    tp: Annotated[int, typer.Option(help="Tensor-parallel size the model is served at.")] = 1,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="KV cache dtype, in the engine's words: auto, fp8, ...")
    ] = "auto",
    block_size: Annotated[
        int, typer.Option(help="Only this KV block size. Default: each backend's own.")
    ] = 0,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="A batch of the mix, with its share of the steps: 0.7*32q1s4k; repeat."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Instead of --batch: the batches of this suite, alike; repeat."),
    ] = None,
    preset: PresetOption = "smoke",
    trace: Annotated[
        Path | None,
        typer.Option(help="Instead of --batch: a trace of requests, as `attnbench traffic` reads."),
    ] = None,
    trace_format: TraceFormatOption = "",
    sort_arrivals: SortArrivalsOption = False,
    request_rate: RequestRateOption = 0.0,
    max_model_len: MaxModelLenOption = 0,
    requests: RequestsOption = 0,
    rate_scale: RateScaleOption = 1.0,
    representatives: RepresentativesOption = 512,
    headroom: HeadroomOption = 1.0,
    results: ResultsOption = None,
    timer: StoredTimerOption = "",
    l2: StoredL2Option = "",
    engine: Annotated[
        str,
        typer.Option(
            help="The vLLM that serves, vllm==0.30.0 or a wheel: asked for its default, and given "
            "its flags. Default: the followed chain, and the installed version."
        ),
    ] = "",
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where --engine's version is kept. Default: ~/.cache/attnbench."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure here, longest where the ranking is open."),
    ] = False,
    budget_s: Annotated[
        float, typer.Option(help="With --measure: wall seconds to spend at most.")
    ] = 600.0,
    confidence: Annotated[
        float, typer.Option(help="With --measure: probability that what is dropped is slower.")
    ] = 0.95,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the choice as a table that `explain --choices` and the selector load.",
            dir_okay=False,
        ),
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Say which backend to serve a model with, from stored times or from times measured here."""
    from attnbench.choose.advice import advise, parts_of
    from attnbench.choose.stored import Measured
    from attnbench.choose.tries import read_tries
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder
    from attnbench.upgrade.models import cells_of_model

    if block_size < 0 or tp < 1:
        raise UsageError("--block-size and --tp are positive numbers; leave them out or mend them")
    if not 0.5 <= confidence < 1 or not 0 < budget_s < float("inf"):
        raise UsageError("--confidence is 0.5 to below 1, --budget-s above 0, e.g. 0.95 and 600")
    check_how(timer, l2)
    settings = load_settings()
    folder = ResultsFolder(results or settings.results)
    cells = cells_of_model(
        model,
        tensor_parallel_size=tp,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size or None,
    )
    if (batch is not None) + (suite is not None) + (trace is not None) != 1:
        raise UsageError(
            "give --batch, --suite or --trace, e.g. --batch 0.7*32q1s4k --batch 0.3*q2k"
        )
    options = trace_options(ctx.params)
    if trace is not None:
        from attnbench.cli.choose_trace import shares_of_trace

        asked = _class_asked(folder, device or settings.device, timer, l2)
        shares = shares_of_trace(trace, model, cells[0], tp, asked, options)
    else:
        if words := option_words(options):
            raise UsageError(f"{words[0]} is of a trace; give --trace FILE, or leave it out")
        shares = _shares(batch or [], suite or [], preset, settings)
    parts = parts_of(cells, shares)
    if measure:
        from attnbench.cli.choose_measure import measure_race

        where = _present(device or settings.device)
        sure, timer = measure_race(
            parts, folder, where, timer, l2, block_size, budget_s, confidence
        )
        note(sure)
    tries = read_tries(folder, timer, l2)
    where, device_class = _device(tries, device or settings.device)
    measured = Measured(
        tries,
        device_class,
        [part.workload for part in parts],
        folder.published_runs(),
        block_size,
    )
    version, defaults = _defaults(engine, cache_dir, cells, parts, where, block_size)
    advice = advise(
        parts,
        measured,
        where,
        defaults,
        version=version,
        choice_days=settings.choice_days,
        block_size=block_size,
    )
    _print(advice, format)
    if save is not None:
        from attnbench.choose.table import save as save_table

        save_table(advice, model, shares, save)
        note(f"saved {save}; see it at work: attnbench explain ... --choices {save}")
    raise typer.Exit(advice.exit_code)


def _shares(
    batches: Sequence[str], suites: Sequence[str], preset: str, settings: Settings
) -> tuple[BatchShare, ...]:
    from attnbench.cli.sweeping import choose_suites
    from attnbench.upgrade.batches import BatchShare, parse_batches

    if batches:
        return parse_batches(batches)
    texts = dict.fromkeys(
        BatchShare(one, 1.0).text
        for suite in choose_suites(settings, suites)
        for one in suite.workloads(preset)
    )
    if not texts:
        raise UsageError(f"preset {preset} of these suites is empty; take another --preset")
    return parse_batches(list(texts))


def _class_asked(folder: ResultsFolder, text: str, timer: str, l2: str) -> str:
    """The device class that is asked about, or `text` where nothing is known of it."""
    from attnbench.choose.tries import read_tries
    from attnbench.measure.environment import read_environment
    from attnbench.selection import current_device

    device, found = _device(read_tries(folder, timer, l2), text)
    if found:
        return found
    here = current_device()
    return read_environment(here).device_class if device == here else text


def _device(tries: Sequence[Try], text: str) -> tuple[Device, str]:
    """The device and its class; "" for a capability of which nothing is stored."""
    from attnbench.choose.stored import device_class_of
    from attnbench.measure.environment import class_of_name
    from attnbench.measure.peaks import capability_of_class
    from attnbench.selection import resolve_device

    word = class_of_name(text)
    whats = {one.what for one in tries}
    of_class = next((one for one in whats if one.how.device_class == word), None)
    if of_class is not None:
        return resolve_device(of_class.compute_capability or of_class.device_kind), word
    if known := capability_of_class(word):
        return resolve_device(known), word
    try:
        device = resolve_device(text)
    except DeviceError as error:
        stored = ", ".join(sorted({one.how.device_class for one in whats})) or "none"
        raise UsageError(f"{error}; classes with stored times: {stored}") from error
    capability = "cpu" if device.kind == "cpu" else str(device.capability or "")
    return device, device_class_of(tries, text, capability)


def _present(text: str) -> Device:
    """The device of this machine, which must be the one asked about. Raises UsageError."""
    from attnbench.measure.environment import class_of_name, read_environment
    from attnbench.measure.peaks import capability_of_class
    from attnbench.selection import current_device, resolve_device

    here = current_device()
    own_class = read_environment(here).device_class
    word = class_of_name(text)
    if word == own_class or (not capability_of_class(word) and resolve_device(text) == here):
        return here
    raise UsageError(
        f"--measure: this machine is {own_class} ({here}) and the question is of {text}; run it "
        "there, or leave --device out"
    )


def _defaults(
    engine: str,
    cache: Path | None,
    cells: Sequence[Cell],
    parts: Sequence[Part],
    device: Device,
    block_size: int,
) -> tuple[str, list[Default]]:
    """vLLM's version for the flags, and what is taken unasked for each kind of layer."""
    from attnbench.choose.valid import followed_default, probed_default

    workloads = [
        {part.batch: part.workload for part in parts if part.kind == kind}
        for kind in range(len(cells))
    ]
    if not engine:
        found = [followed_default(one, device, block_size) for one in workloads]
        return _installed_vllm(), found
    from attnbench.cli.downloads import TerminalTell
    from attnbench.upgrade.probe import probe_all
    from attnbench.upgrade.probe_env import prepare
    from attnbench.upgrade.versions import parse_source

    source = parse_source(engine)
    if source.distribution != "vllm":
        raise UsageError(f"--engine {engine!r}: name a vLLM, e.g. vllm==0.30.0")
    if device.kind not in ("cpu", "cuda"):
        raise UsageError(f"--engine is asked about CUDA devices and CPUs, not {device}")
    capability = "cpu" if device.kind == "cpu" else str(device.capability)
    (answer,) = probe_all([(prepare(source, TerminalTell(), cache), capability)], cells)
    name = f"vLLM {answer.version}"
    return answer.version, [
        probed_default(name, answer.cells[cell.text], one, capability)
        for cell, one in zip(cells, workloads, strict=True)
    ]


def _installed_vllm() -> str:
    """Of the vLLM beside this attnbench; without one, the version that selection follows."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vllm")
    except PackageNotFoundError:
        return "0.22.1"


def _print(advice: Advice, format: Format) -> None:
    from attnbench.choose import report

    command = report.measure_command(advice)
    if format is Format.JSON:
        import json

        print(json.dumps(report.to_json(advice), indent=2))
    else:
        emit(report.ranking_rows(advice), format)
        if format is not Format.CSV:
            if advice.excluded:
                print()
                emit(report.excluded_rows(advice), format)
            print()
            for line in report.sentences(advice):
                print(visible(f"- {line}" if format is Format.MARKDOWN else line))
    if command is None:
        note("to measure what is missing: the same command with --measure, on that device")
    elif command:
        note(f"to measure: {command}")
    if advice.exit_code is ExitCode.UNDECIDED:
        note("not settled: see what is open or missing above")
