"""A point always ends as rows with the right status: no pass, no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnbench.backends.check import check_output
from attnbench.backends.device import Device
from attnbench.backends.registry import get_backend_class
from attnbench.measure.plan import PlannedPoint, plan_workloads
from attnbench.measure.point import PointContext, measure_point, untimed_reason
from attnbench.measure.prepare import prepare
from attnbench.measure.timers import FakeTimer, Subject, WallTimer
from attnbench.measure.truth import TruthCache
from attnbench.store.record import Measurement, Metric, Status, point_id
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes, attention_flops

CPU = Device("cpu")
SMALL = Workload.parse("3q1s40_1q7s7 heads=4/2 head_size=32 dtype=fp32")
MLA = Workload.parse("2q1s40_1q9s9 shape=deepseek-v2-lite dtype=fp32")


def one(rows: list[Measurement]) -> Measurement:
    assert [row.metric for row in rows] == [Metric.ATTENTION]
    return rows[0]


def test_a_right_backend_gets_its_times_and_its_parts(context: PointContext) -> None:
    rows = measure_point(PlannedPoint(SMALL, "CPU_ATTN", "", "s"), context)
    by_metric = {row.metric: row for row in rows}
    assert rows[0].metric == Metric.ATTENTION
    assert set(by_metric) == {
        Metric.ATTENTION,
        Metric.METADATA_BUILD,
        Metric.KV_CACHE_WRITE,
        Metric.PAGE_GATHER,
    }
    assert {row.status for row in rows} == {Status.OK}
    row = rows[0]
    subject = Subject(SMALL, "CPU_ATTN", Metric.ATTENTION, 0)
    assert sorted(row.samples)[2] == FakeTimer().seconds(subject)
    assert row.point_id == point_id(SMALL.text, "CPU_ATTN", "")
    assert row.workload_id == SMALL.id
    assert (row.flops, row.bytes_moved) == (attention_flops(SMALL), attention_bytes(SMALL))
    assert row.checked == ("before", "after")
    assert row.rel_error is not None
    assert row.rel_error < 1e-4
    assert row.conditions_before
    assert row.conditions_after
    assert (row.timer, row.l2_state, row.suite) == ("fake", "hot", "s")
    assert len({row.key for row in rows}) == len(rows)


def test_latent_attention_decodes_and_prefills_in_one_point(context: PointContext) -> None:
    rows = measure_point(PlannedPoint(MLA, "TORCH_MLA"), context)
    assert {row.status for row in rows} == {Status.OK}, rows[0].reasons
    assert rows[0].rel_error is not None
    assert rows[0].rel_error < 1e-4


@pytest.mark.parametrize(
    ("backend", "status", "reason"),
    [
        ("WRONG", Status.INCORRECT, "request"),
        ("LATER_WRONG", Status.INCORRECT, "after timing"),
        ("SILENT", Status.INCORRECT, ""),
        ("RAISING", Status.ERROR, "RuntimeError: no kernel image is available"),
        ("HUNGRY", Status.OOM, "memory"),
    ],
)
@pytest.mark.usefixtures("misbehaving")
def test_a_point_that_fails_is_a_row_without_samples(
    context: PointContext, backend: str, status: Status, reason: str
) -> None:
    context = replace(context, timer=WallTimer(), truths=TruthCache())
    row = one(measure_point(PlannedPoint(SMALL, backend), context))
    assert row.status == status, row.reasons
    assert reason in row.reasons[0]
    assert "\n" not in row.reasons[0]
    assert row.samples == ()
    assert row.timer == "wall"


def test_a_poisoned_point_keeps_no_answer_and_a_twin_has_its_own(context: PointContext) -> None:
    batch, truth = context.truths.get(
        PlannedPoint(MLA, "TORCH_MLA"), get_backend_class("TORCH_MLA"), CPU
    )
    with torch.no_grad():
        point = prepare(PlannedPoint(MLA, "TORCH_MLA"), batch)
        point.attend()
        twin = point.twin()
        assert twin.lse() is None
        twin.attend()
        point.poison()
    for one_, ok in ((point, False), (twin, True)):
        lse = one_.lse()
        assert lse is not None
        assert bool(lse.isfinite().all()) is ok
        assert check_output(one_.output(), truth, "fp32", "fp32", lse).ok is ok


@pytest.mark.usefixtures("misbehaving")
def test_an_lse_that_goes_wrong_while_it_is_timed_loses_the_time(context: PointContext) -> None:
    context = replace(context, timer=WallTimer(), truths=TruthCache())
    row = one(measure_point(PlannedPoint(MLA, "LSE_LATER_WRONG"), context))
    assert (row.status, row.samples) == (Status.INCORRECT, ())
    assert row.reasons[0].startswith("after timing: LSE is off by 0.5")


def test_a_refused_point_is_a_row_with_every_reason(context: PointContext) -> None:
    refused = Workload.parse("1q1s40 sinks=1 softcap=20 dtype=fp32")
    row = one(measure_point(PlannedPoint(refused, "TORCH_SDPA"), context))
    assert row.status == Status.UNSUPPORTED
    assert "attention sinks not supported" in row.reasons
    assert "logits soft cap not supported" in row.reasons


def test_the_reference_is_computed_once_and_kept_for_the_next_replicate(
    context: PointContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnbench.measure import truth

    first = replace(context, truths=TruthCache(tmp_path))
    measure_point(PlannedPoint(SMALL, "CPU_ATTN"), first)
    assert len(list(tmp_path.glob("*.pt"))) == 1

    def never(batch: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(truth, "reference_attention", never)
    second = replace(context, truths=TruthCache(tmp_path))
    assert measure_point(PlannedPoint(SMALL, "TORCH_SDPA"), second)[0].status == Status.OK


def test_a_plan_holds_each_point_once_on_backends_of_its_family() -> None:
    plan = plan_workloads([SMALL, MLA, SMALL], [], CPU)
    assert len({point.point_id for point in plan}) == len(plan)
    families = {(point.workload.shape.is_mla, point.backend) for point in plan}
    assert (False, "CPU_ATTN") in families
    assert (False, "TORCH_SDPA") in families
    assert (True, "TORCH_MLA") in families
    assert (True, "CPU_ATTN") not in families
    assert (False, "TORCH_MLA") not in families
    assert PlannedPoint.from_json(plan[0].to_json()) == plan[0]


def test_a_wall_clock_never_times_a_device_that_is_not_the_cpu() -> None:
    backend = get_backend_class("TORCH_SDPA")
    assert untimed_reason(backend, CPU, WallTimer()) == ""
    assert "cuda" in untimed_reason(backend, Device("cuda", "sm90"), WallTimer())
    assert untimed_reason(backend, Device("cuda", "sm90"), FakeTimer()) == ""
    interpreted = get_backend_class("TRITON_ATTN")
    assert "interpreter" in untimed_reason(interpreted, CPU, FakeTimer())


def test_references_are_kept_only_while_there_is_room(
    context: PointContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnbench.measure import truth

    def kept() -> int:
        """Files after two points, each in a worker of its own that shares the folder."""
        for spec in ("3q1s40", "3q1s41"):
            planned = PlannedPoint(
                Workload.parse(f"{spec} heads=4/2 head_size=32 dtype=fp32"), "CPU_ATTN"
            )
            rows = measure_point(planned, replace(context, truths=TruthCache(tmp_path)))
            assert rows[0].status == Status.OK
        files = list(tmp_path.iterdir())
        for file in files:
            file.unlink()
        return len(files)

    # One: 3 tokens of 4 heads of 32 values, 4 LSE a token, 4 starts. A file is somewhat larger.
    one = 8 * 3 * 4 * 32 + 8 * 3 * 4 + 4 * 4
    for room, files in ((one - 1, 0), (one * 2, 1), (one * 6, 2)):
        monkeypatch.setattr(truth, "_MAX_KEPT_BYTES", room)
        assert kept() == files, room

    # A folder that is gone, or a file cut short, costs time and never the point.
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(truth, "_MAX_KEPT_BYTES", 1 << 30)
    cache = TruthCache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    rows = measure_point(PlannedPoint(SMALL, "CPU_ATTN"), replace(context, truths=cache))
    assert rows[0].status == Status.OK


@pytest.mark.parametrize("seconds", [0.0, -1e-6, float("nan"), float("inf")])
def test_a_timer_that_gives_no_time_is_an_error_not_a_quiet_point(
    context: PointContext, seconds: float
) -> None:
    class Broken(FakeTimer):
        def seconds(self, subject: Subject) -> float:
            return seconds

    rows = measure_point(PlannedPoint(SMALL, "CPU_ATTN", "", "s"), replace(context, timer=Broken()))
    assert (rows[0].status, rows[0].samples) == (Status.ERROR, ())
    assert "gave a time of" in rows[0].reasons[0]
