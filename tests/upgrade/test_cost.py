"""Costs of changed defaults: what is joined, how it is judged, and what is said to be missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.errors import ExitCode
from attnbench.history.rule import Estimate
from attnbench.store import ResultsFolder
from attnbench.store.header import RunHeader
from attnbench.upgrade.batches import parse_batches
from attnbench.upgrade.cells import cell_of_shape
from attnbench.upgrade.compare import ChangeKind
from attnbench.upgrade.cost import CostVerdict, judge_costs, weighted_ratio
from attnbench.upgrade.cost_report import brace, cost_texts, costs_json, measure_command
from attnbench.upgrade.stored import StoredTimes
from attnbench.workload import get_shape
from attnbench.workload.suite import expand_workloads
from tests.history.fake import row
from tests.upgrade.fake_costs import (
    FA_TO_TRITON,
    LLAMA,
    NATIVE,
    ON_H200,
    XQA,
    answer,
    change,
    judged,
    rows,
    step,
    stored,
)


# --- what is joined -------------------------------------------------------------------------------
def test_both_sides_of_one_run_are_joined() -> None:
    cost = judged(stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 1.3e-4)))
    assert cost.verdict is CostVerdict.SLOWER
    assert cost.exit_code is ExitCode.REGRESSION
    assert cost.ratio is not None
    assert cost.ratio.ratio == pytest.approx(1.3)
    assert 1.15 < cost.ratio.low < 1.3 < cost.ratio.high < 1.45
    assert "slower, +30.0 %" in cost_texts([cost])[FA_TO_TRITON.change_id]


@pytest.mark.parametrize(
    "other",
    [
        {"device_class": "nvidia-h100"},
        {"compute_capability": "10.0"},
        {"timer": "graph"},
        {"l2_state": "hot"},
        {"execution": "graph"},
        {"protocol_version": 0},
        {"variant": "FA2"},
        {"workload": "32q1s4k block=32"},
        {"workload": "32q1s4k seed=1"},
    ],
    ids=str,
)
def test_what_was_not_measured_alike_is_never_joined(other: dict[str, Any]) -> None:
    before = rows("FLASH_ATTN", 1e-4, **{"variant": "FA3", **other})
    cost = judged(stored(before, rows("TRITON_ATTN", 1.3e-4)))
    assert cost.verdict is CostVerdict.NOT_MEASURED
    assert cost.exit_code is ExitCode.UNDECIDED


def test_one_run_counts_before_newer_ones_of_one_side_each() -> None:
    together = [rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 1e-4)]
    apart = [rows("FLASH_ATTN", 1e-4, "FA3", run=1), rows("TRITON_ATTN", 2e-4, run=2)]
    assert judged(stored(*together, *apart)).verdict is CostVerdict.SAME
    cost = judged(stored(*apart))
    assert cost.verdict is CostVerdict.SLOWER
    assert any("different runs" in note for note in cost.notes)


def test_a_published_run_is_joined_with_itself_only() -> None:
    one = rows("FLASH_ATTN", 1e-4, "FA3", run=1)
    other = rows("TRITON_ATTN", 2e-4, run=2)
    assert judged(stored(one, other, published=[one[0].run_id])).ratio is None
    both = stored(one, rows("TRITON_ATTN", 2e-4, run=1), published=[one[0].run_id])
    assert judged(both).verdict is CostVerdict.SLOWER


def test_what_a_version_deploys_counts_before_our_adapters() -> None:
    ours = [rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4)]
    old = rows("VLLM:FLASH_ATTN", 1e-4, run=1, stack=("vllm==0.22.1",))
    new = rows("VLLM:TRITON_ATTN", 0.8e-4, run=2, stack=("vllm==0.33.0",))
    assert judged(stored(*ours, old, new)).verdict is CostVerdict.FASTER
    elsewhere = rows("VLLM:TRITON_ATTN", 0.8e-4, run=2, stack=("vllm==0.30.0",))
    assert judged(stored(*ours, old, elsewhere)).verdict is CostVerdict.SLOWER
    assert judged(stored(ours[0], new)).ratio is None  # theirs against ours: adapters differ


def test_made_up_times_are_no_measurement(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    assert judged(StoredTimes.read(folder)).verdict is CostVerdict.NOT_MEASURED
    measured = [*rows("FLASH_ATTN", 1e-4, "FA3", timer="fake", l2_state=""),
                *rows("TRITON_ATTN", 2e-4, timer="fake", l2_state="")]  # fmt: skip
    header = RunHeader.new(argv=(), spec="", plan=(), options={}, environment={})
    with folder.open_run(header) as run:
        for one in measured:
            run.append(replace(one, run_id=run.run_id))
        run.seal()
    assert judged(StoredTimes.read(folder)).ratio is None
    assert judged(StoredTimes.read(folder, "fake")).verdict is CostVerdict.SLOWER


# --- how it is judged -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("factor", "replicates", "verdict", "code"),
    [
        (0.7, 3, CostVerdict.FASTER, ExitCode.OK),
        (1.005, 3, CostVerdict.SAME, ExitCode.OK),
        (1.03, 3, CostVerdict.UNDECIDED, ExitCode.UNDECIDED),
        (2.0, 1, CostVerdict.UNDECIDED, ExitCode.UNDECIDED),
    ],
)
def test_verdicts(factor: float, replicates: int, verdict: CostVerdict, code: ExitCode) -> None:
    before = rows("FLASH_ATTN", 1e-4, "FA3", replicates=replicates)
    cost = judged(stored(before, rows("TRITON_ATTN", factor * 1e-4, replicates=replicates)))
    assert (cost.verdict, cost.exit_code) == (verdict, code)


@pytest.mark.parametrize(
    ("weights", "verdict"), [((9, 1), CostVerdict.SLOWER), ((1, 9), CostVerdict.FASTER)]
)
def test_the_mix_decides(weights: tuple[int, int], verdict: CostVerdict) -> None:
    times = stored(
        rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4),
        rows("FLASH_ATTN", 2e-4, "FA3", workload="q2k"),
        rows("TRITON_ATTN", 1e-4, workload="q2k"),
    )  # fmt: skip
    cost = judged(times, batches=(f"{weights[0]}*32q1s4k", f"{weights[1]}*q2k"))
    before = weights[0] * 1e-4 + weights[1] * 2e-4
    after = weights[0] * 2e-4 + weights[1] * 1e-4
    assert cost.ratio is not None
    assert cost.ratio.ratio == pytest.approx(after / before)
    assert cost.verdict is verdict


def test_a_models_layers_are_weighed_by_their_number() -> None:
    names = ("gpt-oss-20b", "gpt-oss-20b-local", "gemma-3-27b", "gemma-3-27b-local")
    cells = [cell_of_shape(get_shape(name)) for name in names]
    layers = [get_shape(name).num_layers for name in names]
    assert layers[2] != layers[3]
    changes = [
        change(answer(one, "FLASH_ATTN", flash_attn_version=3), answer(one, "TRITON_ATTN"))
        for one in cells
    ]
    factors = (1.0, 1.0, 4.0, 0.5)
    times = stored(
        *(
            group
            for name, factor in zip(names, factors, strict=True)
            for group in (
                rows("FLASH_ATTN", 1e-4, "FA3", workload=f"32q1s4k shape={name}"),
                rows("TRITON_ATTN", factor * 1e-4, workload=f"32q1s4k shape={name}"),
            )
        )
    )
    costs = judge_costs([step(*changes)], parse_batches(["32q1s4k"]), times)
    assert len(costs) == 2  # a model each
    assert costs[0].ratio is not None
    assert costs[1].ratio is not None
    assert costs[0].ratio.ratio == pytest.approx(1.0)
    expected = (layers[2] * 4.0 + layers[3] * 0.5) / (layers[2] + layers[3])
    assert costs[1].ratio.ratio == pytest.approx(expected)


def test_limits_of_a_mix_are_weighted_sums() -> None:
    found = weighted_ratio([Estimate(2.0, 1.5, 3.0), Estimate(1.0, 0.9, 1.1)], [3.0, 1.0])
    assert (found.ratio, found.low, found.high) == pytest.approx((1.75, 1.35, 2.525))
    one_sided = [Estimate(2.0, 2.0, 2.0, enough=False), Estimate(1.0, 0.9, 1.1)]
    assert not weighted_ratio(one_sided, [1.0, 1.0]).enough


def test_doubt_about_the_change_is_never_a_regression() -> None:
    times = stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4))
    doubtful = replace(FA_TO_TRITON, after=answer(LLAMA, "TRITON_ATTN", ("no torch",)))
    cost = judged(times, doubtful)
    assert (cost.verdict, cost.exit_code) == (CostVerdict.SLOWER, ExitCode.UNDECIDED)


def test_lost_support_is_a_regression_and_a_gain_is_not_judged() -> None:
    lost = change(answer(LLAMA, "FLASH_ATTN", flash_attn_version=3), answer(LLAMA, None),
                  kind=ChangeKind.LOST)  # fmt: skip
    assert judged(stored(), lost).exit_code is ExitCode.REGRESSION
    gained = change(answer(LLAMA, None), answer(LLAMA, "TRITON_ATTN"), kind=ChangeKind.GAINED)
    assert judge_costs([step(gained)], parse_batches(["32q1s4k"]), stored()) == []


def test_behind_a_name_only_other_kernels_are_judged() -> None:
    graphs = change(
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3, cudagraph_support="NEVER"),
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3, cudagraph_support="ALWAYS"),
        kind=ChangeKind.BEHIND,
    )
    assert judge_costs([step(graphs)], parse_batches(["32q1s4k"]), stored()) == []
    latent = cell_of_shape(get_shape("deepseek-v3"))
    layout = change(
        answer(latent, "FLASHINFER_MLA", kv_cache_layout="HND"),
        answer(latent, "FLASHINFER_MLA"),
        kind=ChangeKind.BEHIND,
    )
    assert judge_costs([step(layout)], parse_batches(["32q1s4k"]), stored()) == []
    version = change(
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=2),
        answer(LLAMA, "FLASH_ATTN", flash_attn_version=3),
        kind=ChangeKind.BEHIND,
    )
    times = stored(rows("FLASH_ATTN", 1e-4, "FA2"), rows("FLASH_ATTN", 0.6e-4, "FA3"))
    assert judged(times, version).verdict is CostVerdict.FASTER
    trtllm = change(
        answer(LLAMA, "FLASHINFER", **NATIVE),
        answer(LLAMA, "FLASHINFER", **XQA),
        kind=ChangeKind.BEHIND,
    )
    # Both sides prefill by the same kernels.
    assert judged(stored(), trtllm, batches=("q2k",)).verdict is CostVerdict.SAME
    assert judged(stored(), trtllm).verdict is CostVerdict.NOT_MEASURED


def test_a_failed_try_is_told() -> None:
    failed = [row(backend="FLASH_ATTN", variant="FA3", workload="32q1s4k", status="INCORRECT",
                  seconds=None, **ON_H200)]  # fmt: skip
    cost = judged(stored(failed, rows("TRITON_ATTN", 2e-4)))
    assert "FLASH_ATTN:FA3 ended as INCORRECT" in cost.why


# --- what is missing ------------------------------------------------------------------------------
def test_the_command_measures_what_is_missing() -> None:
    cost = judged(
        stored(rows("FLASH_ATTN", 1e-4, "FA3"), rows("TRITON_ATTN", 2e-4)),
        batches=("32q1s4k", "q2k", "8q1s1k"),
    )
    command = measure_command(cost, FA_TO_TRITON)
    assert command == (
        "attnbench run '{q2k,8q1s1k}' --backend FLASH_ATTN:FA3 --backend TRITON_ATTN --replicates 3"
    )
    (told,) = costs_json([cost])[FA_TO_TRITON.change_id]
    assert told["measure"] == command
    assert [one["ratio"] is None for one in told["batches"]] == [False, True, True]


def test_one_text_stands_for_all() -> None:
    texts = ["32q1s4k shape=qwen3-8b", "q2k block=64 layout=HND shape=qwen3-8b"]
    text = brace(texts)
    assert text is not None
    assert {one.text for one in expand_workloads([text])} >= set(texts)
    assert brace(["q2k", "q2k lengths=geometric"]) is None
