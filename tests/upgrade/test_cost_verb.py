"""`attnbench upgrade --batch`: what it measures, on which device, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.cli.main import main
from attnbench.errors import ExitCode
from attnbench.history.rule import VerdictSettings
from attnbench.upgrade import assess as assess_module
from attnbench.upgrade.cells import Cell
from tests.upgrade.fake_costs import answer, change, step

CPU_CHANGE = change(
    answer(Cell(head_size=32, num_heads=4, num_kv_heads=2), "CPU_ATTN"),
    answer(Cell(head_size=32, num_heads=4, num_kv_heads=2), "TORCH_SDPA"),
    capability="cpu",
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`attnbench upgrade` with a probe that has answered already; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assess_module, "assess", lambda *_, **__: [step(CPU_CHANGE)])

    def call(*words: str) -> int:
        arguments = ["upgrade", "--from", "vllm==0.22.1", "--to", "vllm==0.33.0", *words]
        monkeypatch.setattr(sys, "argv", ["attnbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return int(str(stop.value.code or 0))

    return call


def test_without_a_batch_nothing_is_judged(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("-c", "cpu") == 0
    assert "no --batch was given" in capsys.readouterr().err


def test_measure_needs_the_device(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("-c", "8.9", "--batch", "3q1s40", "--measure") == 2
    said = capsys.readouterr().err
    assert "compute capability 8.9" in said
    assert "attnbench upgrade --from vllm==0.22.1 --to vllm==0.33.0 -c 8.9 --batch 3q1s40" in said


def test_missing_points_are_measured_then_joined(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnbench.selection import current_device

    if current_device().kind != "cpu":
        pytest.skip("this machine's device is a GPU")
    asked = ("-c", "cpu", "--batch", "3q1s40 ", "--timer", "fake", "--results", "kept")
    assert verb(*asked) == ExitCode.UNDECIDED
    command = "attnbench run '3q1s40 head_size=32 heads=4/2' --backend CPU_ATTN"
    assert f"to measure: {command} --backend TORCH_SDPA" in capsys.readouterr().err
    code = verb(*asked, "--measure", "--replicates", "2", "-f", "json")
    printed = json.loads(capsys.readouterr().out)
    (cost,) = printed["steps"][0]["changes"][0]["cost"]
    runs = {one["run_id"] for part in cost["batches"] for one in (part["before"], part["after"])}
    assert len(runs) == 1  # both sides in one sweep
    assert all(len(part["before"]["replicates"]) == 2 for part in cost["batches"])
    settings = VerdictSettings().noise("fake")
    slower = cost["ratio"] > settings.limit and cost["low"] > 1
    assert code == (ExitCode.REGRESSION if slower else ExitCode.OK)
    assert (cost["verdict"] == "slower") == slower
    assert verb(*asked) == code  # stored: nothing is measured again


def test_installed_versions_are_measured_as_deployed(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from attnbench.selection import current_device
    from attnbench.upgrade import alternate

    if current_device().kind != "cpu":
        pytest.skip("this machine's device is a GPU")
    asked = []
    monkeypatch.setattr(alternate, "measure_by_turns", lambda *given: asked.append(given))
    arguments = ["upgrade", "--from-python", sys.executable, "--to-python", sys.executable]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-c", "cpu", "--batch", "3q1s40", "--measure", "--results", "r"])
    assert stop.value.code == ExitCode.UNDECIDED  # the stand-in has stored nothing
    (sides, plans, options, results, _) = asked[0]
    assert [str(side.python) for side in sides] == [sys.executable] * 2
    assert [[one.backends for one in plan] for plan in plans] == [
        [("VLLM:CPU_ATTN",)],
        [("VLLM:TORCH_SDPA",)],
    ]
    assert plans[0][0].workloads == ("3q1s40 head_size=32 heads=4/2",)
    assert (options.replicates, results) == (3, Path("r"))
