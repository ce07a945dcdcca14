"""`attnbench nightly`: the whole line, exact, by the fake timer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Attnbench

NIGHT = ("nightly", "--timer", "fake", "--backend", "CPU_ATTN", "--backend", "TORCH_SDPA")


@pytest.mark.slow
def test_three_nights_no_baseline_then_the_same_then_slower(
    attnbench: Attnbench, project: Path
) -> None:
    first = attnbench(*NIGHT)
    assert first.returncode == 0, first.stderr
    assert "4 points: 4 OK" in first.stdout
    assert "no baseline yet" in first.stdout
    assert (project / "dashboards" / "site" / "index.html").is_file()

    second = attnbench(*NIGHT)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "no baseline" not in second.stdout

    third = attnbench(*NIGHT, "--fake-slowdown", "CPU_ATTN=1.3")
    assert third.returncode == 1, third.stdout + third.stderr
    lines = third.stdout.splitlines()
    assert lines[1].split() == ["verdict", "REGRESSION:", "2", "confirmed", "exit", "1"]
    assert "2 points look slower: measuring them again" in third.stderr
    slower = next(line for line in lines if line.startswith("slower"))
    assert "CPU_ATTN" in slower
    assert "+30.0 %" in slower
    again = next(line for line in lines if "again:" in line)
    assert "--backend CPU_ATTN" in again
    assert not any("TORCH_SDPA" in line for line in lines)
    markdown = (project / "dashboards" / "site" / "summary.md").read_text(encoding="utf-8")
    assert "+30.0 %" in markdown

    # The command the summary gives is one that works.
    words = again.split("attnbench ", 1)[1].replace("'", "").split()
    assert attnbench(*words, "--timer", "fake").returncode == 0


def test_a_night_without_suites_says_what_to_do(attnbench: Attnbench, project: Path) -> None:
    (project / "suites" / "tiny.py").unlink()
    done = attnbench(*NIGHT)
    assert done.returncode == 2
    assert "suites" in done.stderr.strip().splitlines()[-1]
    assert not (project / "results").exists()


def test_a_shard_says_that_it_is_not_the_whole_night(attnbench: Attnbench, project: Path) -> None:
    found = attnbench(*NIGHT, "--shard", "1/2")
    assert found.returncode == 0, found.stderr
    said = "shard 1/2 of the plan only"
    site = project / "dashboards" / "site"
    assert said in found.stdout.splitlines()[0]
    assert said in (site / "summary.md").read_text(encoding="utf-8")
    assert said.capitalize() in (site / "index.html").read_text(encoding="utf-8")
    assert attnbench("dashboard").returncode == 0  # made again from what is stored
    assert said.capitalize() in (site / "index.html").read_text(encoding="utf-8")
