"""`attnbench traffic` as a user types it: from a trace to a suite that `run` measures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnbench.workload import load_suites
from tests.cli.conftest import Attnbench


@pytest.fixture
def trace(project: Path) -> Path:
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.05, 400))
    rows = [f"{t:.4f},{rng.integers(1, 4000)},{rng.integers(1, 60)}" for t in arrival]
    path = project / "day.csv"
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]), encoding="utf-8")
    return path


def test_a_trace_becomes_a_suite_that_run_takes(
    attnbench: Attnbench, project: Path, trace: Path
) -> None:
    out = project / "suites" / "day.py"
    done = attnbench(
        "traffic", str(trace), "--tp", "8", "--representatives", "32", "--out", str(out),
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert 16 <= len(rows) <= 32
    num_steps = int(done.stderr.split(" make ")[1].split()[0])
    assert sum(row["weight"] for row in rows) == pytest.approx(num_steps, rel=0.01)
    assert sum(row["seconds_share_pct"] for row in rows) == pytest.approx(100, abs=0.1)
    assert " steps held back, at the roofline" in done.stderr
    suite = load_suites(project / "suites")["day"]
    assert {workload.text for workload in suite.workloads("full")} == {
        row["workload"] for row in rows
    }
    plan = attnbench("run", "--suite", "day", "--preset", "full", "--dry-run", "--format", "json")
    assert plan.returncode == 0, plan.stderr
    assert {point["workload"] for point in json.loads(plan.stdout)} <= {
        row["workload"] for row in rows
    }
    again = attnbench("traffic", str(trace), "--tp", "8", "--representatives", "32", "-f", "json")
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "NVIDIA H2000"), "no published peaks"),
        (("--out", "Suite.txt"), "name a .py file"),
        (("--representatives", "2"), "16 or more"),
        (("--requests", "10"), "too short"),
        (("--model", "gemma-2-9b"), "are not known"),
        (("--rate-scale", "nan"), "rate scale"),
    ],
)
def test_bad_input_is_one_line(
    attnbench: Attnbench, trace: Path, words: tuple[str, ...], said: str
) -> None:
    done = attnbench("traffic", str(trace), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_folder_that_is_not_there_leaves_nothing(attnbench: Attnbench, trace: Path) -> None:
    out = trace.parent / "none" / "day.py"
    done = attnbench("traffic", str(trace), "--representatives", "16", "--out", str(out))
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert not out.parent.exists()
