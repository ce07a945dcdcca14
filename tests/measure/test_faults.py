"""Whatever a point does to its process, it ends in one row and costs no other point anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.backends.device import Device
from attnbench.errors import InfrastructureError
from attnbench.measure import MeasureOptions, PlannedPoint
from attnbench.measure import worker as worker_module
from attnbench.measure.executor import WorkerExecutor
from attnbench.measure.sweep import Isolation
from attnbench.measure.worker import (
    Task,
    WorkerLostError,
    WorkerProcess,
    WorkerSetup,
    oom_kills,
    see_one_device,
)
from attnbench.store import ResultsFolder
from attnbench.store.record import Status
from tests.measure.faults import (
    CPU,
    ENVIRONMENT,
    FAKE,
    assert_not_mistimed,
    attention_rows,
    faulty,
    isolation,
    sweep,
    workload,
)

__all__ = ("faulty", "isolation")  # fixtures

#: Backend -> its status, and what its reason must say.
FAULTS = {
    "LOOPING": ("TIMEOUT", "killed after 4 s of running"),
    "EXITING": ("CRASH", "worker exited with 0"),
    "SEGFAULTING": ("CRASH", "worker killed by SIGSEGV"),
    "LEAVING_A_CHILD": ("CRASH", "worker exited with 3"),
    "ILLEGAL": ("ERROR", "illegal memory access"),
    "DAMAGING": ("ERROR", "ValueError: something else"),
    "HOST_OOM": ("OOM", "MemoryError"),
    "DEVICE_OOM": ("OOM", "CUDA out of memory"),
    "BAD_BUILD": ("ERROR", "ValueError: cannot plan this batch"),
}
WRONG = {"NAN": "", "UNWRITTEN": "", "LATER_WRONG": "after timing"}


def test_every_fault_costs_its_own_point_only(tmp_path: Path, isolation: Isolation) -> None:
    plan = [PlannedPoint(workload(0), "FINE")]
    for number, name in enumerate([*FAULTS, *WRONG], start=1):
        plan += [PlannedPoint(workload(0), name), PlannedPoint(workload(number), "FINE")]
    folder = ResultsFolder(tmp_path / "results")
    options = MeasureOptions(timer="fake", timeout_s=4.0, replicates=2)
    started = time.perf_counter()
    outcome = sweep(plan, folder, isolation, options)
    spent_s = time.perf_counter() - started
    rows = attention_rows(folder)
    assert set(rows) == {(p.backend, p.workload.text, r) for p in plan for r in (0, 1)}
    for (name, _, replicate), row in rows.items():
        if name == "FINE":
            assert row["status"] == "OK", row["reasons"]
            assert row["reasons"] == [], "a neighbour's fault reached it"
            assert_not_mistimed(row)
        elif name in WRONG:
            assert row["status"] == "INCORRECT"
            assert row["samples"] == []
            assert WRONG[name] in row["reasons"][0]
        else:
            status, reason = FAULTS[name]
            assert row["status"] == status, (name, row["reasons"])
            assert row["samples"] == []
            last, first = row["reasons"]
            assert reason in last
            assert first.startswith(f"first try: {status}: ")
            assert reason in first
            assert last.startswith("quarantined: ") == (replicate == 1)
    assert {point.backend for point in outcome.quarantined} == set(FAULTS)
    # A child that holds the pipe open must not make a death look like a hang.
    assert rows["LEAVING_A_CHILD", workload(0).text, 0]["duration_s"] < options.timeout_s
    assert spent_s < 60


def test_a_point_that_fails_once_is_measured_and_says_so(
    tmp_path: Path, isolation: Isolation
) -> None:
    folder = ResultsFolder(tmp_path / "results")
    outcome = sweep([PlannedPoint(workload(0), "DYING_ONCE")], folder, isolation)
    (row,) = attention_rows(folder).values()
    assert row["status"] == "OK"
    assert row["reasons"] == ["first try: CRASH: worker exited with 7"]
    assert_not_mistimed(row)
    assert outcome.quarantined == ()


def test_what_a_backend_always_does_is_not_tried_twice_for_ever(
    tmp_path: Path, isolation: Isolation, faulty: Path
) -> None:
    plan = [PlannedPoint(workload(n), "BAD_BUILD") for n in range(5)]
    plan.append(PlannedPoint(workload(0), "NOT_MADE"))
    folder = ResultsFolder(tmp_path / "results")
    sweep(plan, folder, isolation)
    rows = list(attention_rows(folder).values())
    assert {row["status"] for row in rows} == {"ERROR"}
    second = Counter(row["reasons"][-1].partition(":")[0] for row in rows)
    assert second == {"first try": 3, "no second try": 2, "NotImplementedError": 1}
    # A worker for the first tries and one for each second try. An error that leaves the device
    # healthy keeps its worker: the health check was asked, and answered there.
    asked = (faulty / "health_checks").read_text().split()
    assert len(set(asked)) == 1 + 3
    assert len(asked) == 4 + 6


def test_a_device_that_stays_sick_stops_the_sweep_and_the_rest_is_resumed(
    tmp_path: Path, isolation: Isolation, faulty: Path
) -> None:
    plan = [
        PlannedPoint(workload(0), "FINE"),
        PlannedPoint(workload(1), "DEVICE_KILLER"),
        PlannedPoint(workload(2), "FINE"),
    ]
    folder = ResultsFolder(tmp_path / "results")
    with pytest.raises(InfrastructureError, match=r"device is lost.*go on with --resume") as error:
        sweep(plan, folder, isolation)
    assert error.value.exit_code == 4
    rows = attention_rows(folder)
    assert {key[0]: row["status"] for key, row in rows.items()} == {
        "FINE": "OK",
        "DEVICE_KILLER": "CRASH",
    }
    assert len(rows) == 2
    killer = rows["DEVICE_KILLER", workload(1).text, 0]
    assert killer["reasons"] == ["worker exited with 9", "no second try: the machine failed"]

    # Still lost: nothing is measured, and no row says otherwise.
    header = folder.header("last")
    with pytest.raises(InfrastructureError, match="device is lost"):
        sweep(plan, folder, isolation, header=header)
    assert attention_rows(folder) == rows

    (faulty / "device_is_lost").unlink()
    outcome = sweep(plan, folder, isolation, header=header)
    assert (outcome.skipped, outcome.measured) == (2, 1)
    assert set(attention_rows(folder)) == {(p.backend, p.workload.text, 0) for p in plan}


def test_a_device_that_is_lost_by_the_last_point_is_no_success(
    tmp_path: Path, isolation: Isolation
) -> None:
    folder = ResultsFolder(tmp_path / "results")
    with pytest.raises(InfrastructureError, match="device is lost"):
        sweep([PlannedPoint(workload(0), "DEVICE_KILLER")], folder, isolation)
    (row,) = attention_rows(folder).values()
    assert row["status"] == "CRASH"


def _setup(isolation: Isolation) -> WorkerSetup:
    return WorkerSetup(
        run_id="20261121T000000Z-000000",
        replicate=0,
        device=CPU,
        environment=ENVIRONMENT,
        options=FAKE,
        health=isolation.health,
        start_method=isolation.start_method,
    )


@pytest.fixture
def started(isolation: Isolation) -> WorkerProcess:
    process = WorkerProcess(_setup(isolation))
    assert process.receive(60, "starting") == ""
    return process


def test_a_death_is_seen_while_a_child_of_the_worker_holds_the_pipe_open(
    isolation: Isolation,
) -> None:
    # A spawned worker shares every descriptor of it with what it forks.
    process = WorkerProcess(_setup(replace(isolation, start_method="spawn")))
    assert process.receive(120, "starting") == ""
    process.send(Task.MEASURE, PlannedPoint(workload(0), "LEAVING_A_CHILD"))
    with pytest.raises(WorkerLostError, match="worker exited with 3"):
        _receive_all(process)


def test_a_ctrl_c_while_a_worker_starts_is_for_its_parent_alone(isolation: Isolation) -> None:
    """A terminal sends it to both; the worker is not yet a session of its own."""
    process = WorkerProcess(_setup(replace(isolation, start_method="spawn")))
    pid = process._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    assert process.receive(120, "starting") == ""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process.kill()


def _receive_all(process: WorkerProcess) -> None:
    while True:
        process.receive(10, "running")


def test_a_worker_killed_for_want_of_memory_is_out_of_memory(
    started: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = started._process.pid
    assert pid is not None
    started.send(Task.MEASURE, PlannedPoint(workload(0), "LOOPING"))
    monkeypatch.setattr(worker_module, "oom_kills", lambda: oom_kills() + 1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="out of memory") as lost:
        _receive_all(started)
    assert lost.value.status is Status.OOM


def test_killing_takes_the_children_of_a_worker_along(started: WorkerProcess, faulty: Path) -> None:
    started.send(Task.MEASURE, PlannedPoint(workload(0), "LEAVING_A_CHILD"))
    with pytest.raises(WorkerLostError):
        _receive_all(started)
    child = Path("/proc") / (faulty / "child").read_text() / "stat"
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a child of the worker lives on")


def test_a_worker_that_ran_out_of_memory_measures_nothing_more(
    tmp_path: Path, isolation: Isolation, faulty: Path
) -> None:
    plan = [PlannedPoint(workload(0), "DEVICE_OOM"), PlannedPoint(workload(1), "FINE")]
    sweep(plan, ResultsFolder(tmp_path / "results"), isolation)
    workers = (faulty / "health_checks").read_text().split()
    assert len(set(workers)) == 3  # one for each try, and one for FINE


@pytest.mark.parametrize(("execution", "looks"), [("graph", 1), ("eager", 0)])
def test_a_graph_that_was_not_captured_makes_the_worker_prove_itself(
    isolation: Isolation, faulty: Path, execution: str, looks: int
) -> None:
    with WorkerExecutor(_setup(isolation)) as executor:
        planned = PlannedPoint(workload(0), "FINE")
        executor.measure(planned)
        row = executor.row(planned, Status.UNTIMED, "the call cannot be captured in a graph")
        executor.look_after([replace(row, execution=execution)])
    assert len((faulty / "health_checks").read_text().split()) == 1 + looks


def test_the_counter_of_memory_kills_is_read_from_its_line(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\noom_kill_total 9\n")
    assert oom_kills(tmp_path / "vmstat") == 3
    assert oom_kills(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("kind", "name", "visible", "seen"),
    [
        ("cuda", "CUDA_VISIBLE_DEVICES", None, "0"),
        ("cuda", "CUDA_VISIBLE_DEVICES", "3,1", "3"),
        ("cuda", "CUDA_VISIBLE_DEVICES", "GPU-8f2a,GPU-77", "GPU-8f2a"),
        ("rocm", "HIP_VISIBLE_DEVICES", "2,0", "2"),
        ("cpu", "CUDA_VISIBLE_DEVICES", None, None),
    ],
)
def test_a_worker_sees_the_first_device_the_user_lets_us_see(
    kind: str,
    name: str,
    visible: str | None,
    seen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, "to be restored")
    if visible is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, visible)
    see_one_device(Device(kind))
    assert os.environ.get(name) == seen


@pytest.mark.slow
def test_200_kills_of_the_worker_lose_double_and_mistime_nothing(tmp_path: Path) -> None:
    driver = Path(__file__).parent / "worker_kill_driver.py"
    done = subprocess.run(
        [sys.executable, "-m", "tests.measure.worker_kill_driver", str(tmp_path), "200", "11"],
        cwd=driver.parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(word.split("=") for word in done.stdout.split())
    assert int(found["kills"]) >= 200
    assert int(found["second_tries"]) > 20  # kills met points in flight
