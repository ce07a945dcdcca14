"""`attnbench nightly`: the whole line, exact, by the fake timer."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from attnbench.backends.device import Device
from attnbench.measure.environment import read_environment
from attnbench.store import ResultsFolder
from attnbench.store.record import PROTOCOL_VERSION
from tests.cli.conftest import Attnbench
from tests.measure.other_python import program

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

    # More looks slower than may be measured again: the worst of each backend is.
    slow = ("--fake-slowdown", "CPU_ATTN=1.4", "--fake-slowdown", "TORCH_SDPA=1.2")
    fourth = attnbench(*NIGHT, *slow, "--confirm-at-most", "2")
    assert fourth.returncode == 1, fourth.stdout + fourth.stderr
    assert "REGRESSION: 2 confirmed, 2 undecided" in fourth.stdout
    assert "2 more do, and stay undecided: --confirm-at-most is 2" in fourth.stderr
    assert "waiting   2 points may be slower and were not measured again" in fourth.stdout
    alarms = [line for line in fourth.stdout.splitlines() if "   since" in line]
    assert sorted("CPU_ATTN" in line for line in alarms) == [False, True]


def test_pages_that_cannot_be_written_do_not_cost_the_verdict(
    attnbench: Attnbench, project: Path
) -> None:
    (project / "file").write_text("", encoding="utf-8")
    found = attnbench(*NIGHT, "--site", "file/site")
    assert found.returncode == 2, found.stderr
    assert "no pages: " in found.stderr
    assert found.stdout.splitlines()[1].startswith("verdict")
    assert "Traceback" not in found.stderr


def test_a_night_without_its_reference_goes_on_and_says_so(attnbench: Attnbench) -> None:
    found = attnbench(*NIGHT, "--reference", "nowhere/python")
    assert found.returncode == 0, found.stderr
    assert "no such program" in found.stderr
    assert "this night goes on without it" in found.stderr
    line = next(line for line in found.stdout.splitlines() if line.startswith("reference"))
    assert "none: --reference" in line


@pytest.mark.slow
def test_a_night_that_was_killed_while_it_confirmed_goes_on_as_it_was_begun(
    attnbench: Attnbench, project: Path, tmp_path: Path
) -> None:
    python = killing_python(tmp_path / "other")
    assert attnbench(*NIGHT).returncode == 0
    slow = ("--fake-slowdown", "CPU_ATTN=1.3")
    killed = attnbench(*NIGHT, *slow, "--reference", python, "--confirm-at-most", "1")
    assert killed.returncode == -signal.SIGKILL
    folder = ResultsFolder(project / "results")
    run_id = folder.header("last").run_id
    begun = confirmations(folder, run_id)
    assert len(begun) == 1

    again = attnbench("nightly", "--resume", "last")
    assert again.returncode == 1, again.stdout + again.stderr
    assert "REGRESSION: 1 confirmed, 1 undecided" in again.stdout
    assert "reference commit 0123456, " in again.stdout
    after = confirmations(folder, run_id)
    assert begun < after
    assert {replicate for _, replicate in after} == set(range(100, 110))
    assert len(after) == 10


def confirmations(folder: ResultsFolder, run_id: str) -> set[tuple[str, int]]:
    table = folder.table(["point_id", "replicate"], {"run_id": run_id, "metric": "attention"})
    rows = [(row["point_id"], row["replicate"]) for row in table.to_pylist()]
    assert len(set(rows)) == len(rows)
    return {row for row in rows if row[1] >= 100}


def killing_python(folder: Path) -> str:
    """Says what it is; asked to measure, it kills the night the first time, and knows no point
    afterwards."""
    here = read_environment(Device("cpu"))
    facts = {
        "protocol_version": PROTOCOL_VERSION,
        "device_class": here.device_class,
        "device_uuid": here.device_uuid,
        "commit": "0123456789",
        "stack": ["torch==2.12.0"],
        "stack_id": "abc",
        "harness_version": "0.0.9",
        "package": "/before/attnbench/__init__.py",
    }
    source = f"""
import json, os, pathlib, signal, sys
mark = pathlib.Path(__file__).with_name("killed")
for line in sys.stdin:
    if "points" not in json.loads(line):
        print({json.dumps(facts)!r}, flush=True)
    elif mark.exists():
        print(json.dumps({{"refused": {{}}}}), flush=True)
    else:
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
"""
    return program(folder, source)


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


@pytest.mark.slow
def test_the_gates_record_of_sharded_nights_and_a_finished_night_gone_on_with(
    attnbench: Attnbench,
) -> None:
    clean = {"ASV_COMMIT": "a" * 40}  # nights of one clean commit: nothing changed
    for _ in range(2):
        for shard in ("1/2", "2/2"):
            assert attnbench(*NIGHT, "--shard", shard, **clean).returncode == 0
    found = json.loads(attnbench("gate", "--format", "json").stdout)
    (nights,) = [row for row in found if row["what"] == "nights with a false alarm"]
    assert (nights["count"], nights["of"]) == (0, 1)
    (picked,) = [row for row in found if row["what"] == "false: picked"]
    assert (picked["timer"], picked["count"], picked["of"]) == ("fake", 0, 4)

    slow = ("--shard", "1/2", "--fake-slowdown", "CPU_ATTN=1.5", "--fake-slowdown", "TORCH_SDPA=2")
    night = attnbench(*NIGHT, *slow, **clean)
    assert night.returncode == 1, night.stdout + night.stderr
    again = attnbench("nightly", "--resume", "last", **clean)
    assert again.returncode == 1, again.stderr
    assert again.stdout.splitlines()[1] == night.stdout.splitlines()[1]
    assert "round" not in again.stderr
    assert "were measured again already" in again.stderr
    found = json.loads(attnbench("gate", "--format", "json").stdout)
    rehearsed = [row for row in found if row["what"] == "rehearsed: confirmed"]
    assert rehearsed
    assert all(row["count"] == row["of"] > 0 for row in rehearsed)
    # A rehearsal is no night without a change.
    assert [row["of"] for row in found if row["what"] == "nights with a false alarm"] == [1]
