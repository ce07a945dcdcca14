"""`attnbench itl`: against latencies counted by hand, from a results folder to its exit code."""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from attnbench.choose.itl import ROOFLINE
from attnbench.workload import Workload, load_suites
from attnbench.workload.ranges import expand_ranges
from tests.choose.day import EVERY, REQUESTS, RESULTS, STEP_S, TOKENS, constant, rows_of
from tests.choose.fake import FA3, FLASHINFER, LAYERS, TRITON, ended, fill, timed
from tests.choose.verbs import Call


def test_constant_steps_are_the_latency_and_the_throughput(call: Call, batches: list[str]) -> None:
    fill(
        RESULTS,
        constant(FA3, batches, [STEP_S / LAYERS] * 3),
        constant(TRITON, batches, [0.5 * STEP_S / LAYERS] * 3),
    )
    asked = ("--backend", "FLASH_ATTN:FA3", "--backend", "TRITON_ATTN")
    code, out, err = call("day.csv", *EVERY, *asked, "--timer", "fake", "-f", "json")
    assert code == 0, err
    assert "timer fake" in err
    assert json.loads(out)["scope"] == "attention only"
    found = rows_of(out)
    assert list(found) == ["TRITON_ATTN", "FLASH_ATTN:FA3", ROOFLINE]
    for name, step_s in (("FLASH_ATTN:FA3", STEP_S), ("TRITON_ATTN", STEP_S / 2)):
        one = found[name]
        for column in ("itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_p50_ms", "ttft_p99_ms"):
            for limit in ("value", "low", "high"):
                assert one[column][limit] == pytest.approx(1e3 * step_s, rel=1e-6), column
        assert one["ttft_attention_pct"]["value"] == pytest.approx(100)
        # The last request comes at 299 s and takes a step a token.
        seconds = REQUESTS - 1 + TOKENS * step_s
        assert one["tokens_per_s"]["value"] == pytest.approx(REQUESTS * TOKENS / seconds)
        assert one["tokens_per_busy_s"]["value"] == pytest.approx(1 / step_s)
        assert one["steps"] == REQUESTS * TOKENS
        assert one["extrapolated_pct"] == 0
        assert one["left_out_error_pct"] == pytest.approx(0, abs=1e-6)
        assert one["replicates"] == 3
    assert found[ROOFLINE]["is_bound"]
    assert 0 < found[ROOFLINE]["itl_p50_ms"]["value"] < 32
    assert found[ROOFLINE]["itl_p50_ms"]["low"] is None


def test_the_rest_of_a_step_is_added_and_labelled(call: Call, batches: list[str]) -> None:
    """One token of Llama 3 8B reads its 7.5e9 weights outside the embedding once, at 4.8 TB/s."""
    fill(RESULTS, constant(FA3, batches, [STEP_S / LAYERS] * 3))
    words = ("--representatives", "24", "--timer", "fake", "-f", "json")
    code, out, err = call("day.csv", *words)
    assert code == 0, err
    assert json.loads(out)["scope"] == "attention, and linear layers at the roofline"
    found = rows_of(out)["FLASH_ATTN:FA3"]
    projections = 4096 * 128 * (2 * 32 + 2 * 8)
    weights = 32 * (projections + 3 * 4096 * 14336) + 4096 * 128256
    rest_s = 2 * weights / 4.8e12
    assert found["itl_p50_ms"]["value"] == pytest.approx(1e3 * (STEP_S + rest_s), rel=1e-6)
    assert found["ttft_attention_pct"]["value"] < 99


def test_errors_of_the_parts_reach_the_result(call: Call, batches: list[str]) -> None:
    """Processes that differ widen the limits, and so do batches that predict each other badly."""
    layer_s = STEP_S / LAYERS
    uneven = [
        row
        for index, text in enumerate(batches)
        for row in timed(TRITON, [layer_s * (1 + index % 2)] * 3, text, timer="fake")
    ]
    noisy = constant(FA3, batches, [0.8 * layer_s, layer_s, 1.2 * layer_s])
    fill(RESULTS, noisy, uneven, constant(FLASHINFER, batches, [layer_s]))
    code, out, err = call("day.csv", *EVERY, "--timer", "fake", "-f", "json")
    assert code == 0, err
    found = rows_of(out)
    for name in ("FLASH_ATTN:FA3", "TRITON_ATTN"):
        for column in ("itl_p50_ms", "ttft_p99_ms", "tokens_per_busy_s"):
            one = found[name][column]
            # A p99 over batches that are wrong each on its own only grows by it.
            assert one["low"] <= one["value"] <= one["high"], (name, column)
            assert one["low"] < 0.99 * one["high"], (name, column)
    assert found["TRITON_ATTN"]["left_out_error_pct"] > 5
    one = found["FLASHINFER:FA3"]["itl_p50_ms"]
    assert one["high"] == pytest.approx(one["low"])
    assert "FLASHINFER:FA3: a batch was timed by one process" in err
    assert "FLASH_ATTN:FA3: a batch" not in err


def test_slower_steps_make_larger_batches_and_that_is_said(call: Call, batches: list[str]) -> None:
    """Two seconds a step for a request a second: the closed loop piles them up."""
    fill(RESULTS, constant(FA3, batches, [2.0 / LAYERS] * 3))
    code, out, err = call("day.csv", *EVERY, "--timer", "fake", "-f", "json")
    assert code == 0, err
    found = rows_of(out)["FLASH_ATTN:FA3"]
    assert found["itl_p50_ms"]["value"] == pytest.approx(2000, rel=1e-6)
    assert found["steps"] < REQUESTS
    assert found["tokens_per_busy_s"]["value"] > 5
    assert found["extrapolated_pct"] > 50
    assert "extrapolated" in err


def test_what_is_not_measured_is_exit_3_with_one_command(call: Call, batches: list[str]) -> None:
    layer_s = [STEP_S / LAYERS] * 3
    fill(
        RESULTS,
        constant(FA3, batches[1:], layer_s),
        ended(FA3, "NOISY", batches[0], timer="fake"),
        constant(FLASHINFER, batches[2:], layer_s),
        ended(FLASHINFER, "INCORRECT", batches[0], timer="fake"),
        constant(TRITON, batches, layer_s),
    )
    words = ("day.csv", *EVERY, "--timer", "fake", "-f", "json")
    asked = [f"--backend={name}" for name in ("FLASH_ATTN:FA3", "FLASHINFER", "TRITON_ATTN")]
    code, out, err = call(*words, *asked)
    assert code == 3
    assert list(rows_of(out)) == ["TRITON_ATTN", ROOFLINE]
    assert f"FLASH_ATTN:FA3: of {len(batches)} batches: 1 NOISY: made up" in err
    assert f"FLASHINFER:FA3: of {len(batches)} batches: 1 INCORRECT: made up; 1 not measured" in err
    command = shlex.split(json.loads(out)["measure"])
    assert command[:2] == ["attnbench", "run"]
    assert {Workload.parse(text).text for text in expand_ranges(command[2])} == set(batches[:2])
    assert command[3:] == [
        *("--backend", "FLASH_ATTN:FA3", "--backend", "FLASHINFER:FA3", "--replicates", "3"),
        *("--timer", "fake"),
    ]
    # Nobody asked for the two: an answer without them is whole.
    assert call(*words)[0] == 0
    # Another timer's, another device's, or another tensor-parallel size's times are not these.
    for other in (("--timer", "event"), ("--device", "NVIDIA B200"), ("--tp", "8")):
        code, out, err = call(*words, "--backend", "TRITON_ATTN", *other)
        assert code == 3, other
        assert "TRITON_ATTN: not measured here" in err
        assert list(rows_of(out)) == [ROOFLINE]


def test_the_suite_to_measure_is_of_the_trace_as_it_was_read(call: Call, trace: Path) -> None:
    head, *rows = trace.read_text(encoding="utf-8").splitlines()
    trace.write_text("\n".join([head, *reversed(rows)]), encoding="utf-8")
    words = ("--representatives", "300", "--sort-arrivals", "--max-model-len", "3000")
    code, _, err = call("day.csv", *words)
    assert code == 0, err
    command = shlex.split(err.split("to measure: ")[1])
    assert command[command.index("--sort-arrivals") + 1] == "--max-model-len"
    Path("suites").mkdir()
    assert call(*command[2 : command.index("&&")], verb="traffic")[0] == 0
    code, _, err = call("day.csv")
    assert code == 2
    assert "--sort-arrivals" in err


def test_nothing_stored_is_the_lower_bound_and_the_suite_to_measure(call: Call) -> None:
    words = ("--representatives", "300", "--tp", "8", "--rate-scale", "2.0")
    code, out, err = call("day.csv", *words, "-f", "csv")
    assert code == 0, err
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["backend"] == ROOFLINE
    assert float(row["itl_p50_ms"]) > 0
    assert row["itl_p50_ms_low"] == ""
    command = err.split("to measure: ")[1].strip()
    first, _, second = command.partition(" && ")
    assert second == "attnbench run --suite day --preset full --replicates 3"
    Path("suites").mkdir()
    assert call(*shlex.split(first)[2:], verb="traffic")[0] == 0
    suite = load_suites(Path("suites"))["day"]
    bound = json.loads(call("day.csv", *words, "-f", "json")[1])
    assert bound["batches"] == len(suite.workloads("full"))
    assert not Path("results").exists()


@pytest.mark.parametrize("format", ["table", "markdown"])
def test_limits_stand_behind_the_number(call: Call, batches: list[str], format: str) -> None:
    fill(RESULTS, constant(FA3, batches, [STEP_S / LAYERS] * 3))
    code, out, _ = call("day.csv", *EVERY, "--device", "nvidia-h200", "--timer=fake", "-f", format)
    assert code == 0
    assert "64 [64, 64]" in out
    assert out.rstrip().splitlines()[-1].strip("| ").startswith(ROOFLINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.csv",), "none.csv"),
        (("day.csv", "--backend", "FLASH_ATN"), "FLASH_ATN"),
        (("day.csv", "--device", "NVIDIA H2000"), "no published peaks"),
        (("day.csv", "--model", "gemma-2-9b"), "are not known"),
        (("day.csv", "--model", "llama-3-9b"), "llama-3-9b"),
        (("day.csv", "--tp", "3"), "3"),
        (("day.csv", "--tp", "0"), "0"),
        (("day.csv", "--layer", "blok=1"), "blok"),
        (("day.csv", "--requests", "-1"), "-1"),
        (("day.csv", "--rate-scale", "nan"), "rate scale"),
        (("day.csv", "--representatives", "2"), "16 or more"),
        (("day.csv", "--representatives", "16"), "allow more of them"),
        (("day.csv", "--timer", "sundial"), "sundial"),
        (("day.csv", "--l2", "warm"), "warm"),
    ],
)
def test_bad_input_is_exit_2_in_one_line(call: Call, words: tuple[str, ...], said: str) -> None:
    code, out, err = call(*words)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_one_noisy_process_among_many_bars_nobody(call: Call, batches: list[str]) -> None:
    layer_s = STEP_S / LAYERS
    steady = constant(FA3, batches, [layer_s] * 3)
    steady[0] = replace(steady[0], status="NOISY")
    restless = [
        replace(row, status="NOISY") if row.replicate == 0 else row
        for row in constant(TRITON, batches, [layer_s] * 3)
    ]
    fill(RESULTS, steady, restless)
    asked = ("--backend", "FLASH_ATTN:FA3", "--backend", "TRITON_ATTN")
    code, out, err = call("day.csv", *EVERY, *asked, "--timer", "fake", "-f", "json")
    assert code == 3
    assert list(rows_of(out)) == ["FLASH_ATTN:FA3", ROOFLINE]
    number = len(batches)
    assert f"TRITON_ATTN: of {number} batches: {number} NOISY: in all {number} of" in err
    assert json.loads(out)["measure"]
