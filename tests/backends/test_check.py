"""Deliberately broken kernels are caught, right ones of every precision are not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.check import check_output, lse_tolerance, poison_, row_tolerance
from attnbench.backends.reference import ReferenceResult, reference_attention
from attnbench.workload import Workload
from tests.backends.broken_kernels import (
    CausalFromTheTopLeft,
    DoesNothing,
    ForgetsTheLastBlock,
    ForgetsTheLastHead,
    IgnoresKScale,
    IgnoresTheBlockTable,
    IgnoresTheBlockTableOfOne,
    IgnoresVScale,
    IsOneTokenStale,
    Kernel,
    RoundsTheScaledQuery,
    SeesOneTooFew,
    SeesOneTooMany,
    SwapsTwoRequests,
    WindowTooNarrow,
    WindowTooWide,
    WritesNothing,
    WritesToTheWrongSlot,
)
from tests.backends.layouts import small_workloads


def outcome(
    kernel: type[Kernel], batch: AttentionBatch, reference: ReferenceResult, poison: bool = True
) -> tuple[bool, str]:
    output = torch.zeros(reference.output.shape, dtype=batch.spec.dtype)
    if poison:
        poison_(output)
    running = kernel(batch)
    running.run(output)
    workload = batch.workload
    names = (workload.dtype, workload.resolved_kv_cache_dtype)
    check = check_output(output, reference, *names)
    if check.ok:
        check = check_output(output, reference, *names, running.lse)
    assert check.ok == (check.reason == "")
    return check.ok, check.reason


SPECS = {
    "decode": "4q1s300 heads=8/2 head_size=64",
    "decode at 4k": "2q1s4090 heads=8/2 head_size=64",
    "prefill": "q40_q130 heads=4/2 head_size=64",
    "mixed": "3q1s200_2q17s90 heads=4/1 head_size=64",
    "one head": "3q1s50 heads=1/1 head_size=16",
    "mla": "2q1s200_q5s90 heads=4/1 mla=32+16:16+16",
}
FORMATS = ["dtype=fp32", "dtype=fp16", "dtype=bf16", "dtype=bf16 kv=fp8_e4m3"]
#: The widest tolerances: what they catch, the others catch.
COARSE_FORMATS = FORMATS[2:]
BROKEN = [
    IgnoresTheBlockTable,
    IgnoresTheBlockTableOfOne,
    SeesOneTooMany,
    SeesOneTooFew,
    WritesToTheWrongSlot,
    WritesNothing,
    SwapsTwoRequests,
    ForgetsTheLastBlock,
    ForgetsTheLastHead,
    IsOneTokenStale,
    DoesNothing,
]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_right_kernel_passes(spec: str, fmt: str) -> None:
    batch = make_batch(Workload.parse(f"{SPECS[spec]} {fmt}"))
    assert outcome(Kernel, batch, reference_attention(batch)) == (True, "")
    assert outcome(RoundsTheScaledQuery, batch, reference_attention(batch)) == (True, "")


@pytest.mark.parametrize("fmt", COARSE_FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_wrong_lse_is_caught_beside_a_right_output(spec: str, fmt: str) -> None:
    batch = make_batch(Workload.parse(f"{SPECS[spec]} {fmt}"))
    reference = reference_attention(batch)
    names = (batch.workload.dtype, batch.workload.resolved_kv_cache_dtype)
    output = torch.zeros(reference.output.shape, dtype=batch.spec.dtype)
    kernel = Kernel(batch)
    kernel.run(output)
    right = kernel.lse

    def reason(lse: torch.Tensor) -> str:
        return check_output(output, reference, *names, lse).reason

    assert reason(right) == ""
    assert reason(right[:1]) == ""  # decode tokens only
    assert "LSE is off by" in reason(right / math.log(2))  # a log of base 2
    assert "LSE is off by" in reason(right - right.amax())  # forgot to add the largest logit
    unwritten = right.clone()
    unwritten[-1, -1] = torch.nan
    last = len(batch.requests) - 1
    assert f"LSE is off by nan, more than {lse_tolerance(*names):.3g}, in request {last}" in reason(
        unwritten
    )
    assert "LSE has shape" in reason(right[:, None])


def test_an_lse_of_float32_is_held_to_float32() -> None:
    batch = make_batch(Workload.parse(f"{SPECS['decode']} dtype=fp32"))
    reference = reference_attention(batch)
    output = reference.output.float()
    assert check_output(output, reference, "fp32", "fp32", reference.lse.float()).ok
    assert not check_output(output, reference, "fp32", "fp32", reference.lse.float() + 1e-4).ok


@pytest.mark.parametrize("fmt", COARSE_FORMATS)
@pytest.mark.parametrize("spec", SPECS)
def test_broken_kernels_are_caught(spec: str, fmt: str) -> None:
    batch = make_batch(Workload.parse(f"{SPECS[spec]} {fmt}"))
    reference = reference_attention(batch)
    caught = {kernel.__name__: not outcome(kernel, batch, reference)[0] for kernel in BROKEN}
    assert all(caught.values()), caught


def test_reading_past_a_full_last_block_is_caught() -> None:
    """Behind a sequence of whole blocks the table is padded with the null block."""
    batch = make_batch(Workload.parse("q1s64_q1s96 heads=2/1 head_size=64"))
    assert not outcome(SeesOneTooMany, batch, reference_attention(batch))[0]


@pytest.mark.parametrize("fmt", COARSE_FORMATS)
@pytest.mark.parametrize("spec", ["4q1s300", "q700 window=256", "2q1s4000_q33s2000"])
def test_a_window_off_by_one_is_caught(spec: str, fmt: str) -> None:
    if "window" not in spec:
        spec += " window=128"
    batch = make_batch(Workload.parse(f"{spec} heads=2/1 head_size=64 {fmt}"))
    reference = reference_attention(batch)
    assert outcome(Kernel, batch, reference) == (True, "")
    assert not outcome(WindowTooWide, batch, reference)[0]
    assert not outcome(WindowTooNarrow, batch, reference)[0]


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("spec", ["decode", "prefill", "one head"])
def test_ignored_scales_are_caught(spec: str, kv_cache_dtype: str) -> None:
    batch = make_batch(Workload.parse(f"{SPECS[spec]} kv={kv_cache_dtype}"))
    reference = reference_attention(batch)
    assert not outcome(IgnoresKScale, batch, reference)[0]
    assert not outcome(IgnoresVScale, batch, reference)[0]


def test_a_mask_aligned_to_the_wrong_corner_is_caught() -> None:
    batch = make_batch(Workload.parse("2q17s90 heads=4/1 head_size=64"))
    assert not outcome(CausalFromTheTopLeft, batch, reference_attention(batch))[0]


def test_stale_output_needs_the_poison_only_where_it_is_right_by_chance() -> None:
    """A buffer that still holds an earlier, wrong output is caught; an earlier right one is not,
    which is why the output is poisoned before each check."""
    batch = make_batch(Workload.parse(SPECS["decode"]))
    reference = reference_attention(batch)
    assert not outcome(DoesNothing, batch, reference, poison=False)[0]
    right = reference.output.to(batch.spec.dtype)
    assert check_output(right, reference, "bf16", "bf16").ok
    DoesNothing(batch).run(poison_(right))
    check = check_output(right, reference, "bf16", "bf16")
    assert (check.ok, check.reason.split(" in ")[0]) == (False, "not finite or not written")


@settings(deadline=None, max_examples=40)
@given(small_workloads(mla=False, dtypes=("fp32", "fp16", "bf16")))
def test_rounding_the_truth_passes_and_a_swapped_row_does_not(workload: Workload) -> None:
    reference = reference_attention(make_batch(workload))
    names = (workload.dtype, workload.resolved_kv_cache_dtype)
    output = reference.output.to(
        {"fp32": torch.float32, "fp16": torch.float16}.get(workload.dtype, torch.bfloat16)
    )
    assert check_output(output, reference, *names).ok
    broken = output.clone()
    broken[-1, -1] += 2 * broken[-1, -1].abs().max() + 0.5
    check = check_output(broken, reference, *names)
    assert not check.ok
    last = len(workload.requests) - 1
    assert f"in request {last}, query token" in check.reason
    assert f"head {workload.shape.num_heads - 1}" in check.reason


def test_the_worst_place_and_the_errors_are_named() -> None:
    reference = ReferenceResult(
        output=torch.ones(5, 2, 4, dtype=torch.float64),
        lse=torch.zeros(5, 2, dtype=torch.float64),
        query_start_loc=torch.tensor([0, 2, 5]),
    )
    output = torch.ones(5, 2, 4)
    output[1, 0, 3] = 1.05
    output[3, 1, 2] = 0.75
    check = check_output(output, reference, "fp32", "fp32")
    assert not check.ok
    assert check.max_abs_error == pytest.approx(0.25)
    assert check.rel_error == pytest.approx(0.125)  # 0.25 against a row of norm 2
    assert "request 1, query token 1, head 1" in check.reason
    output[2, 1, 0] = float("inf")
    check = check_output(output, reference, "fp32", "fp32")
    assert check.reason == "not finite or not written in request 1, query token 0, head 1"
    check = check_output(output[:, :1], reference, "fp32", "fp32")
    assert check.reason == "output has shape (5, 1, 4), expected (5, 2, 4)"


def test_large_outputs_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 4, 8, generator=generator, dtype=torch.float64)
    reference = ReferenceResult(
        output=truth, lse=truth[..., 0], query_start_loc=torch.tensor([0, 20, 50])
    )
    output = truth.float()
    output[33, 2] += 0.5
    whole = check_output(output, reference, "fp32", "fp32")
    monkeypatch.setattr("attnbench.backends.check._CHUNK_ROWS", 7)
    assert check_output(output, reference, "fp32", "fp32") == whole
    assert "request 1, query token 13, head 2" in whole.reason


def test_tolerances_order_as_the_precisions_do() -> None:
    tolerances = [row_tolerance(d, d) for d in ("fp32", "fp16", "bf16")]
    assert tolerances == sorted(tolerances)
    assert tolerances[2] == pytest.approx(6 * 2**-8)
    assert row_tolerance("bf16", "fp8_e5m2") > row_tolerance("bf16", "bf16")
