"""Kernels are compiled once, before anything is timed, by other processes than those that time."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.backends.device import Device, cuda_device
from attnbench.backends.registry import get_backend_class
from attnbench.measure import MeasureOptions, PlannedPoint, SweepOutcome, run_sweep
from attnbench.measure.compile_ahead import _sources, kernels
from attnbench.measure.header import new_header
from attnbench.measure.sweep import Isolation
from attnbench.store import ResultsFolder
from attnbench.workload import Workload
from tests.measure.faults import CPU, ENVIRONMENT, attention_rows, faulty, isolation

__all__ = ("faulty", "isolation")  # fixtures

TINY = "heads=4/2 head_size=32"
SMALL = Workload.parse(f"2q1s40 {TINY} dtype=fp32")
LARGE = Workload.parse(f"4q1s90 {TINY} dtype=fp32")
OTHER = Workload.parse(f"2q1s40 {TINY} dtype=bf16")
THIRD = Workload.parse(f"2q1s40 {TINY} dtype=fp16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty compilers' cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.usefixtures("faulty")
def test_a_kernel_is_compiled_with_the_smallest_point_that_runs_it() -> None:
    plan = [
        PlannedPoint(LARGE, "COMPILED"),
        PlannedPoint(SMALL, "COMPILED"),
        PlannedPoint(OTHER, "COMPILED"),
        PlannedPoint(SMALL, "FINE"),
        PlannedPoint(SMALL, "TRITON_ATTN"),  # interpreted here
        PlannedPoint(Workload.parse(f"q40 {TINY} dtype=fp32 attn=encoder"), "FLEX_ATTENTION"),
    ]
    assert {point.workload for point in kernels(plan, CPU).values()} == {SMALL, OTHER}
    assert len(kernels(plan, CPU)) == 2


def test_flex_points_share_a_kernel_where_nothing_static_differs() -> None:
    def key(text: str, device: Device = CPU) -> str:
        workload = Workload.parse(text)
        return get_backend_class("FLEX_ATTENTION").compilation_key(workload, "", device)

    assert key("1q1s512") == key("4q1s1k")
    others = ["1q1s512", "4q4s1k", "1q1s512 window=64", "1q1s512 block=32", "1q1s512 dtype=fp16"]
    # The last needs larger tables, whose size is compiled in.
    keys = {key(text) for text in [*others, "1q1s512 tp=8", "64q1s2k"]}
    assert len(keys) == 7


def test_triton_compiles_on_a_gpu_only() -> None:
    plan = [PlannedPoint(SMALL, "TRITON_ATTN")]
    assert kernels(plan, CPU) == {}
    key = get_backend_class("TRITON_ATTN").compilation_key(SMALL, "", cuda_device(9, 0))
    assert key != get_backend_class("TRITON_ATTN").compilation_key(OTHER, "", cuda_device(9, 0))


def test_compiling_comes_first_in_other_processes_and_is_remembered(
    tmp_path: Path, isolation: Isolation, faulty: Path
) -> None:
    plan = [
        PlannedPoint(SMALL, "COMPILED_WRONG"),
        PlannedPoint(LARGE, "COMPILED"),
        PlannedPoint(SMALL, "COMPILED"),
        PlannedPoint(OTHER, "COMPILED"),
        PlannedPoint(THIRD, "COMPILED"),
    ]
    options = MeasureOptions(timer="wall", budget_s=0.005, timeout_s=20)
    lines: list[str] = []

    def sweep(name: str) -> SweepOutcome:
        (faulty / "calls").unlink(missing_ok=True)
        lines.clear()
        with ResultsFolder(tmp_path / name).open_run(new_header(plan, options, ENVIRONMENT)) as run:
            return run_sweep(
                plan, run, options, CPU, ENVIRONMENT, tell=lines.append, isolation=isolation
            )

    def pids() -> list[str]:
        return list(dict.fromkeys((faulty / "calls").read_text().split()))

    outcome = sweep("first")
    representatives = {point.point_id for point in plan[2:]}
    assert set(outcome.compiled.seconds) == representatives
    assert outcome.compiled.failed == 1
    assert 0 < outcome.compiled.duration_s < outcome.duration_s
    assert lines[0].startswith("compiling 4 kernels in ")
    assert sum("COMPILED_WRONG" in line and "worker exited with 5" in line for line in lines) == 1
    calls = (faulty / "calls").read_text().split()
    compilers, measurer = set(calls[:3]), calls[3]
    assert measurer not in compilers
    assert set(calls[3:]) == {measurer}
    rows = attention_rows(ResultsFolder(tmp_path / "first"))
    assert rows["COMPILED_WRONG", SMALL.text, 0]["status"] == "CRASH"
    stored = {
        row["point_id"]: dict(row["conditions_before"]).get("compile_ahead_s")
        for row in rows.values()
        if row["backend"] == "COMPILED"
    }
    assert stored == {**outcome.compiled.seconds, plan[1].point_id: None}

    # The disk has them now; the one that never compiles is left to its point.
    outcome = sweep("second")
    assert (outcome.compiled.seconds, outcome.compiled.duration_s, lines) == ({}, 0.0, [])
    assert len(pids()) == 1

    # Other sources make other kernels.
    source = faulty / "faulty_backends.py"
    source.write_text(source.read_text() + "\n# edited\n")
    _sources.cache_clear()
    assert set(sweep("third").compiled.seconds) == representatives
