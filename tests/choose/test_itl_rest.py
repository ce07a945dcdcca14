"""`attnbench run --metric step`, then `attnbench itl --rest measured`: for real, with exact times.

The clock is the fake timer, whose step is the attention of its layers and, of all else, bytes and
FLOPs at known rates; the device's published peaks are put in place of a machine that has none.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.choose.itl_rest import STEP_BATCHES
from attnbench.measure import peaks
from attnbench.measure.environment import read_environment
from attnbench.measure.peaks import Peak
from attnbench.selection import current_device
from attnbench.store import ResultsFolder
from attnbench.store.schema import table_to_rows
from attnbench.workload import Workload
from attnbench.workload.model import step_bytes, step_flops
from attnbench.workload.ranges import expand_ranges
from tests.choose.fake import fill
from tests.choose.verbs import Call, typed

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 100,
}
BATCHES = "{q1s90,8q1s64,q32,q128}"
HEAD = 64 * 100
LAYER = 64 * 16 * (4 + 2 * 2 + 4) + 3 * 64 * 96
REST_S = 2 * (6 * LAYER + HEAD) / 100e9 + 2 * (6 * LAYER + HEAD) / 1e12
"""Of one token: every weight is read once and multiplied once."""


@pytest.fixture
def call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Call]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device_class = read_environment(current_device()).device_class
    monkeypatch.setattr(peaks, "PEAKS", {device_class: Peak(100e9, 1e12)})
    Path("config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    lines = [f"{0.1 * i:.1f},{20 + 37 * (i * 7 % 23) % 97},30" for i in range(100)]
    lines = ["arrival_s,input_tokens,output_tokens", *lines]
    Path("day.csv").write_text("\n".join(lines), encoding="utf-8")

    def run(verb: str, *words: str) -> tuple[int, str, str]:
        extra = ["--timer", "fake"]
        if verb == "itl":
            extra += ["--device", device_class, "--representatives", "20", "--model", "config.json"]
        return typed(capsys, verb, *words, *extra)

    yield run
    torch.set_num_threads(threads)


def itl(call: Call, rest: str, *words: str) -> dict[str, Any]:
    code, out, err = call("itl", "day.csv", "--rest", rest, "-f", "json", *words)
    assert code == 0, err
    return {"scope": json.loads(out)["scope"]} | {
        row["backend"]: row for row in json.loads(out)["backends"]
    }


def measure_batches(call: Call) -> None:
    """Attention of every batch that stands for the trace."""
    asked = ("--rest", "none", "--backend", "CPU_ATTN", "-f", "json")
    code, out, _ = call("itl", "day.csv", *asked)
    assert code == 3
    words = shlex.split(json.loads(out)["measure"])
    assert words[:2] == ["attnbench", "run"]
    code, _, err = call("run", words[2], "--backend", "CPU_ATTN", "--replicates", "2")
    assert code == 0, err


def test_a_measured_step_takes_the_place_of_the_roofline(call: Call) -> None:
    measure_batches(call)
    code, out, err = call("itl", "day.csv", "--rest", "measured", "--backend", "CPU_ATTN")
    assert (code, out) == (2, "")
    command = shlex.split(err.split("measure them: ")[1])
    assert command == [
        *("attnbench", "run", STEP_BATCHES, "--metric", "step", "--model", "config.json"),
        *("--backend", "CPU_ATTN", "--replicates", "3", "--timer", "fake"),
    ]
    # The same with batches that a CPU computes in no time.
    code, out, err = call("run", BATCHES, *command[3:-2], "-f", "json")
    assert code == 0, err
    steps = [row for row in json.loads(out) if row["metric"] == "step"]
    assert {row["status"] for row in steps} == {"OK"}
    texts = {row["workload"] for row in steps}
    layers = "head_size=16 heads=4/2 layers={2,4} model=64:96:100"
    assert texts == {Workload.parse(t).text for t in expand_ranges(f"{BATCHES} {layers}")}
    for row in steps:
        workload = Workload.parse(row["workload"])
        assert row["tflop_s"] == pytest.approx(
            step_flops(workload) / row["median_us"] / 1e6, rel=1e-2, abs=1e-4
        )
        assert step_bytes(workload) > 0

    alone, whole = itl(call, "none"), itl(call, "measured")
    assert whole["scope"] == (
        "attention, and the rest of measured steps of CPU_ATTN, 4 batches of 1 to 128 tokens"
    )
    gained = {
        name: whole["CPU_ATTN"][name]["value"] - alone["CPU_ATTN"][name]["value"]
        for name in ("itl_p50_ms", "itl_p90_ms")
    }
    assert gained["itl_p50_ms"] == pytest.approx(1e3 * REST_S, rel=1e-3)
    assert gained["itl_p90_ms"] == pytest.approx(1e3 * REST_S, rel=1e-3)
    assert whole["roofline"]["itl_p50_ms"]["value"] > 1e3 * REST_S
    assert (
        whole["CPU_ATTN"]["ttft_attention_pct"]["value"]
        < alone["CPU_ATTN"]["ttft_attention_pct"]["value"]
    )
    # Processes differ by 0.1 % under the fake timer, and differences of steps by more.
    one, before = whole["CPU_ATTN"]["itl_p50_ms"], alone["CPU_ATTN"]["itl_p50_ms"]
    assert one["high"] - one["low"] > 1.5 * (before["high"] - before["low"])
    assert ResultsFolder(Path("results")).check().is_ok


def test_steps_of_another_model_or_that_failed_are_not_these(call: Call) -> None:
    measure_batches(call)
    other = {**CONFIG, "intermediate_size": 128}
    Path("other.json").write_text(json.dumps(other), encoding="utf-8")
    step = ("--metric", "step", "--backend", "CPU_ATTN", "--replicates", "2")
    assert call("run", BATCHES, *step, "--model", "other.json")[0] == 0
    asked = ("day.csv", "--rest", "measured")
    code, _, err = call("itl", *asked)
    assert code == 2
    assert "no stored steps of this model" in err
    assert "(" not in err.split("measure them")[0]
    # Steps whose attention by itself nobody measured, and steps that were held back.
    assert call("run", "{q2s9,q16}", *step, "--model", "config.json", "--results", "own")[0] == 0
    rows = ResultsFolder(Path("own")).table(where={"metric": "step"})
    fill(Path("results"), table_to_rows(rows))
    code, _, err = call("itl", *asked)
    assert code == 2
    assert "attention of a batch by itself has no time of the same kind" in err
    later = timedelta(seconds=5)
    held_back = [
        replace(row, status="THROTTLED", samples=(), started_at=row.started_at + later)
        for row in table_to_rows(rows)
    ]
    fill(Path("results"), held_back)
    code, _, err = call("itl", *asked)
    assert code == 2
    assert "a step ended as THROTTLED" in err


def test_a_run_of_steps_is_planned_and_gone_on_with(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("q4s9", "--metric", "step", "--model", "config.json", "--backend", "CPU_ATTN")
    code, out, _ = call(
        "run", *words, "--step-layers", "1", "--step-layers", "9", "--dry-run", "-fjson"
    )
    assert code == 0
    layer = "q4s9 head_size=16 heads=4/2"
    assert [row["workload"] for row in json.loads(out)] == [
        layer,
        f"{layer} model=64:96:100",
        f"{layer} layers=6 model=64:96:100",  # no more than the model has
    ]
    assert call("run", *words)[0] == 0
    code, _, err = typed(capsys, "run", "--resume", "last")
    assert code == 0, err
    assert "0 points, 3 already there" in err


def test_a_named_model_is_the_shape_and_its_ranks(call: Call) -> None:
    words = ("--metric", "step", "--dry-run", "-f", "json", "--backend", "CPU_ATTN")
    code, out, _ = call("run", "q1s9", "--model", "llama-3-70b", "--tp", "8", *words)
    assert code == 0
    texts = [row["workload"] for row in json.loads(out)]
    assert texts[0] == "q1s9 shape=llama-3-70b tp=8"
    assert texts[1] == "q1s9 layers=2 model=8192:3584:16032 shape=llama-3-70b tp=8"
    again = call("run", "q1s9 shape=llama-3-70b tp=8", *words)[1]
    assert [row["workload"] for row in json.loads(again)] == texts
    # DeepSeek's three dense layers come before those that are counted.
    out = call(
        "run", "q1s9 block=64", "--model", "deepseek-v3", "--tp=8", *words[:-1], "TORCH_MLA"
    )[1]
    assert [Workload.parse(row["workload"]).shape.num_layers for row in json.loads(out)] == [
        61,
        5,
        7,
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("q1", "--model", "llama-3-8b"), "--metric step"),
        (("q1", "--tp", "2"), "--metric step"),
        (("q1", "--step-layers", "2"), "--metric step"),
        (("q1", "--metric", "step", "--step-layers", "0"), "1 or more"),
        (("q1", "--metric", "step", "--model", "llama-3-9b"), "llama-3-9b"),
        (("q1", "--metric", "step", "--model", "gemma-3-27b"), "one dense kind"),
        (("q1 heads=4/2", "--metric", "step"), "no model's name"),
        (("q1 heads=4/2", "--metric", "step", "--model", "llama-3-8b"), "another layer"),
        (("q1 shape=falcon-7b", "--metric", "step"), "falcon-7b"),
        (("q1 shape=llama-3-70b tp=4", "--metric", "step", "--tp", "8"), "tp=4"),
        (("q1", "--metric", "step", "--tp", "0"), "1 or more"),
        (("q4", "attn=encoder", "--metric", "step"), "leave attn="),
    ],
)
def test_what_is_no_step_is_refused(call: Call, words: tuple[str, ...], said: str) -> None:
    code, out, err = call("run", *words, "--backend", "CPU_ATTN")
    assert (code, out) == (2, "")
    assert said in err
    assert not Path("results").exists()
