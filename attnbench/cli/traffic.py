"""`attnbench traffic`: a trace of requests as a few hundred batches to measure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, emit, note
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
    requests_text,
    trace_options,
)
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.traffic.latency import AttentionRoofline
    from attnbench.traffic.reduce import Reduction
    from attnbench.traffic.reduced import ReducedTrace
    from attnbench.traffic.types import Floats
    from attnbench.workload import Workload

COLUMNS = ("workload", "weight", "steps", "seconds_share_pct")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def traffic(
    ctx: typer.Context,
    trace: Annotated[Path, typer.Argument(help="File of requests, gzipped or not.")],
    model: ModelOption = "llama-3-8b",
    tp: RanksOption = 1,
    layer: LayerOption = "",
    device: Annotated[
        str,
        typer.Option(
            help="Whose published peaks drive the schedule's clock: NVIDIA H200, or nvidia-h200."
        ),
    ] = "NVIDIA H200",
    trace_format: TraceFormatOption = "",
    sort_arrivals: SortArrivalsOption = False,
    request_rate: RequestRateOption = 0.0,
    max_model_len: MaxModelLenOption = 0,
    requests: RequestsOption = 0,
    rate_scale: RateScaleOption = 1.0,
    representatives: RepresentativesOption = 512,
    headroom: HeadroomOption = 1.0,
    check_window: Annotated[
        int,
        typer.Option(
            help="Instead: every one of so many steps that chose no batch, for `itl "
            "--check-window`; 500 or more."
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write a suite file, e.g. suites/code.py, for `run`.")
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Schedule a trace as vLLM would, and choose the batches that stand for all of its steps."""
    from attnbench.cli.model_layer import model_layer
    from attnbench.traffic.latency_measured import MeasuredLatency
    from attnbench.traffic.reduce import window_error
    from attnbench.traffic.reduced import reduced_trace

    name, rates = device_rates(device)
    if out is not None and (out.suffix != ".py" or not _NAME.fullmatch(out.stem)):
        raise UsageError(f"--out {out}: name a .py file of small letters and dashes, e.g. code.py")
    one = model_layer(model, tp, layer)
    options = trace_options(ctx.params)
    reduced = reduced_trace(trace, one.layer, one.sizes, tp, rates, options, one.num_layers)
    steps, reduction = reduced.steps, reduced.reduction
    attention, window = reduced.attention, reduced.reduction.held_back
    note(
        f"{requests_text(reduced.trace)} make {len(steps)} steps, by a clock at the roofline of "
        f"{name}"
    )
    seconds = _roofline_of(reduction, attention)
    model_s = MeasuredLatency(reduction.workloads, seconds, attention.num_layers)
    predicted = model_s.of_steps(steps)[window]
    error = window_error(predicted, attention.of_steps(steps)[window])
    note(
        f"{len(reduction)} representatives; {error.num_steps} steps held back, at the roofline: "
        f"total {100 * error.total:+.2f} %, p99 {100 * error.p99:+.2f} %"
    )
    if check_window:
        _emit_window(reduced, check_window, out, format)
        return
    if out is not None:
        pairs = list(zip(reduction.workloads, reduction.weights.tolist(), strict=True))
        _write_suite(out, pairs, f"stand for {len(steps)} steps of {trace.name}")
    shares = reduction.weights * seconds
    rows = [
        {
            "workload": workload.text,
            "weight": round(float(reduction.weights[index]), 3),
            "steps": int(reduction.num_nearest[index]),
            "seconds_share_pct": round(100 * float(shares[index] / shares.sum()), 3),
        }
        for index, workload in enumerate(reduction.workloads)
    ]
    emit(sorted(rows, key=lambda row: -float(row["seconds_share_pct"])), format, COLUMNS)


def _roofline_of(reduction: Reduction, attention: AttentionRoofline) -> Floats:
    """(num_representatives,) seconds of one layer at the roofline."""
    import numpy as np

    from attnbench.traffic.latency import AttentionRoofline

    one = AttentionRoofline(attention.costs.layer, attention.rates, 1)
    seconds = []
    for workload in reduction.workloads:
        query = np.array([request.query_len for request in workload.requests])
        tokens = np.array([request.seq_len for request in workload.requests])
        seconds.append(one(query, tokens - query))
    return np.array(seconds)


def _emit_window(reduced: ReducedTrace, num_steps: int, out: Path | None, format: Format) -> None:
    """Every step of the window that is to be checked, equal ones once."""
    from collections import Counter

    from attnbench.traffic.reduce import window_to_check, window_workloads

    window = window_to_check(reduced.reduction, num_steps)
    counts = Counter(window_workloads(reduced.steps, window, reduced.layer))
    note(
        f"steps {window.start} to {window.stop - 1} are {len(counts)} different batches, as they "
        "are: nothing is rounded"
    )
    if out is not None:
        pairs = [(workload, float(count)) for workload, count in counts.items()]
        _write_suite(out, pairs, f"are {num_steps} steps of {reduced.trace.name}")
    emit(
        [{"workload": one.text, "steps": count} for one, count in counts.items()],
        format,
        ("workload", "steps"),
    )


def _write_suite(path: Path, pairs: Sequence[tuple[Workload, float]], what: str) -> None:
    """Batches as a suite of preset `full`, and their weights beside it."""
    heaviest = max(pairs, key=lambda pair: pair[1])[0]
    lines = [
        '"""Made by `attnbench traffic`: batches of the steps of a trace."""',
        "",
        "from attnbench.workload import Suite",
        "",
        "#: Steps of the schedule that each batch stands for.",
        "WEIGHTS = {",
        *(f"    {workload.text!r}: {weight:.6g}," for workload, weight in pairs),
        "}",
        "",
        "SUITE = Suite(",
        f"    {path.stem!r},",
        f"    {f'{len(pairs)} batches that {what}.'!r},",
        f"    smoke=[{heaviest.text!r}],",
        "    full=list(WEIGHTS),",
        ")",
        "",
    ]
    # Whole or not at all: `run` loads every file of the folder.
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("\n".join(lines), encoding="utf-8")
        partial.replace(path)
        note(f"{path}: attnbench run --suite {path.stem} --preset full")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}; name a writable file") from error
