"""What `traffic`, `itl` and `choose --trace` are told of a trace: the same options, read alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.traffic.latency import DeviceRates
    from attnbench.traffic.reduced import TraceOptions
    from attnbench.traffic.types import Trace

ModelOption = Annotated[
    str, typer.Option(help="Whose layers: a registered name (llama-3-8b) or a config.json.")
]
RanksOption = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks.")]
LayerOption = Annotated[
    str, typer.Option(help="More words of the layer's workload, e.g. 'kv=fp8_e4m3 block=64'.")
]
TraceFormatOption = Annotated[str, typer.Option(help="Format of the trace; default: sniffed.")]
MaxModelLenOption = Annotated[
    int, typer.Option(help="Of a trace: leave out requests of more tokens; 0: none.")
]
RequestsOption = Annotated[
    int, typer.Option(help="Of a trace: only the first so many requests; 0: all.")
]
RateScaleOption = Annotated[
    float, typer.Option(help="Of a trace: so many times as many requests per second.")
]
RequestRateOption = Annotated[
    float,
    typer.Option(help="Of a trace without times (ShareGPT): Poisson arrivals, requests a second."),
]
SortArrivalsOption = Annotated[
    bool, typer.Option("--sort-arrivals", help="Of a trace: sort by time one that is not sorted.")
]
RepresentativesOption = Annotated[
    int, typer.Option(help="Of a trace: batches that stand for its steps, at most.")
]
HeadroomOption = Annotated[
    float,
    typer.Option(
        help="Of a trace: also larger batches, as it makes at so many times the rate; 1: none."
    ),
]


def trace_options(params: Mapping[str, Any]) -> TraceOptions:
    """The options of a trace among a verb's parameters."""
    from dataclasses import fields

    from attnbench.traffic.reduced import TraceOptions

    return TraceOptions(**{field.name: params[field.name] for field in fields(TraceOptions)})


def option_words(options: TraceOptions) -> list[str]:
    """The options as they are typed; those that are as by default are left out."""
    from dataclasses import fields

    words: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def device_rates(device: str, option: str = "--device") -> tuple[str, DeviceRates]:
    """The name of a device and its published peaks, which are the clock of a schedule.

    Args:
        device: as its driver names it (`NVIDIA H200`), or its class (`nvidia-h200`).
        option: that asks, for the message.

    Raises:
        UsageError: no published peaks of it are known.
    """
    from attnbench.measure.environment import class_of_name
    from attnbench.measure.peaks import PEAKS
    from attnbench.traffic.latency import DeviceRates
    from attnbench.workload.closest import did_you_mean

    wanted = class_of_name(device)
    name = next((one for one in PEAKS if class_of_name(one) == wanted), None)
    if name is None:
        raise UsageError(
            f"{option} {device}: no published peaks of it, which are the clock of a trace's "
            f"schedule; {did_you_mean(device, tuple(PEAKS))}"
        )
    peak = PEAKS[name]
    return name, DeviceRates(peak.memory_bytes_per_s, peak.matmul_flops_per_s)


def requests_text(trace: Trace) -> str:
    """`300 requests (2 too long, 0 empty)`: what was read of it."""
    return f"{len(trace)} requests ({trace.num_rejected} too long, {trace.num_empty} empty)"
