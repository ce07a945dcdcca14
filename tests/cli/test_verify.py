"""`attnbench verify` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Attnbench
from tests.measure.conftest import installed
from tests.measure.verify_backends import NAMES

SPEC = ("3q1s40_q5s17", "heads=4/2", "head_size=32", "dtype=fp32")
SOURCE = Path(__file__).parent.parent / "measure" / "verify_backends.py"


@pytest.fixture
def suspects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = SOURCE.read_text(encoding="utf-8")
    yield from installed("suspects", source, NAMES, tmp_path / "site", monkeypatch)


def test_right_backends_exit_0_and_say_that_they_differ_by_rounding(
    attnbench: Attnbench, project: Path
) -> None:
    done = attnbench(
        "verify", *SPEC, "--backend", "CPU_ATTN", "--backend", "TORCH_SDPA:math", "--steps", "2",
        "--format", "json", "--report", "found.md",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["backend"], row["against"], row["difference"]) for row in rows] == [
        ("CPU_ATTN", "reference", "rounding"),
        ("TORCH_SDPA:math", "reference", "rounding"),
        ("CPU_ATTN", "TORCH_SDPA:math", "rounding"),
    ]
    for row in rows[:2]:
        assert 0 < row["call_error"] <= row["tolerance"]
        assert 0 < row["step_error"] <= row["tolerance"]
    assert "2 run; all differences are rounding" in done.stderr
    # Asked for, so it is written though nothing is wrong.
    assert (project / "found.md").read_text(encoding="utf-8").startswith("# No backend is wrong")
    assert not list(project.glob("attnbench-verify-*"))


@pytest.mark.usefixtures("suspects")
def test_a_wrong_backend_exits_4_with_a_report_whose_command_shows_it_again(
    attnbench: Attnbench, project: Path
) -> None:
    done = attnbench(
        "verify", *SPEC, "--backend", "SPOILING", "--backend", "CPU_ATTN", "--backend",
        "TRITON_MLA", "--steps", "2", "--format", "csv",
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("backend,against,status,difference")
    assert lines[1].startswith("SPOILING,reference,INCORRECT,bug")
    assert lines[2].startswith("CPU_ATTN,reference,OK,rounding")
    assert lines[3].startswith("TRITON_MLA,reference,UNSUPPORTED,")
    assert "non-MLA not supported" in lines[3]
    assert "2 run, 1 refused; wrong: SPOILING (INCORRECT)" in done.stderr
    (report,) = project.glob("attnbench-verify-*.md")
    text = report.read_text(encoding="utf-8")
    # Three tokens of two heads: what the backend spoils, and nothing more.
    command = next(line for line in text.splitlines() if line.startswith("attnbench verify"))
    assert command == (
        "attnbench verify 'q3 dtype=fp32 head_size=32 heads=2/1' --backend SPOILING --steps 0"
    )
    again = attnbench(
        "verify", "q3 dtype=fp32 head_size=32 heads=2/1", "--backend", "SPOILING", "--steps", "0",
        "--report", "again.md",
    )  # fmt: skip
    assert again.returncode == 4, again.stderr
    assert "nothing smaller fails" in (project / "again.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("verify", "3q1s40", "--steps", "-1"), "--steps -1"),
        (("verify", "3q1s40", "--backend", "CPU_ATN"), "did you mean CPU_ATTN"),
        (("verify", "3x1s40"), "3x1s40"),
        (
            ("verify", "3q1s40", "--backend", "TRITON_MLA", "--report", "r.md"),
            "TRITON_MLA refuses '3q1s40'",
        ),
        (("verify", "{1,2}q1s40"), "verify takes one workload"),
        (("verify", "3q1s40", "--report", "nowhere/r.md"), "nowhere is no such place"),
        (("verify", "3q1s40", "--report", "suites"), "--report 'suites' is a folder"),
        (("verify", "3q1s40", "--dtype", "fp99"), "fp99"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: tuple[str, ...], says: str, attnbench: Attnbench, project: Path
) -> None:
    done = attnbench(*words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(project.glob("*.md")), "there is nothing to report"


def test_features_are_options_as_they_are_of_run(attnbench: Attnbench) -> None:
    done = attnbench(
        "verify", "2q1s40", "heads=4/2", "--dtype", "fp32", "--block-size", "32",
        "--kv-cache-dtype", "fp8_e4m3", "--steps", "1", "--report", "found.md",
        "--backend", "TORCH_SDPA", "--backend", "FLEX_ATTENTION", "--format", "markdown",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| FLEX_ATTENTION | reference | UNSUPPORTED |" in done.stdout


@pytest.mark.usefixtures("suspects")
def test_ctrl_c_while_it_shrinks_leaves_the_report(
    project: Path,
) -> None:
    command = [sys.executable, "-m", "attnbench", "verify", *SPEC, "--backend", "HANGING"]
    with subprocess.Popen(
        [*command, "--timeout", "2", "--steps", "1"],
        cwd=project,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("looking for"):
                break
        time.sleep(1)  # within its first try, or the worker that comes after the killed one
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.readlines()
    assert process.returncode == 4
    text = "".join(said)
    assert "up to 62 s" in text
    assert "Traceback" not in text
    assert "report: attnbench-verify-" in text
    (report,) = project.glob("attnbench-verify-*.md")
    assert "stopped there" in report.read_text(encoding="utf-8")
