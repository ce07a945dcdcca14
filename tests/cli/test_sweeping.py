"""A sweep holds its device while its ceilings and its points are measured, and lets it go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.backends.device import Device
from attnbench.cli.sweeping import Sweep
from attnbench.errors import InfrastructureError
from attnbench.measure import MeasureOptions, PlannedPoint
from attnbench.measure.device_lock import device_lock
from attnbench.store import ResultsFolder
from attnbench.store.ceilings import Ceilings
from attnbench.workload import Workload

PLAN = [PlannedPoint(Workload.parse("3q1s40 heads=4/2 head_size=32 dtype=fp32"), "CPU_ATTN")]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = MeasureOptions(timer="event", locked_clock_hz=1.5e9)
    planned = Sweep.planned(ResultsFolder(tmp_path / "results"), PLAN, options, Device("cpu"))
    return replace(planned, environment=replace(planned.environment, device_uuid="GPU-1"))


def test_ceilings_are_measured_with_clocks_locked_and_the_device_held(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    @contextmanager
    def locked_clocks(uuid: str, hz: float) -> Iterator[float]:
        did.append(f"lock {uuid} {hz:g}")
        yield 1.455e9
        did.append("unlock")

    def ceilings_of_run(*_: object) -> tuple[Ceilings, str]:
        with pytest.raises(InfrastructureError), device_lock("GPU-1"):
            pass
        did.append("ceilings")
        return Ceilings(copy_bytes_per_s=1e9, read_bytes_per_s=1e9, matmul_flops_per_s={}), ""

    monkeypatch.setattr("attnbench.measure.gpu.locked_clocks.locked_clocks", locked_clocks)
    monkeypatch.setattr("attnbench.measure.ceilings.ceilings_of_run", ceilings_of_run)
    with sweep.held() as held:
        assert did == ["lock GPU-1 1.5e+09", "ceilings"]
        assert held.options.locked_clock_hz == 1.455e9
        assert held.header.ceilings is not None
    assert did[-1] == "unlock"
    with device_lock("GPU-1"), pytest.raises(InfrastructureError, match="another attnbench"):
        sweep.held().__enter__()
    assert not sweep.folder.path.exists()  # and no run was begun
