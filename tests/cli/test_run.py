"""`attnbench run` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Attnbench

SPEC = ("3q1s40", "heads=4/2", "head_size=32", "--dtype", "fp32")


def test_run_prints_and_stores_every_backend(attnbench: Attnbench, project: Path) -> None:
    done = attnbench(
        "run", *SPEC, "--backend", "CPU_ATTN", "--backend", "TORCH_SDPA", "--timer", "fake",
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    main = [row for row in rows if row["metric"] == "attention"]
    assert {row["backend"]: row["status"] for row in main} == {
        "CPU_ATTN": "OK",
        "TORCH_SDPA": "OK",
    }
    assert all(row["median_us"] > 0 and row["samples"] == 5 for row in main)
    assert len(list((project / "results").rglob("*.parquet"))) == 1

    counted = attnbench(
        "results", "query", "SELECT count(*) AS rows FROM results", "--format", "json"
    )
    assert json.loads(counted.stdout) == [{"rows": len(rows)}]


def test_wall_times_are_measured_in_a_worker(attnbench: Attnbench) -> None:
    done = attnbench("run", *SPEC, "--backend", "CPU_ATTN", "--budget", "0.05", "--format", "json")
    assert done.returncode == 0, done.stderr
    row = next(r for r in json.loads(done.stdout) if r["metric"] == "attention")
    assert row["status"] in ("OK", "NOISY")
    assert 1 < row["median_us"] < 1e6
    assert row["samples"] >= 5


def test_dry_run_prints_the_plan_and_stores_nothing(attnbench: Attnbench, project: Path) -> None:
    done = attnbench("run", "{1,2}q1s40", "--backend", "CPU_ATTN", "--dry-run", "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "workload,backend,variant,suite",
        "q1s40,CPU_ATTN,,",
        "2q1s40,CPU_ATTN,,",
    ]
    assert not (project / "results").exists()


def test_a_suite_is_run_by_name_and_a_stopped_run_goes_on(attnbench: Attnbench) -> None:
    done = attnbench("run", "--suite", "tiny", "--timer", "fake", "--backend", "CPU_ATTN")
    assert done.returncode == 0, done.stderr
    again = attnbench("run", "--resume", "last")
    assert again.returncode == 0, again.stderr
    assert "3 already there" in again.stderr
