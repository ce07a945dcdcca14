"""Changed defaults as a probe tells them, and stored times of them, made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from attnbench.store.record import Measurement
from attnbench.upgrade.batches import parse_batches
from attnbench.upgrade.cells import Cell, cell_of_shape
from attnbench.upgrade.compare import CellChange, ChangeKind, Step
from attnbench.upgrade.cost import Cost, judge_costs
from attnbench.upgrade.probe import CellAnswer, VersionAnswer
from attnbench.upgrade.stored import StoredTimes
from attnbench.workload import get_shape
from tests.history.fake import row

H200 = {"device_kind": "cuda", "device_class": "nvidia-h200", "compute_capability": "9.0"}
ON_H200: dict[str, Any] = {**H200, "timer": "event", "l2_state": "cold"}
LLAMA = cell_of_shape(get_shape("llama-3-8b"))
#: What stands behind FLASHINFER.
NATIVE: dict[str, Any] = {"flashinfer_prefill": "native", "flashinfer_decode": "native"}
XQA: dict[str, Any] = {**NATIVE, "flashinfer_decode": "XQA"}


def answer(cell: Cell, backend: str | None, untrusted: tuple[str, ...] = (), **behind: Any) -> Any:
    return CellAnswer(
        cell=cell,
        backend=backend,
        backend_class=None,
        behind=behind,
        candidates=(),
        refused="",
        depends_on=(),
        untrusted=untrusted,
        not_evaluated=(),
        not_asked=(),
        model_override="",
    )


def change(
    before: CellAnswer,
    after: CellAnswer,
    capability: str = "9.0",
    kind: ChangeKind = ChangeKind.DEFAULT,
) -> CellChange:
    keys = dict.fromkeys([*before.behind, *after.behind])
    behind = [(key, before.behind.get(key), after.behind.get(key)) for key in keys]
    differ = tuple(one for one in behind if one[1] != one[2])
    return CellChange(capability, kind, before, after, "0.22.1", "0.33.0", ("why",), differ)


def step(*changes: CellChange) -> Step:
    first = changes[0]

    def version(name: str, answers: Sequence[CellAnswer]) -> VersionAnswer:
        cells = {one.cell.text: one for one in answers}
        return VersionAnswer(
            name, first.capability, "executed", "cuda", (), {}, {}, 0.0, cells=cells
        )

    before = version("0.22.1", [one.before for one in changes])
    after = version("0.33.0", [one.after for one in changes])
    return Step(first.capability, before, after, changes, 0, (), ())


FA_TO_TRITON = change(
    answer(LLAMA, "FLASH_ATTN", flash_attn_version=3), answer(LLAMA, "TRITON_ATTN")
)


def rows(
    backend: str,
    seconds: float,
    variant: str = "",
    workload: str = "32q1s4k",
    run: int = 0,
    replicates: int = 3,
    **more: Any,
) -> list[Measurement]:
    return [
        row(run, r, backend=backend, variant=variant, workload=workload,
            seconds=seconds * (1 + 0.002 * (r - 1)), **{**ON_H200, **more})
        for r in range(replicates)
    ]  # fmt: skip


def stored(*groups: Sequence[Measurement], published: Sequence[str] = ()) -> StoredTimes:
    return StoredTimes([asdict(one) for group in groups for one in group], published)


def judged(times: StoredTimes, *changes: CellChange, batches: Sequence[str] = ("32q1s4k",)) -> Cost:
    (cost,) = judge_costs([step(*(changes or (FA_TO_TRITON,)))], parse_batches(batches), times)
    return cost
