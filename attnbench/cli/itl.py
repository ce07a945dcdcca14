"""`attnbench itl`: what the users of each backend feel under a traffic."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, ResultsOption, emit, note
from attnbench.cli.stored_times import StoredL2Option, StoredTimerOption, check_how
from attnbench.cli.trace_options import (
    HeadroomOption,
    LayerOption,
    MaxModelLenOption,
    ModelOption,
    RanksOption,
    RateScaleOption,
    RepresentativesOption,
    RequestRateOption,
    RequestsOption,
    SortArrivalsOption,
    TraceFormatOption,
    device_rates,
    option_words,
    requests_text,
    trace_options,
)
from attnbench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from attnbench.choose.itl import UserAnswer
    from attnbench.choose.stored import Measured
    from attnbench.traffic.reduced import ReducedTrace, TraceOptions
    from attnbench.workload import Workload


class Rest(StrEnum):
    """What a step is made of beside attention."""

    NONE = "none"
    ROOFLINE = "roofline"
    MEASURED = "measured"


def itl(
    ctx: typer.Context,
    trace: Annotated[Path, typer.Argument(help="File of requests, as `attnbench traffic` reads.")],
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="This backend, NAME or NAME:variant; repeat. Default: all with a time of every "
            "batch."
        ),
    ] = None,
    model: ModelOption = "llama-3-8b",
    tp: RanksOption = 1,
    layer: LayerOption = "",
    device: Annotated[
        str,
        typer.Option(help="Whose stored times and published peaks: NVIDIA H200, or nvidia-h200."),
    ] = "NVIDIA H200",
    rest: Annotated[
        Rest,
        typer.Option(
            help="The rest of a step: linear layers at the roofline, measured steps of the model "
            "less their attention, or none of it."
        ),
    ] = Rest.ROOFLINE,
    trace_format: TraceFormatOption = "",
    sort_arrivals: SortArrivalsOption = False,
    request_rate: RequestRateOption = 0.0,
    max_model_len: MaxModelLenOption = 0,
    requests: RequestsOption = 0,
    rate_scale: RateScaleOption = 1.0,
    representatives: RepresentativesOption = 512,
    headroom: HeadroomOption = 1.0,
    load: Annotated[
        list[float] | None,
        typer.Option(help="In JSON also at so many times the rate, same times; repeat."),
    ] = None,
    check_window: Annotated[
        int,
        typer.Option(
            help="Instead: predict so many steps that chose no batch, and compare with their times "
            "(measured by `traffic --check-window`); 500 or more."
        ),
    ] = 0,
    results: ResultsOption = None,
    timer: StoredTimerOption = "",
    l2: StoredL2Option = "",
    format: FormatOption = Format.TABLE,
) -> None:
    """Say what inter-token latency and throughput each backend gives a trace, by stored times."""
    from attnbench.choose.itl import ROOFLINE, answer
    from attnbench.choose.itl_report import measure_command
    from attnbench.choose.itl_rest import measured_rest, step_command
    from attnbench.choose.stored import Measured
    from attnbench.choose.tries import read_tries
    from attnbench.cli.model_layer import model_layer
    from attnbench.measure.environment import class_of_name
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder
    from attnbench.store.record import Metric
    from attnbench.traffic.model_sizes import model_sizes
    from attnbench.traffic.reduce import window_to_check, window_workloads
    from attnbench.traffic.reduced import reduced_trace

    if check_window and load:
        raise UsageError("--load is of an answer, and --check-window gives none; leave one out")
    if load and format is not Format.JSON:
        raise UsageError("--load is told in JSON only, for the pages; add --format json")
    check_how(timer, l2)
    name, rates = device_rates(device)
    device_class = class_of_name(name)
    options = trace_options(ctx.params)
    folder = ResultsFolder(results or load_settings().results)
    tries = read_tries(folder, timer, l2)
    one = model_layer(model, tp, layer)
    reduced = reduced_trace(trace, one.layer, one.sizes, tp, rates, options, one.num_layers)
    suite = re.sub(r"[^a-z0-9]+", "-", trace.stem.lower()).strip("-") or "trace"
    suites = {suite: _write_suite(trace, suite, model, tp, layer, name, options)}
    run_words = (f" --timer {timer}" if timer else "") + (f" --l2 {l2}" if l2 else "")
    if check_window:
        window = window_workloads(
            reduced.steps, window_to_check(reduced.reduction, check_window), one.layer
        )
        wanted = [*reduced.reduction.workloads, *window]
        measured = Measured(tries, device_class, wanted, folder.published_runs())
        its = f"{suite}-window"
        suites[its] = _write_suite(
            trace, its, model, tp, layer, name, options, ["--check-window", str(check_window)]
        )
        raise typer.Exit(
            _check(reduced, window, measured, backend or [], suites, run_words, format)
        )
    measured = Measured(tries, device_class, reduced.reduction.workloads, folder.published_runs())
    loads = sorted({1.0, *load}) if load else []
    steps = None
    if rest is Rest.MEASURED:
        steps = measured_rest(
            read_tries(folder, timer, l2, Metric.STEP),
            tries,
            one.layer,
            model_sizes(one.sizes, tp),
            measured,
            folder.published_runs(),
            step_command(model, tp, one.layer, (backend or [""])[0], run_words),
        )
    with_rest = rest is Rest.ROOFLINE
    found = answer(reduced, measured, backend or [], with_rest=with_rest, steps=steps, loads=loads)
    nobody = [one.name for one in found.answers] == [ROOFLINE] and not found.unanswered
    command = measure_command(found.unanswered, suites, run_words, nobody)
    _print(
        found, command, format, _asked(trace, model, tp, layer, name, options, reduced, measured)
    )
    _tell(found, reduced, measured, command, headroom)
    if backend and found.unanswered:
        raise typer.Exit(ExitCode.UNDECIDED)


def _check(
    reduced: ReducedTrace,
    window: Sequence[Workload],
    measured: Measured,
    backends: Sequence[str],
    suites: Mapping[str, str],
    run_words: str,
    format: Format,
) -> ExitCode:
    """Print how far off each backend's prediction of the window is. 1: one is beyond the bound; 3:
    one that was asked for, or everybody, has no times of all steps."""
    from attnbench.choose.itl_report import measure_command
    from attnbench.choose.window import P99_WITHIN, TOTAL_WITHIN, check_window

    checks, lacking = check_window(reduced, window, measured, backends)
    emit(
        [one.row() for one in checks],
        format,
        ("backend", "steps", "batches", "total_error_pct", "p99_error_pct", "within"),
    )
    note(
        f"{len(window)} steps that chose none of the {len(reduced.reduction)} batches, attention "
        f"only; to be within {TOTAL_WITHIN:.0%} of their total and {P99_WITHIN:.0%} of their p99"
    )
    if measured.how is not None:
        note(f"times of {measured.how.text}")
    for line in measured.notes:
        note(line)
    for one in lacking:
        note(f"{one.request}: {one.reason}")
    if command := measure_command(lacking, suites, run_words, not checks and not lacking):
        note(f"to measure: {command}")
    codes = [ExitCode.OK if one.is_within else ExitCode.REGRESSION for one in checks]
    if (backends and lacking) or not checks:
        codes.append(ExitCode.UNDECIDED)
    return ExitCode.join(*codes)


def _write_suite(
    trace: Path,
    suite: str,
    model: str,
    tp: int,
    layer: str,
    device: str,
    options: TraceOptions,
    more: Sequence[str] = (),
) -> str:
    """The `attnbench traffic` command with the same batches; defaults left out."""
    words = ["attnbench", "traffic", str(trace), "--model", model]
    pairs: list[tuple[str, object, object]] = [
        ("--tp", tp, 1),
        ("--layer", layer, ""),
        ("--device", device, "NVIDIA H200"),
    ]
    for option, value, default in pairs:
        if value != default:
            words += [option, str(value)]
    words += option_words(options)
    words += [*more, "--out", f"suites/{suite}.py"]
    return " ".join(quote(word) for word in words)


def _print(found: UserAnswer, command: str, format: Format, asked: dict[str, object]) -> None:
    from attnbench.choose.itl_report import number_rows, text_rows, to_json

    if format is Format.JSON:
        print(json.dumps(to_json(found, command, asked), indent=2, allow_nan=False))
    elif format is Format.CSV:
        emit(number_rows(found), format)
    else:
        emit(text_rows(found), format)


def _asked(
    trace: Path,
    model: str,
    tp: int,
    layer: str,
    device: str,
    options: TraceOptions,
    reduced: ReducedTrace,
    measured: Measured,
) -> dict[str, object]:
    """What was asked, and of which stored times."""
    how = measured.how
    return {
        "trace": trace.name,
        "requests": len(reduced.trace),
        "rate_scale": options.rate_scale,
        "model": model,
        "tensor_parallel_size": tp,
        "layer": layer,
        "device": device,
        "times": how and how.text,
        "timer": how and how.timer,
        "driver_version": how and how.driver_version,
        "versions": list(measured.versions),
        "published": measured.is_published,
    }


def _more(headroom: float) -> str:
    """The next headroom to ask for."""
    return f"{2 * max(headroom, 1.0):g}"


def _tell(
    found: UserAnswer, reduced: ReducedTrace, measured: Measured, command: str, headroom: float
) -> None:
    note(
        f"{requests_text(reduced.trace)}, "
        f"{found.num_batches} batches stand for their steps; a step is {found.scope}"
    )
    if measured.how is not None:
        published = ", published" if measured.is_published else ""
        note(f"times of {measured.how.text}{published}")
    for line in measured.notes:
        note(line)
    for one in found.answers:
        if one.choice is not None and one.replicates == 1:
            note(f"{one.name}: a batch was timed by one process; what differs between is not in []")
        if one.beyond > 0.01:
            note(
                f"{one.name}: {100 * one.beyond:.0f} % of its time is in steps larger than every "
                f"batch measured; extrapolated: measure larger ones, --headroom {_more(headroom)}"
            )
    for lacking in found.unanswered:
        note(f"{lacking.request}: {lacking.reason}")
    if command:
        note(f"to measure: {command}")
