"""`attnbench itl --check-window`: steps that chose no batch, predicted and then measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from attnbench.store.record import Measurement
from attnbench.workload import Workload, load_suites
from tests.choose.day import REQUESTS, RESULTS, TOKENS
from tests.choose.fake import FA3, FLASHINFER, TRITON, fill, timed
from tests.choose.verbs import Call


def layer_seconds(text: str) -> float:
    """A kernel that is a line in what the batches' features say: 3 us, tokens read, new tokens."""
    requests = Workload.parse(text).requests
    return 3e-6 + sum(2e-9 * one.seq_len + 5e-9 * one.query_len for one in requests)


def of_line(who: tuple[str, str], texts: Sequence[str], factor: float = 1.0) -> list[Measurement]:
    return [
        row
        for text in texts
        for row in timed(who, factor * layer_seconds(text), text, timer="fake")
    ]


@pytest.fixture
def window(call: Call, batches: list[str], tmp_path: Path) -> dict[str, float]:
    """The steps of the window as `attnbench traffic` writes them, and how often each is there."""
    words = ("day.csv", "--representatives", "24", "--check-window", "500")
    code, out, err = call(*words, "--out", "suites/day-window.py", "-f", "json", verb="traffic")
    assert code == 0, err
    assert "attnbench run --suite day-window --preset full" in err
    steps = {row["workload"]: row["steps"] for row in json.loads(out)}
    suite = load_suites(tmp_path / "suites")["day-window"]
    assert {one.text for one in suite.workloads("full")} == set(steps)
    return steps


CHECK = ("day.csv", "--representatives", "24", "--timer", "fake", "--check-window", "500")


def test_the_window_is_the_schedule_itself(window: dict[str, float]) -> None:
    """One request at a time: 500 steps are 45 whole requests and a bit, contexts counted by one."""
    assert sum(window.values()) == 500
    prompts = {100 + 37 * (i * 7 % 100) for i in range(REQUESTS)}
    for text in window:
        (request,) = Workload.parse(text).requests
        if request.query_len > 1:
            assert request.query_len == request.seq_len
            assert request.seq_len in prompts
        else:
            assert any(0 < request.seq_len - prompt < TOKENS for prompt in prompts)
    contexts = {request.seq_len for text in window for request in Workload.parse(text).requests}
    assert any(context % 2 for context in contexts if context > 64)  # not rounded


def test_the_prediction_of_the_window_is_held_against_its_times(
    call: Call, batches: list[str], window: dict[str, float]
) -> None:
    steps = [text for text in window if text not in batches]
    fill(
        RESULTS,
        of_line(FA3, [*batches, *steps]),
        of_line(TRITON, batches), of_line(TRITON, steps, 1.04),
        of_line(FLASHINFER, [*batches, *steps[1:]]),
    )  # fmt: skip
    code, out, err = call(*CHECK, "--backend", "FLASH_ATTN:FA3", "-f", "json")
    assert code == 0, err
    (one,) = json.loads(out)
    assert one["steps"] == 500
    assert one["batches"] == len(window)
    assert one["within"]
    assert abs(one["total_error_pct"]) < 1
    assert abs(one["p99_error_pct"]) < 3
    # Without anybody named: who has all times. Triton's steps are 4 % slower than it predicts.
    code, out, err = call(*CHECK, "-f", "json")
    assert code == 1
    found = {row["backend"]: row for row in json.loads(out)}
    assert set(found) == {"FLASH_ATTN:FA3", "TRITON_ATTN"}
    assert not found["TRITON_ATTN"]["within"]
    slower = found["TRITON_ATTN"]["total_error_pct"] - one["total_error_pct"]
    assert slower == pytest.approx(100 * (1 / 1.04 - 1), abs=0.3)
    # One that was asked for lacks a step.
    code, out, err = call(*CHECK, "--backend", "FLASHINFER:FA3", "-f", "csv")
    assert code == 3
    assert "FLASHINFER:FA3: of" in err
    assert "1 not measured" in err
    command = shlex.split(err.split("to measure: ")[1])
    assert command[:3] == ["attnbench", "run", steps[0]]


def test_a_window_that_nobody_measured_is_exit_3_with_the_commands(
    call: Call, batches: list[str], window: dict[str, float]
) -> None:
    code, out, err = call(*CHECK, "-f", "json")
    assert (code, json.loads(out)) == (3, [])
    first, second, third = (shlex.split(one) for one in err.split("to measure: ")[1].split("&&"))
    assert first[-1] == "suites/day.py"
    assert second[-4:] == ["--check-window", "500", "--out", "suites/day-window.py"]
    assert third[:6] == ["attnbench", "run", "--suite", "day", "--suite", "day-window"]
    Path("suites/day-window.py").unlink()
    assert call(*second[2:], verb="traffic")[0] == 0
    assert {one.text for one in load_suites(Path("suites"))["day-window"].workloads("full")} == set(
        window
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--check-window", "499"), "give 500 to"),
        (("--check-window", "501"), "500 steps are held back"),
        (("--check-window", "-1"), "give 500 to"),
        (("--check-window", "500", "--load", "2", "-f", "json"), "leave one out"),
    ],
)
def test_a_window_that_is_none(call: Call, words: tuple[str, ...], said: str) -> None:
    code, out, err = call("day.csv", "--representatives", "24", *words)
    assert (code, out) == (2, "")
    assert said in err
