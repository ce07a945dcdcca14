"""The same faults where a real device makes them: out of bounds, without end, out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnbench.measure import MeasureOptions, PlannedPoint, run_sweep
from attnbench.measure.environment import read_environment
from attnbench.measure.header import new_header
from attnbench.selection import current_device
from attnbench.store import ResultsFolder
from attnbench.workload import Workload
from tests.measure.conftest import installed
from tests.measure.faults import attention_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SOURCE = '''
"""Backends that break a GPU, on top of torch's attention."""
import torch
import triton
import triton.language as tl

from attnbench.backends.torch_sdpa import TorchSDPABackend, TorchSDPAImpl


@triton.jit
def write_far_away(x_ptr, distance):
    tl.store(x_ptr + distance + tl.program_id(0).to(tl.int64) * 4096, 1.0)


@triton.jit
def never_ends(flag_ptr):
    while tl.load(flag_ptr, volatile=True) == 0:
        pass


def illegal(query):
    write_far_away[(4096,)](query, 1 << 42)


def endless(query):
    never_ends[(1,)](torch.zeros(1, dtype=torch.int32, device=query.device))


def hungry(query):
    torch.empty(1 << 42, dtype=torch.uint8, device=query.device)


def backend(name, before):
    def forward(self, layer, query, *args, **kwargs):
        if before is not None:
            before(query)
        return TorchSDPAImpl.forward(self, layer, query, *args, **kwargs)

    impl = type(name + "Impl", (TorchSDPAImpl,), {"forward": forward})
    members = {
        "get_name": staticmethod(lambda: name),
        "get_impl_cls": staticmethod(lambda: impl),
        "__module__": __name__,
    }
    return type(name, (TorchSDPABackend,), members)


Fine = backend("GPU_FINE", None)
Illegal = backend("GPU_ILLEGAL", illegal)
Endless = backend("GPU_ENDLESS", endless)
Hungry = backend("GPU_HUNGRY", hungry)
'''
NAMES = {
    "GPU_FINE": "Fine",
    "GPU_ILLEGAL": "Illegal",
    "GPU_ENDLESS": "Endless",
    "GPU_HUNGRY": "Hungry",
}
EXPECTED = {
    "GPU_ILLEGAL": ("ERROR", "illegal memory access"),
    "GPU_ENDLESS": ("TIMEOUT", "killed after"),
    "GPU_HUNGRY": ("OOM", "out of memory"),
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from installed("gpu_faults", SOURCE, NAMES, tmp_path / "site", monkeypatch)


@pytest.mark.usefixtures("broken")
def test_what_a_kernel_does_to_the_device_costs_its_own_point_only(tmp_path: Path) -> None:
    device = current_device()
    environment = read_environment(device)
    plan = []
    for number, name in enumerate(EXPECTED):
        plan.append(PlannedPoint(Workload.parse("3q1s40"), name))
        plan.append(PlannedPoint(Workload.parse(f"3q1s{50 + number}"), "GPU_FINE"))
    options = MeasureOptions(timer="event", budget_s=0.02, timeout_s=20.0)
    folder = ResultsFolder(tmp_path / "results")
    with folder.open_run(new_header(plan, options, environment)) as run:
        run_sweep(plan, run, options, device, environment)
    rows = attention_rows(folder)
    assert len(rows) == len(plan)
    for (name, _, _), row in rows.items():
        if name == "GPU_FINE":
            assert row["status"] in ("OK", "NOISY"), row["reasons"]
            assert not any(reason.startswith("first try") for reason in row["reasons"])
        else:
            status, reason = EXPECTED[name]
            assert row["status"] == status, row["reasons"]
            assert all(reason in tried for tried in row["reasons"])
            assert row["reasons"][1].startswith("first try")
