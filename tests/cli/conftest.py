"""A small project of a user's own, and the command as they would type it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SUITE = """
from attnbench.workload import Suite

SUITE = Suite(
    "tiny",
    "two small decodes and a prefill",
    smoke=["{1,3}q1s40 heads=4/2 head_size=32 dtype=fp32", "q16 heads=4/2 head_size=32 dtype=fp32"],
    nightly=["{1,3}q1s40 heads=4/2 head_size=32 dtype=fp32"],
    full=["{1,3}q1s40 heads=4/2 head_size=32 dtype=fp32"],
)
"""

Attnbench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with one suite and no settings file."""
    folder = tmp_path / "project"
    (folder / "suites").mkdir(parents=True)
    (folder / "suites" / "tiny.py").write_text(SUITE, encoding="utf-8")
    return folder


@pytest.fixture
def attnbench(project: Path) -> Attnbench:
    """Run the command in the project; stdout, stderr and exit code as a user sees them."""

    def call(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ATTNBENCH_", "VLLM_", "TRITON_INTERPRET"))
        }
        return subprocess.run(
            [sys.executable, "-m", "attnbench", *words],
            cwd=project,
            env={**variables, "COLUMNS": "200", **environ},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return call
