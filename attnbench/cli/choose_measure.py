"""`attnbench choose --measure`: rounds on this machine's device until the ranking is settled."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from attnbench.errors import UsageError

if TYPE_CHECKING:
    from attnbench.backends.device import Device
    from attnbench.choose.rank import Part
    from attnbench.choose.tries import Choice
    from attnbench.measure import PlannedPoint
    from attnbench.store import ResultsFolder


def measure_race(
    parts: Sequence[Part],
    folder: ResultsFolder,
    device: Device,
    timer: str,
    l2_state: str,
    block_size: int,
    budget_s: float,
    confidence: float,
) -> tuple[str, str]:
    """Measure all valid backends of this machine, then only those still in question.

    Everything goes into one run of the results folder, a round a replicate. Returns how sure the
    outcome is, in words, and the timer. Raises UsageError where nothing can be measured.
    """
    from attnbench.choose.adaptive import Race, run_race, statement
    from attnbench.cli.sweeping import Sweep, measure_options
    from attnbench.history.rule import VerdictSettings
    from attnbench.measure.options import MAX_REPLICATES
    from attnbench.settings import load_settings

    plans = {one.text: plan_of(one, parts) for one in runnable(parts, device, block_size)}
    if not plans:
        raise UsageError(f"--measure: no backend of {device} takes these layers here")
    levels = [l2_state] if l2_state else []
    options = measure_options(load_settings(), device, timer, levels, 1, None, None, [])
    race = Race(tuple(plans), confidence, VerdictSettings().noise(options.timer).floor)
    everything = list(dict.fromkeys(point for plan in plans.values() for point in plan))
    with Sweep.planned(folder, everything, options, device).held() as sweep:

        def sample(
            arms: Sequence[str], number: int
        ) -> tuple[Mapping[str, float], Mapping[str, str]]:
            mine = {point for arm in arms for point in plans[arm]}
            plan = [point for point in everything if point in mine]
            now = replace(sweep.options, first_replicate=number)
            current = sweep.again(plan, now) if number else replace(sweep, plan=plan, options=now)
            current.measure(f"round {number + 1}")
            where = {"run_id": sweep.header.run_id, "metric": "attention", "replicate": number}
            names = ["point_id", "status", "samples", "reasons"]
            rows = folder.table(names, where).to_pylist()
            return totals(arms, plans, parts, rows)

        stop, _ = run_race(race, sample, budget_s, time.monotonic, MAX_REPLICATES)
    return statement(race, stop), options.timer


def runnable(parts: Sequence[Part], device: Device, block_size: int) -> list[Choice]:
    """Every backend and variant that is here and takes all layers, over the cache it likes."""
    from attnbench.backends.registry import backend_status, get_backend_class
    from attnbench.choose.tries import Choice
    from attnbench.choose.valid import refusal
    from attnbench.measure.plan import runnable_backends

    found = []
    first = parts[0].workload
    for name in runnable_backends(device, first.shape.is_mla):
        cls = get_backend_class(name)
        block = block_size or cls.get_preferred_block_size(first.block_size)
        layout = str(cls.get_required_kv_cache_layout() or first.kv_cache_layout)
        for variant in cls.get_variants(device):
            choice = Choice(name, variant, block, layout)
            if any(refusal(choice, part.workload, device) for part in parts):
                continue
            if backend_status(name, device, variant) is None:
                found.append(choice)
    return found


def plan_of(choice: Choice, parts: Sequence[Part]) -> list[PlannedPoint]:
    """A point a part, in the parts' order."""
    from attnbench.measure import PlannedPoint

    return [
        PlannedPoint(
            part.workload.replace(
                block_size=choice.block_size, kv_cache_layout=choice.kv_cache_layout
            ),
            choice.backend,
            choice.variant,
        )
        for part in parts
    ]


def totals(
    arms: Sequence[str],
    plans: Mapping[str, Sequence[PlannedPoint]],
    parts: Sequence[Part],
    rows: Sequence[Mapping[str, object]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Weighted seconds of each arm in a round, and why the others have none."""
    import statistics

    medians: dict[str, float] = {}
    ended: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        point = str(row["point_id"])
        samples = row["samples"]
        if row["status"] in ("OK", "NOISY") and isinstance(samples, Sequence) and samples:
            medians[point] = statistics.median(samples)
        else:
            ended[point].append(str(row["status"]))
    seconds, failed = {}, {}
    for arm in arms:
        lost = [point for point in plans[arm] if point.point_id not in medians]
        if lost:
            listed = ended.get(lost[0].point_id) or ["no row"]
            failed[arm] = f"{listed[0]} on {lost[0].workload.text}"
        else:
            seconds[arm] = sum(
                part.factor * medians[point.point_id]
                for part, point in zip(parts, plans[arm], strict=True)
            )
    return seconds, failed
