"""`attnbench traffic`: a trace of requests as a few hundred batches to measure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnbench.cli.output import Format, FormatOption, emit, note
from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.traffic.latency import AttentionRoofline
    from attnbench.traffic.reduce import Reduction
    from attnbench.traffic.types import Floats, StepBatches

COLUMNS = ("workload", "weight", "steps", "seconds_share_pct")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def traffic(
    trace: Annotated[Path, typer.Argument(help="File of requests, gzipped or not.")],
    model: Annotated[
        str, typer.Option(help="Whose layers: a registered name (llama-3-8b) or a config.json.")
    ] = "llama-3-8b",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    layer: Annotated[
        str, typer.Option(help="More words of the layer's workload, e.g. 'kv=fp8_e4m3 block=64'.")
    ] = "",
    device: Annotated[
        str, typer.Option(help="Device whose published peaks drive the schedule's clock.")
    ] = "NVIDIA H200",
    trace_format: Annotated[str, typer.Option(help="Format of the trace; default: sniffed.")] = "",
    max_model_len: Annotated[
        int, typer.Option(help="Leave out requests of more tokens; 0: none.")
    ] = 0,
    requests: Annotated[int, typer.Option(help="Only the first so many; 0: all.")] = 0,
    rate_scale: Annotated[float, typer.Option(help="So many times as many per second.")] = 1.0,
    representatives: Annotated[int, typer.Option(help="Batches to choose at most.")] = 512,
    headroom: Annotated[
        float,
        typer.Option(help="Also larger batches, as the trace makes at so many times the rate."),
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Write a suite file, e.g. suites/code.py, for `run`.")
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Schedule a trace as vLLM would, and choose the batches that stand for all of its steps."""
    from attnbench.cli.model_layer import model_layer
    from attnbench.measure.peaks import PEAKS, peak_of
    from attnbench.traffic.latency import DeviceRates
    from attnbench.traffic.latency_measured import MeasuredLatency
    from attnbench.traffic.reduce import window_error
    from attnbench.traffic.reduced import TraceOptions, reduced_trace
    from attnbench.workload.closest import did_you_mean

    peak = peak_of(device)
    if peak is None:
        raise UsageError(f"no published peaks of {device!r}; {did_you_mean(device, tuple(PEAKS))}")
    if out is not None and (out.suffix != ".py" or not _NAME.fullmatch(out.stem)):
        raise UsageError(f"--out {out}: name a .py file of small letters and dashes, e.g. code.py")
    one = model_layer(model, tp, layer)
    rates = DeviceRates(peak.memory_bytes_per_s, peak.matmul_flops_per_s)
    options = TraceOptions(
        trace_format, max_model_len, requests, rate_scale, representatives, headroom
    )
    reduced = reduced_trace(trace, one.layer, one.sizes, tp, rates, options, one.num_layers)
    loaded, steps, reduction = reduced.trace, reduced.steps, reduced.reduction
    attention, window = reduced.attention, reduced.reduction.held_back
    note(
        f"{len(loaded)} requests ({loaded.num_rejected} too long, {loaded.num_empty} empty) make "
        f"{len(steps)} steps, by a clock at the roofline of {device}"
    )
    seconds = _roofline_of(reduction, attention)
    predicted = MeasuredLatency(reduction.workloads, seconds).of_steps(steps)[window]
    error = window_error(predicted, attention.of_steps(steps)[window])
    note(
        f"{len(reduction)} representatives; {error.num_steps} steps held back, at the roofline: "
        f"total {100 * error.total:+.2f} %, p99 {100 * error.p99:+.2f} %"
    )
    if out is not None:
        _write_suite(out, reduction, trace.name, steps)
        note(f"{out}: attnbench run --suite {out.stem} --preset full")
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


def _write_suite(path: Path, reduction: Reduction, source: str, steps: StepBatches) -> None:
    """The representatives as a suite of preset `full`, and their weights beside it."""
    pairs = list(zip(reduction.workloads, reduction.weights.tolist(), strict=True))
    heaviest = max(pairs, key=lambda pair: pair[1])[0]
    lines = [
        '"""Made by `attnbench traffic`: batches that stand for the steps of a trace."""',
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
        f"    {f'{len(pairs)} batches that stand for {len(steps)} steps of {source}.'!r},",
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
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}; name a writable file") from error
