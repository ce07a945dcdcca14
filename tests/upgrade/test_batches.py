"""Batches of a mix: the workload each is on a cell, and the kernels that a version runs it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from attnbench.errors import UsageError
from attnbench.upgrade.batches import BatchShare, UnmeasurableError, parse_batches, workload_of
from attnbench.upgrade.cells import Cell, cell_of_shape
from attnbench.upgrade.kernels import own_kernels
from attnbench.workload import Workload, get_shape
from tests.upgrade.fake_costs import LLAMA, NATIVE, XQA, answer


def test_weights_and_braces() -> None:
    shares = parse_batches(["0.7*32q1s4k", "{1,2}q1s1k seed=3", "0.3*32q1s4096"])
    assert [(one.text, one.weight) for one in shares] == [
        ("32q1s4k", 1.0), ("q1s1k seed=3", 1.0), ("2q1s1k seed=3", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["0*32q1s4k", "32q1s4k shape=qwen3-8b", "32q1s4k dtype=fp16"])
def test_a_batch_is_no_layer_and_weighs_something(text: str) -> None:
    with pytest.raises(UsageError, match=r"--batch.*0\.7\*32q1s4k"):
        parse_batches([text])


def share(text: str) -> BatchShare:
    return parse_batches([text])[0]


@pytest.mark.parametrize(
    ("cell", "behind", "text"),
    [
        (LLAMA, {}, "32q1s4k"),
        (LLAMA, {"preferred_block_size": 64, "kv_cache_layout": "LBHNC, LBNHC"},
         "32q1s4k block=64 layout=HND"),
        (LLAMA, {"kv_cache_layout": "LBNHC, LBHNC"}, "32q1s4k"),
        (cell_of_shape(get_shape("llama-3-70b", 4), kv_cache_dtype="fp8", block_size=32),
         {"preferred_block_size": 64}, "32q1s4k block=32 kv=fp8_e4m3 shape=llama-3-70b tp=4"),
        (Cell(head_size=64, sinks=True, sliding_window=128), {},
         "32q1s4k head_size=64 heads=32/8 sinks=1 window=128"),
        (Cell(head_size=256, softcap=True, hf_config={"attn_logit_softcapping": 30.0}), {},
         "32q1s4k head_size=256 heads=32/8 softcap=30"),
        (cell_of_shape(get_shape("deepseek-v3.2"), topk=2048),
         {"effective_kv_cache_dtype": "fp8_ds_mla"},
         "32q1s4k block=64 kv=fp8_ds_mla shape=deepseek-v3.2 topk=2048:random"),
    ],
)  # fmt: skip
def test_the_workload_of_a_cell(cell: Cell, behind: Mapping[str, Any], text: str) -> None:
    assert workload_of(cell, share("32q1s4k"), behind).text == Workload.parse(text).text


@pytest.mark.parametrize(
    "features",
    [{"dcp": 2}, {"mm_prefix": True}, {"kv_cache_dtype": "nvfp4"}, {"attn_type": "encoder"}],
)
def test_cells_that_no_workload_stands_for(features: dict[str, Any]) -> None:
    with pytest.raises(UnmeasurableError):
        workload_of(Cell(**features), share("32q1s4k"))


# --- kernels (the table of docs/flashinfer.md) ----------------------------------------------------
GEN: dict[str, Any] = dict.fromkeys(NATIVE, "TRTLLM_GEN")


@pytest.mark.parametrize(
    ("capability", "behind", "workload", "variants"),
    [
        ("9.0", NATIVE, "32q1s4k", ("FA3", "FA2")),
        ("9.0", NATIVE, "32q1s4k kv=fp8", ("FA2",)),
        ("9.0", NATIVE, "q2k", ("FA3",)),
        ("9.0", XQA, "32q1s4k", ("XQA",)),
        ("9.0", XQA, "q2k", ("FA3",)),
        ("12.0", XQA, "q2k_8q1s1k", ("XQA",)),
        ("8.0", NATIVE, "q2k_8q1s1k", ("FA2",)),
        ("10.0", GEN, "q2k_8q1s1k", ("TRTLLM_GEN",)),
        ("10.0", GEN, "q2k", ("TRTLLM_GEN",)),
    ],
)
def test_flashinfers_kernels_by_step(
    capability: str, behind: dict[str, Any], workload: str, variants: tuple[str, ...]
) -> None:
    asked = answer(LLAMA, "FLASHINFER", **behind)
    assert own_kernels(asked, Workload.parse(workload), capability).variants == variants


def test_a_mix_of_kernels_that_no_variant_has() -> None:
    asked = answer(LLAMA, "FLASHINFER", **XQA)
    with pytest.raises(UnmeasurableError, match="mix of prefill and decode"):
        own_kernels(asked, Workload.parse("q2k_8q1s1k"), "9.0")
