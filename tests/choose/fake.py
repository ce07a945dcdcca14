"""Small stores of made-up H200 times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnbench.backends.device import Device
from attnbench.choose.advice import Advice, advise, parts_of
from attnbench.choose.stored import Measured
from attnbench.choose.tries import Try, tries_of
from attnbench.choose.valid import Default, followed_default
from attnbench.selection import resolve_device
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.store.record import Measurement
from attnbench.upgrade.batches import parse_batches
from attnbench.upgrade.models import cells_of_model
from tests.history.fake import row, table_of

H200 = "nvidia-h200"
ON_H200: dict[str, Any] = {
    "device_kind": "cuda",
    "device_class": H200,
    "compute_capability": "9.0",
    "driver_version": "580.1",
    "timer": "event",
    "l2_state": "cold",
    "stack": ("python==3.12.1", "torch==2.13.0"),
}
FA3 = ("FLASH_ATTN", "FA3")
FLASHINFER = ("FLASHINFER", "FA3")
TRITON = ("TRITON_ATTN", "")
FLEX = ("FLEX_ATTENTION", "")
LAYERS = 32  # of llama-3-8b, whose times `chosen` asks for


def timed(
    who: tuple[str, str],
    seconds: float | Sequence[float],
    workload: str = "32q1s4k",
    run: int = 0,
    **more: Any,
) -> list[Measurement]:
    """Three replicates 0.1 % apart around `seconds`, or one of each of several."""
    each = (
        [seconds * (1 + 0.001 * (i - 1)) for i in range(3)]
        if isinstance(seconds, float)
        else (list(seconds))
    )
    backend, variant = who
    values = {**ON_H200, "variant": variant, **more}
    return [
        row(run, i, backend=backend, workload=workload, seconds=one, **values)
        for i, one in enumerate(each)
    ]


def ended(
    who: tuple[str, str], status: str, workload: str = "32q1s4k", run: int = 0, **more: Any
) -> list[Measurement]:
    backend, variant = who
    values = {**ON_H200, "variant": variant, "reasons": ("made up",), **more}
    seconds = 1e-4 if status == "NOISY" else None
    return [
        row(run, 0, backend=backend, workload=workload, seconds=seconds, status=status, **values)
    ]


def fill(folder: Path, *groups: Sequence[Measurement]) -> Path:
    """A results folder with these rows as one more sealed run."""
    header = RunHeader.new(argv=(), spec="", plan=(), options={}, environment={})
    with ResultsFolder(folder).open_run(header) as run:
        for one in (one for group in groups for one in group):
            run.append(replace(one, run_id=run.run_id))
        run.seal()
    return folder


def tries(*groups: Sequence[Measurement]) -> list[Try]:
    """As the store gives them."""
    return tries_of(table_of([one for group in groups for one in group]))


def chosen(
    *groups: Sequence[Measurement],
    batches: Sequence[str] = ("32q1s4k",),
    model: str = "llama-3-8b",
    version: str = "0.22.1",
    published: Sequence[str] = (),
    device: Device | None = None,
    device_class: str = H200,
    defaults: Sequence[Default] = (),
    **changes: Any,
) -> Advice:
    """The advice by these rows."""
    where = device or resolve_device("sm90")
    cells = cells_of_model(model)
    parts = parts_of(cells, parse_batches(batches))
    measured = Measured(tries(*groups), device_class, [part.workload for part in parts], published)
    defaults = defaults or [
        followed_default({p.batch: p.workload for p in parts if p.kind == kind}, where, 0)
        for kind in range(len(cells))
    ]
    settings = {"version": version, "choice_days": 30, **changes}
    return advise(parts, measured, where, defaults, **settings)


def names(advice: Advice) -> list[str]:
    return [line.name for line in advice.whole.lines]


def reasons(advice: Advice) -> dict[str, str]:
    return {one.name: one.reason for one in advice.excluded}
