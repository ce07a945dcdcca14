"""On hardware: promised kernel names are the real ones, and all backends are right."""

from __future__ import annotations

import pytest
import torch

from attnbench.backends.registry import get_backend_class
from attnbench.measure.environment import read_environment
from attnbench.measure.gpu.timers import GpuTimer
from attnbench.measure.options import MeasureOptions
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.point import PointContext, measure_point
from attnbench.measure.truth import TruthCache
from attnbench.measure.verify import Verifier, plan_verification
from attnbench.selection import current_device
from attnbench.store.record import Status
from attnbench.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]

WORKLOADS = [
    "8q1s1k",
    "2q512_8q1s1k",
    "8q1s1k block=256",
    "8q1s1k block=64 shape=deepseek-v3",
    "q300_8q1s1k block=64 shape=deepseek-v2-lite",
]


@pytest.mark.parametrize("text", WORKLOADS)
def test_variants_launch_what_they_promise(text: str) -> None:
    """Fails with the real names where a pattern is wrong: put those in its place."""
    device = current_device()
    timer = GpuTimer("cupti_span", ("hot",))
    if timer.gpu.trace_missing:
        pytest.skip(timer.gpu.trace_missing)
    context = PointContext(
        run_id="20261121T000000Z-000000",
        replicate=0,
        device=device,
        environment=read_environment(device),
        options=MeasureOptions(timer="cupti_span", l2_states=("hot",), budget_s=0.1),
        timer=timer,
        timer_floor_s=1e-6,
        host_floor_s=1e-7,
        truths=TruthCache(),
    )
    workload = Workload.parse(text)
    wrong, judged = [], 0
    for planned in plan_verification(workload, [], device):
        if not get_backend_class(planned.backend).kernel_patterns(planned.variant, device):
            continue
        row = measure_point(PlannedPoint(workload, planned.backend, planned.variant), context)[0]
        judged += bool(row.kernel_names)
        if any("promises" in reason for reason in row.reasons):
            wrong.append(row.reasons)
    assert not wrong
    if not judged:
        pytest.skip("no backend that promises kernels could be run here")


@pytest.mark.parametrize("text", WORKLOADS)
def test_no_backend_is_wrong(text: str) -> None:
    device = current_device()
    with Verifier(device, timeout_s=300.0) as verifier:
        found = verifier.verify(plan_verification(Workload.parse(text), [], device), steps=8)
    if not found.ran:
        pytest.skip("no backend takes it here")
    failed = {f.name: f.outcome.reasons for f in found.findings if f.outcome.has_failed}
    assert not failed
    assert all(f.outcome.status in (Status.OK, Status.UNSUPPORTED) for f in found.findings)
