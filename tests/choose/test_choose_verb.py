"""The verb, from a results folder to its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnbench.backends.device import Device
from attnbench.choose.advice import parts_of
from attnbench.choose.rank import Part
from attnbench.choose.tries import Choice
from attnbench.choose.valid import matching, probed_default
from attnbench.cli.choose_measure import plan_of, runnable, totals
from attnbench.cli.choose_trace import shares_of_trace
from attnbench.cli.main import main
from attnbench.errors import UsageError
from attnbench.measure.environment import class_of_name
from attnbench.measure.peaks import COMPUTE_CAPABILITIES, PEAKS, capability_of_class
from attnbench.selection import resolve_device
from attnbench.traffic.reduced import TraceOptions
from attnbench.upgrade.batches import parse_batches
from attnbench.upgrade.cells import cell_of_shape
from attnbench.upgrade.models import cells_of_model
from attnbench.upgrade.probe import CellAnswer
from attnbench.workload import Workload, get_shape
from tests.choose.fake import FA3, FLASHINFER, FLEX, TRITON, ended, fill, timed
from tests.choose.verbs import exit_code

BATCH = ("--model", "llama-3-8b", "--batch", "32q1s4k")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "results",
        timed(FA3, 1.5e-4), timed(FLASHINFER, 1e-4), timed(TRITON, 3e-4),
        ended(FLEX, "INCORRECT"),
    )  # fmt: skip


def call(*arguments: str) -> int:
    return exit_code("choose", *arguments)


def test_an_answer_is_exit_0_and_is_saved(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "choices.json"
    code = call(*BATCH, "--device", "nvidia-h200", "--results", str(results), "--save", str(table))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "whole mix: FLASHINFER:FA3, before FLASH_ATTN:FA3 +50.0 %" in printed.out
    assert "wrong result on 32q1s4k (INCORRECT): made up" in printed.out
    assert "regret +50.0 %" in printed.out
    assert "--attention-backend FLASHINFER" in printed.out
    assert json.loads(table.read_text(encoding="utf-8"))["scope"]["device_class"] == "nvidia-h200"


def test_it_does_not_load_on_this_machine(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "choices.json"
    call(*BATCH, "--device", "nvidia-h200", "--results", str(results), "--save", str(table))
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "--log", str(table), "--choices", str(table)])
    assert stopped.value.code == 2
    assert "--log" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "8q1s1k", "--choices", str(table)])
    assert stopped.value.code == 2
    assert "does not hold here: it is for device class nvidia-h200" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["json", "csv", "markdown"])
def test_formats(results: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(*BATCH, "--device", "sm90", "--results", str(results), "--format", format)
    assert code == 0
    out = capsys.readouterr().out
    if format == "json":
        assert json.loads(out)["default"]["regret"]["ratio"] == pytest.approx(1.5)
    assert "FLASHINFER:FA3" in out


def test_nothing_stored_is_exit_3_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(*BATCH, "--device", "sm90", "--results", str(tmp_path / "none"))
    assert code == 3
    assert "to measure: attnbench run 32q1s4k --backend" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nvidia-h200", "NVIDIA H200"])
def test_a_known_device_without_times_is_no_unknown_device(
    tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = fill(tmp_path / "h100", timed(FA3, 1e-4, device_class="nvidia-h100-80gb-hbm3"))
    for folder in (tmp_path / "none", stored):
        code = call(*BATCH, "--device", device, "--results", str(folder), "--format", "json")
        printed = capsys.readouterr()
        assert code == 3, printed.err
        assert json.loads(printed.out)["verdict"] == "not measured"
        assert (
            "to measure: attnbench run 32q1s4k --backend FLASHINFER:FA3 --backend FLASH"
            in printed.err
        )


def test_every_known_device_can_be_asked_about() -> None:
    assert COMPUTE_CAPABILITIES.keys() == PEAKS.keys()
    for name, capability in COMPUTE_CAPABILITIES.items():
        assert (
            str(resolve_device(capability_of_class(class_of_name(name))).capability) == capability
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama-3-8b"], "give --batch, --suite or --trace"),
        (["--model", "llama-3-9b", "--batch", "8q1s1k"], "unknown model"),
        ([*BATCH, "--device", "h9000"], "classes with stored times: none"),
        ([*BATCH, "--device", "sm90", "--timer", "clock"], "clock"),
        ([*BATCH, "--device", "sm90", "--l2", "warm"], "warm"),
        ([*BATCH, "--confidence", "1.5"], "--confidence"),
        ([*BATCH, "--budget-s", "nan"], "--budget-s"),
        ([*BATCH, "--tp", "0"], "--tp"),
        ([*BATCH, "--tp", "3", "--device", "sm90"], "3"),
        ([*BATCH, "--device", "sm90", "--engine", "torch==2.0"], "name a vLLM"),
        ([*BATCH, "--device", "sm90", "--measure"], "this machine is"),
        ([*BATCH, "--device", "nvidia-h200", "--measure"], "the question is of nvidia-h200"),
        ([*BATCH, "--sort-arrivals"], "--sort-arrivals is of a trace"),
        ([*BATCH, "--headroom", "4"], "--headroom is of a trace"),
        (["--model", "llama-3-8b", "--batch", "-1*8q1s1k"], "-1"),
    ],
)
def test_bad_input_is_exit_2_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments, "--results", str(tmp_path / "none")) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


# --- the engine's answer -------------------------------------------------------------------------
def answer(backend: str | None, **behind: Any) -> CellAnswer:
    return CellAnswer(
        cell=cell_of_shape(get_shape("llama-3-8b")), backend=backend, backend_class=None,
        behind=behind, candidates=(), refused="everything refuses", depends_on=(), untrusted=(),
        not_evaluated=(), not_asked=(), model_override="",
    )  # fmt: skip


def test_a_probed_default_is_found_by_its_kernels() -> None:
    workloads = {"32q1s4k": Workload.parse("32q1s4k")}
    default = probed_default("vLLM 0.30.0", answer("FLASH_ATTN", flash_attn_version=2), workloads,
                             "9.0")  # fmt: skip
    stored = [Choice("FLASH_ATTN", "FA3"), Choice("FLASH_ATTN", "FA2", 64),
              Choice("FLASH_ATTN", "FA2", 32)]  # fmt: skip
    assert matching(default, "32q1s4k", stored, 16) == Choice("FLASH_ATTN", "FA2", 32)
    assert matching(default, "q2k", stored, 16) is None
    assert probed_default("vLLM", answer(None), workloads, "9.0").why == "everything refuses"
    unknown = probed_default("vLLM", answer("FLASH_ATTN"), workloads, "9.0")
    assert "version of FlashAttention is not known" in unknown.why


# --- a trace ---------------------------------------------------------------------------------
@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    lines = [f"{i * 0.2:.3f},{100 + 37 * (i % 11)},{20 + i % 5}" for i in range(120)]
    path.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return path


def test_the_mix_of_a_trace(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cell,) = cells_of_model("llama-3-8b")
    options = TraceOptions(representatives=16)
    shares = shares_of_trace(trace, "llama-3-8b", cell, 1, "nvidia-h200", options)
    assert "batches stand for them" in capsys.readouterr().err
    steps = sum(share.weight for share in shares)
    assert steps >= 2000
    folder = fill(
        tmp_path / "results",
        *(
            timed(who, seconds, share.text)
            for share in shares
            for who, seconds in ((FA3, 2e-4), (FLASHINFER, 1e-4), (TRITON, 3e-4), (FLEX, 9e-4))
        ),
    )
    where = ("--device", "nvidia-h200", "--results", str(folder), "--format", "json")
    mix = ("--trace", str(trace), "--representatives", "16")
    code = call("--model", "llama-3-8b", *where, *mix)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    answer = json.loads(printed.out)
    assert answer["rankings"][0]["winner"] == "FLASHINFER:FA3"
    assert answer["default"]["regret"]["ratio"] == pytest.approx(2.0)


def test_a_trace_is_told_as_to_traffic(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same options in the same words give the same batches."""
    head, *rows = trace.read_text().splitlines()
    trace.write_text("\n".join([head, *reversed(rows)]))
    words = (str(trace), "--sort-arrivals", "--trace-format", "csv", "--max-model-len", "480",
             "--requests", "110", "--rate-scale", "0.5", "--representatives", "32")  # fmt: skip
    with pytest.raises(SystemExit):
        main(["traffic", *words, "--format", "json"])
    batches = {row["workload"] for row in json.loads(capsys.readouterr().out) if row["weight"] > 0}
    where = ("--device", "nvidia-h200", "--results", str(tmp_path / "none"), "--format", "json")
    assert call("--model", "llama-3-8b", *where, "--trace", *words) == 3
    printed = capsys.readouterr()
    assert {row["batch"] for row in json.loads(printed.out)["batches"]} == batches
    assert "10 too long" in printed.err


def test_a_trace_needs_a_clock(trace: Path, tmp_path: Path) -> None:
    (cell,) = cells_of_model("llama-3-8b")
    with pytest.raises(UsageError, match=r"--device cpu-x: no published peaks of it, .*H200"):
        shares_of_trace(trace, "llama-3-8b", cell, 1, "cpu-x", TraceOptions())
    code = call("--model", "llama-3-8b", "--device", "cpu", "--trace", str(tmp_path / "absent"),
                "--results", str(tmp_path / "r"))  # fmt: skip
    assert code == 2


# --- what a round measures -----------------------------------------------------------------------
@pytest.fixture
def parts() -> tuple[Part, ...]:
    return parts_of(cells_of_model("llama-3-8b"), parse_batches(["3*4q1s64", "q64"]))


def test_a_round_is_the_weighted_total_of_every_batch(parts: tuple[Part, ...]) -> None:
    plans = {"CPU_ATTN": plan_of(Choice("CPU_ATTN"), parts),
             "TORCH_SDPA": plan_of(Choice("TORCH_SDPA", "math", 32), parts)}  # fmt: skip
    assert plans["TORCH_SDPA"][0].workload.block_size == 32
    rows = [
        {"point_id": plan[0].point_id, "status": "OK", "samples": [1.0, 2.0, 9.0]}
        for plan in plans.values()
    ]
    rows.append({"point_id": plans["CPU_ATTN"][1].point_id, "status": "NOISY", "samples": [5.0]})
    rows.append({"point_id": plans["TORCH_SDPA"][1].point_id, "status": "CRASH", "samples": []})
    seconds, failed = totals(list(plans), plans, parts, rows)
    assert seconds == {"CPU_ATTN": 32 * (3 * 2.0 + 5.0)}
    assert list(failed) == ["TORCH_SDPA"]
    assert failed["TORCH_SDPA"].startswith("CRASH on q64")


def test_who_runs_on_a_cpu(parts: tuple[Part, ...]) -> None:
    names = {one.backend for one in runnable(parts, Device("cpu"), 0)}
    assert {"CPU_ATTN", "TORCH_SDPA"} <= names
    assert "TRITON_ATTN" not in names  # interpreted: no times


@pytest.mark.slow
def test_measured_here_with_made_up_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call("--model", "llama-3-8b", "--device", "cpu", "--batch", "1q1s32", "--timer", "fake",
                "--measure", "--budget-s", "1", "--results", str(tmp_path / "r"))  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "with a probability of at least 95%" in printed.err
    assert "made-up times" in printed.out


def test_the_block_nearest_to_the_engines_is_its_default() -> None:
    default = probed_default("vLLM 0.30.0", answer("FLASH_ATTN", flash_attn_version=2),
                             {"32q1s4k": Workload.parse("32q1s4k")}, "9.0")  # fmt: skip
    stored = [Choice("FLASH_ATTN", "FA2", 32), Choice("FLASH_ATTN", "FA2", 64)]
    assert matching(default, "32q1s4k", stored, 64) == Choice("FLASH_ATTN", "FA2", 64)


@pytest.mark.parametrize("format", ["table", "markdown"])
def test_stored_names_are_no_commands_to_the_terminal(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = ("\x1b[31mEVIL\x9b", "")
    folder = fill(tmp_path / "results", timed(evil, 1e-4), timed(FA3, 2e-4),
                  timed(TRITON, 1e-4, stack=("torch==2.12.0\x1b]0;x",)))  # fmt: skip
    call(*BATCH, "--device", "nvidia-h200", "--results", str(folder), "--format", format)
    printed = capsys.readouterr()
    assert r"\x1b[31mEVIL\x9b" in printed.out
    assert not {"\x1b", "\x9b"} & set(printed.out + printed.err)
