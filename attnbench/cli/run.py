"""`attnbench run`: measure batch specs or a suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnbench.cli.model_steps import (
    LAYERS_HELP,
    MODEL_HELP,
    PointMetric,
    check_step_options,
    steps_of,
)
from attnbench.cli.output import Format, FormatOption, ResultsOption, emit
from attnbench.cli.sweeping import (
    L2_HELP,
    LOCK_HELP,
    RATED_HELP,
    SHARD_HELP,
    TIMER_HELP,
    BackendOption,
    PresetOption,
)
from attnbench.cli.workload_options import (
    FEATURES,
    BlockSizeOption,
    DtypeOption,
    KVCacheDtypeOption,
    ShapeOption,
    workload_text,
)
from attnbench.errors import ExitCode, SelectionError, UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.measure import PlannedPoint
    from attnbench.settings import Settings
    from attnbench.store.ceilings import Ceilings
    from attnbench.workload import Workload

COLUMNS = (
    *("workload", "backend", "variant", "metric", "timer", "l2_state"),
    *("status", "median_us", "spread_pct"),
    *("replicates", "samples", "tflop_s", "gb_s", "roofline_pct", "rel_error", "reasons"),
)


#: Rows alike in these are replicates of one another.
_ONE_LINE = ("workload", "backend", "variant", "metric", "timer", "l2_state", "execution")


def run(
    ctx: typer.Context,
    spec: Annotated[
        list[str] | None,
        typer.Argument(
            help="Batch spec and features: 8q1s4k window=1024; braces sweep: {1,8}q1s{1k..4k*2}"
        ),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Measure this suite instead of a batch spec.")
    ] = None,
    preset: PresetOption = "smoke",
    shape: ShapeOption = "",
    dtype: DtypeOption = "",
    kv_cache_dtype: KVCacheDtypeOption = "",
    block_size: BlockSizeOption = 0,
    backend: BackendOption = None,
    metric: Annotated[
        PointMetric,
        typer.Option(help="Time attention, or also whole steps of a model of few layers."),
    ] = PointMetric.ATTENTION,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "",
    tp: Annotated[int, typer.Option(help="With --metric step: tensor-parallel ranks.")] = 1,
    step_layers: Annotated[list[int] | None, typer.Option(help=LAYERS_HELP)] = None,
    timer: Annotated[str, typer.Option(help=TIMER_HELP)] = "",
    l2: Annotated[list[str] | None, typer.Option(help=L2_HELP)] = None,
    lock_clocks: Annotated[
        float | None, typer.Option(metavar="MHZ", help=LOCK_HELP, show_default=False)
    ] = None,
    rated_clock: Annotated[
        float | None, typer.Option(metavar="MHZ", help=RATED_HELP, show_default=False)
    ] = None,
    replicates: Annotated[int, typer.Option(help="Fresh processes that measure each point.")] = 1,
    budget: Annotated[
        float | None, typer.Option(help="Seconds of samples per point. Default: settings.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Wall seconds per point before it is killed.")
    ] = None,
    fake_slowdown: Annotated[
        list[str] | None,
        typer.Option(help="BACKEND=FACTOR the fake timer multiplies with; for rehearsals."),
    ] = None,
    shard: Annotated[str, typer.Option(help=SHARD_HELP)] = "",
    results: ResultsOption = None,
    resume: Annotated[
        str, typer.Option(help="Go on with this stopped run (its id, or `last`), as planned then.")
    ] = "",
    dry_run: Annotated[bool, typer.Option(help="Print the plan and stop.")] = False,
    format: FormatOption = Format.TABLE,
) -> None:
    """Measure batch specs or suites on the backends of this machine, and store every sample."""
    from attnbench.cli.sweeping import Sweep, check_slowdown, clock_hz, measure_options
    from attnbench.measure.shard import take_shard
    from attnbench.selection import current_device
    from attnbench.settings import load_settings
    from attnbench.store import ResultsFolder

    check_step_options(metric, model, tp, step_layers or [])
    settings = load_settings()
    device = current_device()
    options = measure_options(
        settings, device, timer, l2 or [], replicates, budget, timeout, fake_slowdown or []
    )
    options = replace(
        options,
        shard=shard,
        locked_clock_hz=clock_hz("--lock-clocks", lock_clocks),
        rated_clock_hz=clock_hz("--rated-clock", rated_clock),
    )
    folder = ResultsFolder(results or settings.results)
    if resume:
        sweep = Sweep.resumed(ctx, folder, resume)
    else:
        plan = _plan(ctx, settings, device, spec or [], suite or [], backend or [])
        check_slowdown(options, plan)
        plan = take_shard(plan, shard)
        if dry_run:
            emit([point.to_json() for point in plan], format)
            return
        sweep = Sweep.planned(folder, plan, options, device)
    with sweep.held() as sweep:
        sweep.measure("measuring")
    rows = folder.table(where={"run_id": sweep.header.run_id}).to_pylist()
    emit(summary_rows(rows, sweep.header.ceilings), format, COLUMNS)
    _require_an_answer(rows)
    raise typer.Exit(_exit_code(rows))


def _plan(
    ctx: typer.Context,
    settings: Settings,
    device: Device,
    spec: list[str],
    suites: list[str],
    backends: list[str],
) -> list[PlannedPoint]:
    from attnbench.cli.sweeping import choose_suites, refuse_beside, requested_backends
    from attnbench.measure import make_plan, plan_workloads
    from attnbench.workload.suite import expand_workloads

    if bool(spec) == bool(suites):
        raise UsageError("give a batch spec or --suite, e.g. attnbench run 8q1s4k")
    backends = backends or requested_backends(settings)
    given = set(ctx.params)
    if suites:
        refuse_beside(ctx, "--suite", allowed=given - set(FEATURES))
        chosen, preset = choose_suites(settings, suites), ctx.params["preset"]
        return make_plan(chosen, preset, backends, device, partial(_as_asked, ctx))
    refuse_beside(ctx, "a batch spec", allowed=given - {"preset"})
    workloads = expand_workloads([workload_text(spec, ctx.params)])
    return plan_workloads(_as_asked(ctx, workloads), backends, device)


def _as_asked(ctx: typer.Context, workloads: Iterable[Workload]) -> Iterable[Workload]:
    """The workloads themselves, or steps of a model with their batches."""
    if ctx.params["metric"] is not PointMetric.STEP:
        return workloads
    params = ctx.params
    return steps_of(workloads, params["model"], params["tp"], params["step_layers"] or ())


def summary_rows(
    rows: Iterable[Mapping[str, Any]], ceilings: Ceilings | None = None
) -> list[dict[str, Any]]:
    """One line per point and metric over its replicates; rates are derived here, never stored."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in _ONE_LINE)
        groups.setdefault(key, []).append(row)
    return [_summary_row(groups[key], ceilings) for key in sorted(groups)]


def _summary_row(rows: list[Mapping[str, Any]], ceilings: Ceilings | None) -> dict[str, Any]:
    from statistics import median

    from attnbench.history.roofline import roofline

    first = rows[0]
    medians = [median(row["samples"]) for row in rows if row["samples"]]
    seconds = median(medians) if medians else None
    roof = roofline(first, ceilings)
    errors = [row["rel_error"] for row in rows if row["rel_error"] is not None]

    def rate(amount: int, unit: float) -> float | None:
        return round(amount / seconds / unit, 4) if seconds and amount else None

    return {
        "workload": first["workload"],
        "backend": first["backend"],
        "variant": first["variant"],
        "metric": first["metric"],
        "timer": first["timer"],
        "l2_state": first["l2_state"],
        "status": " ".join(dict.fromkeys(row["status"] for row in rows)),
        "median_us": round(seconds * 1e6, 2) if seconds else None,
        "spread_pct": round((max(medians) / min(medians) - 1) * 100, 1) if medians[1:] else None,
        "replicates": len(rows),
        "samples": sum(len(row["samples"]) for row in rows),
        "tflop_s": rate(first["flops"], 1e12),
        "gb_s": rate(first["bytes_moved"], 1e9),
        "roofline_pct": round(roof.percent(seconds), 1) if roof and seconds else None,
        "rel_error": max(errors) if errors else None,
        "reasons": list(dict.fromkeys(reason for row in rows for reason in row["reasons"])),
    }


def _exit_code(rows: list[dict[str, Any]]) -> ExitCode:
    """4 when a point that should have run did not; a refusal is an answer, not a failure."""
    failed = {"INCORRECT", "OOM", "TIMEOUT", "CRASH", "THROTTLED", "ERROR"}
    return ExitCode.INCOMPLETE if any(r["status"] in failed for r in rows) else ExitCode.OK


def _require_an_answer(rows: list[dict[str, Any]]) -> None:
    """Nothing was measured because everything was refused: say so, though it is stored too.

    Raises SelectionError with the first refusal's reasons.
    """
    if rows and all(row["status"] == "UNSUPPORTED" for row in rows):
        first = rows[0]
        raise SelectionError(
            f"{first['backend']} refuses {first['workload']!r}: {'; '.join(first['reasons'])}. "
            f"See who accepts it: attnbench explain {first['workload']}"
        )
