"""What a new user gets wrong: one line that names the input and the mend, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Attnbench

SMALL = ("q16", "heads=4/2", "head_size=32", "--dtype", "fp32", "--timer", "fake")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run", "8q1s4k", "--backend", "CPU_ATN"], ["'CPU_ATN'", "did you mean CPU_ATTN"]),
        (["run", "8q1s4k", "--backend", "CPU_ATTN:fast"], ["'CPU_ATTN:fast'", "no variant"]),
        (["run", "8x1s4k"], ["8x1s4k", "8q1s4k"]),
        (["run", "8q4ks1k"], ["seq_len"]),
        (["run", "8q1s4k", "windw=5"], ["windw", "window"]),
        (["run", "8q1s4k", "--shape", "llama3-8b"], ["llama3-8b", "llama-3-8b"]),
        (["run", "8q1s4k", "--dtype", "float7"], ["float7", "bf16"]),
        (["run"], ["batch spec", "8q1s4k"]),
        (["run", "--suite", "tinny"], ["'tinny'", "tiny"]),
        (["run", "--suite", "tiny", "--dtype", "fp16"], ["--suite", "--dtype"]),
        (["run", "8q1s4k", "--preset", "full"], ["--preset"]),
        (["run", "--resume", "last", "--timer", "fake"], ["--resume", "--timer"]),
        (["nightly", "--resume", "last", "--preset", "full"], ["--resume", "--preset"]),
        (["run", "8q1s4k", "--budget", "0"], ["budget_s", "above 0"]),
        (["run", "8q1s4k", "--budget", "nan"], ["budget_s", "above 0"]),
        (["run", "8q1s4k", "--replicates", "150"], ["150", "1 to 99"]),
        (["run", "8q1s4k", "--timer", "cupti"], ["'cupti'", "wall, fake"]),
        (["run", "8q1s4k", "--timer", "event"], ["--timer event", "--timer wall"]),
        (["nightly", "--timer", "graph"], ["--timer graph", "--timer wall"]),
        (["run", "8q1s4k", "--l2", "cold"], ["--l2 cold", "leave --l2 out"]),
        (["run", "8q1s4k", "--fake-slowdown", "CPU_ATTN=2"], ["--fake-slowdown", "--timer fake"]),
        (
            ["run", *SMALL, "--fake-slowdown", "CPU_ATN=2"],
            ["--fake-slowdown CPU_ATN=2", "choose one of: CPU_ATTN"],
        ),
        (
            ["run", *SMALL, "--backend", "CPU_ATTN", "--fake-slowdown", "TORCH_SDPA=2"],
            ["--fake-slowdown TORCH_SDPA=2", "choose one of: CPU_ATTN"],
        ),
        (
            ["run", *SMALL, "--fake-slowdown", "CPU_ATTN=2", "--fake-slowdown", "CPU_ATTN=3"],
            ["--fake-slowdown CPU_ATTN", "given twice"],
        ),
        (
            ["nightly", "--timer", "fake", "--fake-slowdown", "NOPE=2"],
            ["--fake-slowdown NOPE=2", "choose one of: CPU_ATTN"],
        ),
        (["run", "8q1s4k", "--lock-clocks", "0"], ["--lock-clocks 0", "1500"]),
        (["run", "8q1s4k", "--rated-clock", "-5"], ["--rated-clock -5", "1500"]),
        (["run", *SMALL, "--results", ""], ["--results ''", "leave it out"]),
        (["doctor", "--results", ""], ["--results ''"]),
        (["run", *SMALL, "sinks=1", "--backend", "TORCH_SDPA"], ["attention sinks", "explain"]),
        (["run", *SMALL, "--results", "/dev/null/x"], ["/dev/null/x"]),
        (["run", "--resume", "20200101T000000Z-abcdef"], ["20200101T000000Z-abcdef"]),
        (["explain", "8q1s4k", "--device", "sm900"], ["sm900", "sm90"]),
        (["explain", "8q1s4k", "--device", "h200"], ["h200"]),
        (["results", "query", "SELEC 1"], ["SELEC"]),
        (["compare", "nope", "nada"], ["results"]),
    ],
)
def test_bad_input_is_one_line_with_the_mend(
    attnbench: Attnbench, words: list[str], parts: list[str]
) -> None:
    done = attnbench(*words)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in last, last


def test_an_unknown_option_is_usage_too(attnbench: Attnbench) -> None:
    assert attnbench("run", "--bakend", "X").returncode == 2


def test_settings_that_do_not_exist(attnbench: Attnbench, project: Path) -> None:
    (project / "attnbench.toml").write_text('reslts = "x"\n')
    done = attnbench("run", *SMALL)
    assert done.returncode == 2
    assert "did you mean 'results'" in done.stderr


def test_a_truncated_parquet_file_and_one_of_a_newer_schema(
    attnbench: Attnbench, project: Path
) -> None:
    assert attnbench("run", *SMALL, "--backend", "CPU_ATTN").returncode == 0
    (sealed,) = (project / "results").rglob("*.parquet")
    data = sealed.read_bytes()
    sealed.write_bytes(data[: len(data) // 2])
    done = attnbench("results", "query", "SELECT count(*) FROM results")
    assert done.returncode == 2
    assert sealed.name in done.stderr
    assert "Traceback" not in done.stderr
    checked = attnbench("results", "check")
    assert checked.returncode == 2
    assert sealed.name in checked.stdout + checked.stderr


def test_a_suite_file_that_raises_is_named(attnbench: Attnbench, project: Path) -> None:
    # A suite file is the user's own code: what it raises is their error, said in one line.
    (project / "suites" / "broken.py").write_text("raise ValueError('boom')\n")
    done = attnbench("run", "--suite", "tiny")
    assert done.returncode == 2
    assert "broken.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_said_and_keeps_what_was_stored(project: Path) -> None:
    def run(limit_kib: str) -> subprocess.CompletedProcess[str]:
        # Files may not grow past the limit: what a full disk looks like to a writer.
        command = f"ulimit -f {limit_kib}; exec {sys.executable} -m attnbench run " + " ".join(
            (*SMALL, "--backend", "CPU_ATTN")
        )
        return subprocess.run(
            ["bash", "-c", command], cwd=project, capture_output=True, text=True, check=False
        )

    assert run("unlimited").returncode == 0
    before = {path: path.read_bytes() for path in (project / "results").rglob("*.parquet")}
    done = run("1")
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "space" in done.stderr or "large" in done.stderr
    after = {path: path.read_bytes() for path in (project / "results").rglob("*.parquet")}
    assert after == before
