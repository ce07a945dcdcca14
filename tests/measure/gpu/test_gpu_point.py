"""A point under GPU timers: which rows, which labels, and no time for what was not written.

The impl computes on the CPU and launches one kernel on the simulated device beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from attnbench.backends.cpu_attn import CPUAttentionImpl
from attnbench.backends.device import Device
from attnbench.measure import point as point_room
from attnbench.measure.environment import read_environment
from attnbench.measure.gpu.runtime import KernelRecord
from attnbench.measure.gpu.timers import GpuTimer
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import PointContext, measure_point
from attnbench.measure.prepare import prepare
from attnbench.measure.truth import TruthCache
from attnbench.store.record import Measurement, Metric, Status
from attnbench.workload import Workload
from attnbench.workload.cost import attention_bytes
from tests.measure.gpu.simulated import SimulatedGpu

CPU = Device("cpu")
SMALL = Workload.parse("3q1s40_1q7s7 heads=4/2 head_size=32 dtype=fp32")
MLA = Workload.parse("2q1s40_1q9s9 shape=deepseek-v2-lite dtype=fp32")


def measured(
    gpu: SimulatedGpu,
    timer: str,
    l2_states: tuple[str, ...] = ("cold",),
    workload: Workload = SMALL,
    backend: str = "CPU_ATTN",
    rated_clock_hz: float = 0.0,
    variant: str = "",
) -> list[Measurement]:
    gpu_timer = GpuTimer(timer, l2_states, rated_clock_hz, make_gpu=lambda: gpu)
    context = PointContext(
        run_id="20261121T000000Z-000000",
        replicate=0,
        device=CPU,
        environment=read_environment(CPU),
        options=MeasureOptions(timer=timer, l2_states=l2_states, max_samples=40, budget_s=0.2),
        timer=gpu_timer,
        timer_floor_s=1e-6,
        host_floor_s=1e-7,
        truths=TruthCache(),
    )
    return measure_point(PlannedPoint(workload, backend, variant), context)


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Callable[[SimulatedGpu], None]:
    """Make CPU_ATTN launch a kernel of 20 µs (30 cold) on the simulated device."""
    forward = CPUAttentionImpl.forward

    def install(gpu: SimulatedGpu) -> None:
        def both(
            self: CPUAttentionImpl,
            layer: object,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            metadata: object,
            output: torch.Tensor,
            *rest: object,
        ) -> torch.Tensor:
            def run() -> None:
                forward(self, layer, query, key, value, kv_cache, metadata, output, *rest)  # type: ignore[arg-type]

            data = {f"kv-{kv_cache.data_ptr()}": 10_000_000}
            gpu.kernel("attention", 20e-6, 30e-6, data, run)
            return output

        monkeypatch.setattr(CPUAttentionImpl, "forward", both)

    return install


@pytest.mark.parametrize("timer", ["event", "graph", "cupti_span"])
def test_cold_and_hot_are_two_rows_and_the_host_a_third(
    timer: str, launching: Callable[[SimulatedGpu], None]
) -> None:
    gpu = SimulatedGpu()
    launching(gpu)
    rows = measured(gpu, timer, ("cold", "hot"))
    assert [row.status for row in rows[:2]] == [Status.OK, Status.OK], rows[0].reasons
    cold, hot = rows[:2]
    execution = "graph" if timer == "graph" else "eager"
    for row, l2_state, seconds in ((cold, "cold", 30e-6), (hot, "hot", 20e-6)):
        assert (row.metric, row.timer, row.execution) == (Metric.ATTENTION, timer, execution)
        assert row.l2_state == l2_state
        assert row.samples == pytest.approx([seconds] * len(row.samples), abs=2e-6)
        assert len(row.sm_clock_hz) == len(row.samples)
        assert row.timer_floor_s == 1e-6
    assert cold.reuse_distance_bytes is not None
    assert cold.reuse_distance_bytes >= 2 * gpu.l2_bytes
    assert hot.reuse_distance_bytes == 0
    by_metric = {row.metric: row for row in rows[2:]}
    for metric in (Metric.HOST, Metric.METADATA_BUILD):
        assert (by_metric[metric].timer, by_metric[metric].timer_floor_s) == ("wall", 1e-7)
    assert by_metric[Metric.METADATA_BUILD].execution == execution
    assert by_metric[Metric.HOST].execution == "eager"
    assert len({row.key for row in rows}) == len(rows)
    assert cold.checked[-1] == ("after_graph_replay" if timer == "graph" else "after")


def test_work_that_a_graph_does_not_hold_leaves_stale_output_and_gets_no_time() -> None:
    # CPU_ATTN as it is: it writes while it is captured and never again.
    rows = measured(SimulatedGpu(trace_missing="no CUPTI"), "graph")
    assert [row.status for row in rows] == [Status.INCORRECT]
    assert rows[0].reasons[0].startswith("after timing: not finite or not written")
    assert rows[0].samples == ()


def test_a_copy_that_comes_out_wrong_costs_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    forward = CPUAttentionImpl.forward
    caches: list[int] = []

    def only_the_first_is_right(self: CPUAttentionImpl, *args: torch.Tensor) -> torch.Tensor:
        kv_cache, output = args[4], args[6]
        if kv_cache.data_ptr() not in caches:
            caches.append(kv_cache.data_ptr())

        def run() -> None:
            forward(self, *args)  # type: ignore[arg-type]
            output.add_(0.5 * caches.index(kv_cache.data_ptr()))

        gpu.kernel("attention", 20e-6, 30e-6, {f"kv-{kv_cache.data_ptr()}": 10_000_000}, run)
        return output

    monkeypatch.setattr(CPUAttentionImpl, "forward", only_the_first_is_right)
    # One copy moves about 0.1 MB here: a small cache lets a few of them rotate.
    gpu.l2_bytes = 2 * attention_bytes(SMALL)
    row = measured(gpu, "graph")[0]
    assert len(caches) > 2
    assert row.status == Status.INCORRECT
    assert row.reasons[0].startswith("after timing: error")


def test_a_throttled_device_gives_a_throttled_row(
    launching: Callable[[SimulatedGpu], None],
) -> None:
    gpu = SimulatedGpu(clock_hz=lambda at_s: 1e9)
    launching(gpu)
    row = measured(gpu, "event")[0]
    assert row.status == Status.THROTTLED
    assert row.samples == ()
    assert row.discarded > 0
    assert "attnbench doctor" in row.reasons[0]


def test_an_administrators_clock_is_judged_by_itself(
    launching: Callable[[SimulatedGpu], None],
) -> None:
    gpu = SimulatedGpu(clock_hz=lambda at_s: 1e9)
    launching(gpu)
    assert measured(gpu, "event", rated_clock_hz=1e9)[0].status == Status.OK


def test_a_time_of_a_device_that_is_held_back_is_noisy(
    launching: Callable[[SimulatedGpu], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    launching(gpu)
    bits = iter([0.0, float(0x40)])  # NVML: nothing, then a thermal slowdown by hardware
    monkeypatch.setattr(point_room, "read_conditions", lambda *_: {"gpu_throttle_bits": next(bits)})
    row = measured(gpu, "event")[0]
    assert (row.status, row.throttle_reasons) == (Status.NOISY, ("hw_thermal_slowdown",))
    assert row.reasons == ("the device was held back while it was timed: hw_thermal_slowdown",)
    assert row.samples


def test_a_part_that_cannot_be_timed_is_untimed_and_no_failure(
    launching: Callable[[SimulatedGpu], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu()
    launching(gpu)
    write = CPUAttentionImpl.do_kv_cache_update

    def waiting(self: CPUAttentionImpl, *args: torch.Tensor) -> None:
        write(self, *args)  # type: ignore[arg-type]
        gpu.kernel("write", 10e-6)
        gpu.sync_call()

    monkeypatch.setattr(CPUAttentionImpl, "do_kv_cache_update", waiting)
    rows = {row.metric: row for row in measured(gpu, "event")}
    assert rows[Metric.ATTENTION].status == Status.OK
    assert rows[Metric.KV_CACHE_WRITE].status == Status.UNTIMED
    assert "waits for the device" in rows[Metric.KV_CACHE_WRITE].reasons[0]


def test_a_timer_that_cannot_time_the_call_is_not_replaced() -> None:
    row = measured(SimulatedGpu(), "cupti_span")[0]  # CPU_ATTN launches nothing
    assert (row.status, row.timer) == (Status.UNTIMED, "cupti_span")
    assert "use --timer wall" in row.reasons[0]


def test_a_timer_that_fails_in_one_state_of_the_cache_leaves_the_other_alone(
    launching: Callable[[SimulatedGpu], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimulatedGpu(l2_bytes=2 * attention_bytes(SMALL))  # small enough for a rotation
    launching(gpu)
    trace = SimulatedGpu.trace
    traces: list[int] = []

    @contextmanager
    def lossy(self: SimulatedGpu) -> Iterator[list[KernelRecord]]:
        with trace(self) as records:
            yield records
        traces.append(len(records))
        if len(traces) == 2:  # that of the first graph
            records.pop()

    monkeypatch.setattr(SimulatedGpu, "trace", lossy)
    cold, hot = measured(gpu, "graph", ("cold", "hot"))[:2]
    assert (cold.status, cold.l2_state) == (Status.UNTIMED, "cold")
    assert (hot.status, hot.l2_state) == (Status.OK, "hot"), hot.reasons


@pytest.mark.parametrize(("workload", "backend"), [(SMALL, "CPU_ATTN"), (MLA, "TORCH_MLA")])
def test_a_twin_computes_the_same_and_shares_nothing(workload: Workload, backend: str) -> None:
    from attnbench.backends.batch import make_batch
    from attnbench.backends.registry import get_backend_class

    threshold = get_backend_class(backend).get_builder_cls().reorder_batch_threshold
    with torch.no_grad():
        batch = make_batch(workload, "cpu", threshold)
        batch.layer = copy.deepcopy(
            batch.layer
        )  # weights are everybody's, and are overwritten here
        point = prepare(PlannedPoint(workload, backend), batch)
        point.attend()
        right = point.output().clone()
        twin = point.twin()
        point.poison()
        point.kv_cache.fill_(float("nan"))
        point.batch.query.fill_(float("nan"))
        point.batch.metadata.block_table_tensor.zero_()
        for tensor in vars(point.batch.layer).values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(float("nan"))
        twin.poison()
        twin.attend()
        assert torch.equal(twin.output(), right)
        copied = _storage_bytes(twin) - _storage_bytes(twin, of=_tensors(point))
    assert copied == pytest.approx(twin.twin_bytes, rel=0.1)


def _tensors(value: object, depth: int = 4) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    members = getattr(value, "__dict__", None)
    if members is None or depth == 0:
        return []
    return [t for member in members.values() for t in _tensors(member, depth - 1)]


def _storage_bytes(point: object, of: list[torch.Tensor] | None = None) -> int:
    """Bytes of all memory behind the tensors of `point`; only what is shared with `of`."""
    mine = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(point)}
    if of is None:
        return sum(mine.values())
    theirs = {t.untyped_storage().data_ptr() for t in of}
    return sum(size for at, size in mine.items() if at in theirs)
