"""What the tests of faults share: the faulty backends, small workloads, what is stored."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.backends.device import Device
from attnbench.measure import MeasureOptions, PlannedPoint, SweepOutcome, run_sweep
from attnbench.measure.environment import read_environment
from attnbench.measure.header import new_header
from attnbench.measure.sweep import Isolation
from attnbench.measure.timers import FakeTimer, Subject
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.store.record import Metric
from attnbench.workload import Workload
from tests.measure.conftest import installed
from tests.measure.faulty_backends import NAMES

CPU = Device("cpu")
ENVIRONMENT = read_environment(CPU)
FAKE = MeasureOptions(timer="fake", timeout_s=4.0)


def workload(number: int) -> Workload:
    """Small workloads that differ."""
    return Workload.parse(f"3q1s{40 + number} heads=4/2 head_size=32 dtype=fp32")


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Registers the faulty backends; gives the folder where they leave their files."""
    source = (Path(__file__).parent / "faulty_backends.py").read_text(encoding="utf-8")
    site = tmp_path / "site"
    for _ in installed("faulty", source, NAMES, site, monkeypatch):
        yield site


@pytest.fixture
def isolation(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    """Real workers that start in milliseconds, and ask the faulty backends for their health."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # idle threads of a pool spin on a busy machine
    multiprocessing.set_forkserver_preload(
        ["attnbench.measure.point", "attnbench.measure.executor", "attnbench.backends.cpu_attn"]
    )
    from faulty_backends import poison_health  # type: ignore[import-not-found]

    assert faulty == sys.modules["faulty_backends"].FOLDER
    return Isolation(poison_health, always=True, start_method="forkserver")


def sweep(
    plan: Sequence[PlannedPoint],
    folder: ResultsFolder,
    isolation: Isolation,
    options: MeasureOptions = FAKE,
    header: RunHeader | None = None,
) -> SweepOutcome:
    """Measure `plan` into a new run, or into the run of `header` that was stopped."""
    resume = header is not None
    header = header or new_header(plan, options, ENVIRONMENT)
    with folder.open_run(header, resume=resume) as run:
        return run_sweep(plan, run, options, CPU, ENVIRONMENT, isolation=isolation)


def attention_rows(folder: ResultsFolder) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(backend, workload, replicate) -> its row of metric `attention`; each must be there once."""
    rows = folder.table(where={"metric": "attention"}).to_pylist()
    found = {(row["backend"], row["workload"], row["replicate"]): row for row in rows}
    assert len(found) == len(rows), "a row is stored twice"
    return found


def assert_not_mistimed(row: dict[str, Any]) -> None:
    """The row has exactly the fake timer's samples for its point and replicate."""
    found = Workload.parse(row["workload"])
    subject = Subject(found, row["backend"], Metric.ATTENTION, row["replicate"])
    exact = FakeTimer().seconds(subject)
    assert sorted(row["samples"]) == sorted(exact * (1.0 + s) for s in FakeTimer._SPREAD)
