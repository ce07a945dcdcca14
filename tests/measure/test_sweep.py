"""A sweep survives what its points do, and a resumed one goes on where the last stopped."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.backends.device import Device
from attnbench.errors import DataError, UsageError
from attnbench.measure import MeasureOptions, PlannedPoint, run_sweep
from attnbench.measure.environment import read_environment
from attnbench.measure.header import check_same_environment, new_header, read_header
from attnbench.store import ResultsFolder, Run
from attnbench.store.record import Measurement
from attnbench.workload import Workload

CPU = Device("cpu")
ENVIRONMENT = read_environment(CPU)
SMALL = Workload.parse("3q1s40 heads=4/2 head_size=32 dtype=fp32")
OTHER = Workload.parse("2q1s40 heads=4/2 head_size=32 dtype=fp32")


def statuses(folder: ResultsFolder) -> dict[tuple[str, int], str]:
    table = folder.table(columns=["backend", "replicate", "metric", "status"])
    return {
        (row["backend"], row["replicate"]): row["status"]
        for row in table.to_pylist()
        if row["metric"] == "attention"
    }


@pytest.mark.slow
@pytest.mark.usefixtures("misbehaving")
def test_a_crash_and_a_hang_cost_one_point_each(tmp_path: Path) -> None:
    plan = [
        PlannedPoint(SMALL, "RIGHT"),
        PlannedPoint(SMALL, "ABORTING"),
        PlannedPoint(SMALL, "HANGING"),
        PlannedPoint(OTHER, "RIGHT"),
    ]
    options = MeasureOptions(timer="wall", budget_s=0.01, timeout_s=6.0)
    folder = ResultsFolder(tmp_path / "results")
    with folder.open_run(new_header(plan, options, ENVIRONMENT)) as run:
        outcome = run_sweep(plan, run, options, CPU, ENVIRONMENT)
        run.seal()
    assert outcome.counts["CRASH"] == outcome.counts["TIMEOUT"] == 1
    assert outcome.counts["OK"] + outcome.counts["NOISY"] == 2
    table = folder.table(columns=["backend", "status", "reasons", "metric"])
    reasons = {row["backend"]: row["reasons"][0] for row in table.to_pylist() if row["reasons"]}
    assert "SIGABRT" in reasons["ABORTING"]
    assert "6 s" in reasons["HANGING"]


def test_replicates_are_rows_of_their_own_and_a_resume_adds_only_what_is_missing(
    tmp_path: Path,
) -> None:
    options = MeasureOptions(timer="fake", replicates=2)
    plan = [PlannedPoint(SMALL, "CPU_ATTN"), PlannedPoint(SMALL, "TORCH_SDPA")]
    header = new_header(plan, options, ENVIRONMENT)
    assert read_header(header) == (plan, options)
    folder = ResultsFolder(tmp_path / "results")
    with folder.open_run(header) as run:
        run_sweep(plan[:1], run, MeasureOptions(timer="fake"), CPU, ENVIRONMENT)
        run.seal()
    assert set(statuses(folder)) == {("CPU_ATTN", 0)}
    before = folder.table().num_rows

    stored = folder.header("last")
    assert stored.run_id == header.run_id
    again, stored_options = read_header(stored)
    with folder.open_run(stored, resume=True) as run:
        outcome = run_sweep(again, run, stored_options, CPU, ENVIRONMENT)
        run.seal()
    assert outcome.skipped == 1
    assert outcome.measured == 3
    assert set(statuses(folder)) == {
        (name, r) for name in ("CPU_ATTN", "TORCH_SDPA") for r in (0, 1)
    }
    assert folder.table().num_rows > before
    keys = folder.table(columns=["point_id", "metric", "replicate"]).to_pylist()
    assert len({tuple(row.values()) for row in keys}) == len(keys)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path) -> None:
    driver = Path(__file__).parent / "kill_driver.py"
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path / "results"), "50", "7"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(word.split("=") for word in done.stdout.split())
    assert found["kills"] == "50"
    assert int(found["midway"]) >= 10  # the others fell before the first point or after the last


def test_a_run_is_not_gone_on_with_on_another_stack_commit_or_machine() -> None:
    options = MeasureOptions(timer="fake")
    header = new_header([PlannedPoint(SMALL, "CPU_ATTN")], options, ENVIRONMENT)
    check_same_environment(header, ENVIRONMENT)
    others = {
        "device_class": replace(ENVIRONMENT, device_class="other"),
        "stack_id": replace(ENVIRONMENT, stack_id="other"),
        "driver_version": replace(ENVIRONMENT, driver_version="other"),
        "cuda_version": replace(ENVIRONMENT, cuda_version="other"),
        "container_digest": replace(ENVIRONMENT, container_digest="other"),
        "commit": replace(ENVIRONMENT, commit="other"),
    }
    for name, other in others.items():
        with pytest.raises(UsageError, match=f"its {name} is .*other now"):
            check_same_environment(header, other)


def test_a_run_of_other_options_says_that_it_cannot_be_resumed() -> None:
    header = new_header([PlannedPoint(SMALL, "CPU_ATTN")], MeasureOptions(), ENVIRONMENT)
    header = replace(header, options={**header.options, "flux": 1})
    with pytest.raises(DataError, match="another version of attnbench, with flux"):
        read_header(header)


def test_the_backends_of_a_workload_take_turns_in_another_order_each_round(tmp_path: Path) -> None:
    options = MeasureOptions(timer="fake", replicates=12)
    plan = [
        PlannedPoint(workload, backend)
        for workload in (SMALL, OTHER)
        for backend in ("CPU_ATTN", "TORCH_SDPA")
    ]
    measured: list[tuple[int, str, str]] = []
    with ResultsFolder(tmp_path / "results").open_run(
        new_header(plan, options, ENVIRONMENT)
    ) as run:
        run_sweep(
            plan,
            run,
            options,
            CPU,
            ENVIRONMENT,
            lambda rows, done, total: measured.append(
                (rows[0].replicate, rows[0].workload, rows[0].backend)
            ),
        )
    assert [r for r, _, _ in measured] == [r for r in range(12) for _ in plan]
    assert [w for _, w, _ in measured] == [p.workload.text for p in plan] * 12
    # The same order in all 24 turns by chance: 1 in 8 million.
    assert {backend for _, _, backend in measured[::2]} == {"CPU_ATTN", "TORCH_SDPA"}


def test_a_stop_between_two_rows_of_a_point_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = MeasureOptions(timer="fake")
    plan = [PlannedPoint(SMALL, "CPU_ATTN")]

    def metrics(stop_after: int) -> list[str]:
        """Of a run stopped after so many rows and resumed."""
        folder = ResultsFolder(tmp_path / f"{stop_after}")
        header = new_header(plan, options, ENVIRONMENT)

        def append(run: Run, row: Measurement) -> None:
            if len(run.done) == stop_after:
                raise KeyboardInterrupt
            whole(run, row)

        with monkeypatch.context() as patch:
            whole = Run.append
            patch.setattr(Run, "append", append)
            with suppress(KeyboardInterrupt), folder.open_run(header) as run:
                run_sweep(plan, run, options, CPU, ENVIRONMENT)
        with folder.open_run(header, resume=True) as run:
            run_sweep(plan, run, options, CPU, ENVIRONMENT)
        return sorted(folder.table(columns=["metric"])["metric"].to_pylist())

    expected = metrics(stop_after=99)
    assert len(expected) > 2
    for stop_after in range(len(expected) + 1):
        assert metrics(stop_after) == expected
