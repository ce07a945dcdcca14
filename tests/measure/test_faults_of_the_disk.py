"""A full disk, a folder that goes away, several writers: nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from attnbench.measure import MeasureOptions, PlannedPoint, run_sweep
from attnbench.measure.header import new_header
from attnbench.store import ResultsFolder
from attnbench.store.record import Measurement
from tests.measure.faults import (
    CPU,
    ENVIRONMENT,
    assert_not_mistimed,
    attention_rows,
    faulty,
    workload,
)

__all__ = ("faulty",)  # fixtures

SPEC = ["{1..20}q1s{20,40}", "heads=4/2", "head_size=32", "dtype=fp32"]
FAKE = ["--timer", "fake", "--backend", "CPU_ATTN", "--format", "json"]
NUM_POINTS = 40


@contextmanager
def attnbench(
    folder: Path, *arguments: str, largest_file_kib: int = 1 << 20
) -> Iterator[subprocess.Popen[str]]:
    """`attnbench` in a process of its own that may write no file larger than given."""
    limited = ["bash", "-c", f'ulimit -f {largest_file_kib}; exec "$@"', "bash"]
    process = subprocess.Popen(
        [*limited, sys.executable, "-m", "attnbench", *arguments, "--results", "results"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_full_disk_stops_the_run_and_resuming_measures_what_is_missing(tmp_path: Path) -> None:
    with attnbench(tmp_path, "run", *SPEC, *FAKE, largest_file_kib=100) as full:
        _, errors = full.communicate(timeout=120)
    assert full.returncode == 4, errors
    assert "File too large; free some space there, then go on with --resume" in errors
    folder = ResultsFolder(tmp_path / "results")
    before = attention_rows(folder)
    assert 0 < len(before) < NUM_POINTS

    with attnbench(tmp_path, "run", "--resume", "last") as resumed:
        _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"{len(before)} already there" in errors
    after = attention_rows(folder)
    assert len(after) == NUM_POINTS
    assert {key: after[key] for key in before} == before
    for row in after.values():
        assert row["status"] == "OK"
        assert_not_mistimed(row)
    assert folder.check().is_ok


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_told_to_stop_keeps_what_it_has_and_goes_on(
    tmp_path: Path, stop: signal.Signals
) -> None:
    with attnbench(tmp_path, "run", *SPEC, *FAKE) as run:
        folder = tmp_path / "results"
        until = time.monotonic() + 60
        # The header and a few rows.
        while not any(p.stat().st_size > 20_000 for p in folder.glob("runs/*.journal")):
            assert time.monotonic() < until
            assert run.poll() is None, "it ended before it could be stopped"
            time.sleep(0.01)
        run.send_signal(stop)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 4, errors
    assert "stopped; what was measured is stored, --resume last goes on" in errors
    with attnbench(tmp_path, "run", "--resume", "last") as resumed:
        _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert len(attention_rows(ResultsFolder(folder))) == NUM_POINTS


def test_a_results_folder_that_is_removed_is_made_again_with_all_rows_of_the_run(
    tmp_path: Path,
) -> None:
    plan = [PlannedPoint(workload(n), "CPU_ATTN") for n in range(6)]
    folder = ResultsFolder(tmp_path / "results")
    options = MeasureOptions(timer="fake")

    def remove(rows: Sequence[Measurement], done: int, total: int) -> None:
        if done in (2, 4, total):
            shutil.rmtree(folder.path)

    with folder.open_run(new_header(plan, options, ENVIRONMENT)) as run:
        run_sweep(plan, run, options, CPU, ENVIRONMENT, remove)
        run.seal()
    assert run.was_removed
    rows = attention_rows(folder)
    assert {key[1] for key in rows} == {point.workload.text for point in plan}
    for row in rows.values():
        assert_not_mistimed(row)
    assert folder.check().is_ok
    assert folder.header("last").plan == run.header.plan


def test_two_runs_and_a_reader_share_a_folder(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    folder.path.mkdir()
    with (
        attnbench(tmp_path, "run", *SPEC, *FAKE, "--shard", "1/2") as one,
        attnbench(tmp_path, "run", *SPEC, *FAKE, "--shard", "2/2") as two,
    ):
        reads = 0
        seen: set[tuple[str, str, int]] = set()
        while one.poll() is None or two.poll() is None:
            rows = attention_rows(folder)  # of runs that ended, each row once
            assert seen <= set(rows)
            seen = set(rows)
            counted = folder.query("SELECT count(*) AS n FROM results").to_pylist()
            assert counted[0]["n"] >= len(seen)
            reads += 1
            time.sleep(0.05)
        printed = [shard.communicate() for shard in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), printed
    assert reads >= 2
    rows = attention_rows(folder)
    assert len(rows) == NUM_POINTS
    for row in rows.values():
        assert_not_mistimed(row)
    assert folder.check().is_ok
    per_run = Counter(row["run_id"] for row in rows.values())
    assert len(per_run) == 2
    for run_id, count in per_run.items():
        header = folder.header(run_id)
        assert header.options["shard"] in ("1/2", "2/2")
        assert len(header.plan) == count
    summaries = [json.loads(out) for out, _ in printed]
    assert sum(len(summary) for summary in summaries) == folder.table().num_rows


@pytest.mark.slow
@pytest.mark.usefixtures("faulty")
def test_the_command_line_says_that_a_point_failed_and_how_to_see_it(tmp_path: Path) -> None:
    text = workload(0).text
    backends = ["--backend", "SEGFAULTING", "--backend", "FINE"]
    how = ["--timer", "wall", "--budget", "0.01", "--format", "json"]
    with attnbench(tmp_path, "run", text, *backends, *how) as process:
        printed, errors = process.communicate(timeout=200)
    assert process.returncode == 4, errors
    rows = {row["backend"]: row for row in json.loads(printed) if row["metric"] == "attention"}
    assert rows["SEGFAULTING"]["status"] == "CRASH"
    assert rows["FINE"]["status"] in ("OK", "NOISY")
    assert f"attnbench run '{text}' --backend SEGFAULTING" in errors
