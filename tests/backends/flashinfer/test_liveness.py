"""What each variant promises to launch, by phase: nothing else may pass for it."""

from __future__ import annotations

import re

import pytest

from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flashinfer import FlashInferBackend as Backend
from attnbench.backends.flashinfer_library import VARIANTS
from attnbench.measure.point import other_kernels
from attnbench.workload import Workload
from tests.backends.flashinfer.conftest import CURRENT, Install
from tests.backends.flashinfer.running import FlashInferRun
from tests.measure.gpu.test_liveness import row_with

SM80, SM90, SM100 = (cuda_device(major, 0) for major in (8, 9, 10))
#: Demangled names: FlashInfer's as the sources of 0.6.11.post2 give them, TRTLLM-GEN's as profiles
#: of serving engines show them.
LAUNCHED = {
    "fa2": "void flashinfer::BatchPrefillWithPagedKVCacheKernel<(flashinfer::MaskMode)1, x>(y)",
    "fa3": "void flashinfer::PrefillWithKVCacheKernel<flashinfer::CollectiveMainloop<z>>(y)",
    "fa3 fp8": "void flashinfer::FP8PrefillWithKVCacheKernel<z>(y)",
    "cuda-cores": "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::P)0, x>(y)",
    "xqa": "kernel_mha(unsigned int, float)",
    "cascade": "void flashinfer::MergeStateInPlaceKernel<8u, x>(y)",
    "gen": "fmhaSm100fKernel_QkvFp16OFp16H128PagedKvCausalP64VarSeqQ8Kv128StaticSwapsAbForGen",
    "context": "fmhaSm100fKernel_QkvFp16OFp16H64PagedKvCausalP64VarSeqQ128PersistentContext",
    "merge": "void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, x>(y)",
    "flash_attn": "void flash::flash_fwd_splitkv_kernel<x>(y)",
    "single": "void flashinfer::SinglePrefillWithKVCacheKernel<x>(y)",
}
DECODE, PREFILL, MIXED, SPECULATIVE = "8q1s4k", "2q2k", "8q1s4k_q2k", "8q4s4k"


def is_alive(variant: str, text: str, device: Device, *launched: str) -> bool:
    groups = Backend.promised_kernels(Workload.parse(text), variant, device)
    row = row_with(tuple(LAUNCHED[name] for name in launched))
    return not any(other_kernels(group, row) for group in groups)


@pytest.mark.parametrize(
    ("variant", "device", "decode", "prefill"),
    [
        ("FA2", SM80, "fa2", "fa2"),
        ("FA3", SM90, "fa2", "fa3"),
        ("FA3", SM90, "fa2", "fa3 fp8"),
        ("FA3_DECODE", SM90, "fa3", "fa3"),
        ("FA3_DECODE", SM90, "fa3 fp8", "fa3 fp8"),
        ("CUDA_CORES", SM90, "cuda-cores", "fa2"),
        ("XQA", SM90, "xqa", "fa2"),
        ("TRTLLM_GEN", SM100, "gen", "context"),
    ],
)
def test_each_phase_must_be_its_own_kernel(
    variant: str, device: Device, decode: str, prefill: str
) -> None:
    assert is_alive(variant, DECODE, device, decode, "merge")
    assert is_alive(variant, PREFILL, device, prefill, "merge")
    assert is_alive(variant, MIXED, device, decode, prefill, "merge")
    same = {name for name in LAUNCHED if decode.removesuffix(" fp8") == name.removesuffix(" fp8")}
    for other in set(LAUNCHED) - same:
        assert not is_alive(variant, DECODE, device, other), other
    if decode != prefill:
        # One phase's kernel does not vouch for the other's.
        assert not is_alive(variant, PREFILL, device, decode, "merge")
        assert not is_alive(variant, MIXED, device, decode, "merge")
        assert not is_alive(variant, MIXED, device, prefill, "merge")


def test_trtllm_gen_decodes_speculation_and_no_other_does() -> None:
    assert is_alive("TRTLLM_GEN", SPECULATIVE, SM100, "gen")
    assert not is_alive("TRTLLM_GEN", SPECULATIVE, SM100, "context")
    assert is_alive("TRTLLM_GEN", "8q9s4k", SM100, "context")
    assert is_alive("TRTLLM_GEN", "8q4s4k_q3s4k", SM100, "context")
    assert is_alive("XQA", SPECULATIVE, SM90, "fa2")
    assert not is_alive("XQA", SPECULATIVE, SM90, "xqa")


@pytest.mark.parametrize(("device", "levels"), [(SM80, "fa2"), (SM90, "fa3"), (SM100, "fa2")])
def test_a_cascade_merges_two_levels_of_the_device_s_kernels(device: Device, levels: str) -> None:
    text = "8q1s4k_q100s2k prefix=1024"
    assert is_alive("CASCADE", text, device, levels, "cascade")
    assert not is_alive("CASCADE", text, device, levels)
    assert not is_alive("CASCADE", text, device, "cascade")
    wrong = "fa2" if levels == "fa3" else "fa3"
    assert not is_alive("CASCADE", text, device, wrong, "cascade")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "CASCADE"])
@pytest.mark.parametrize(
    "text", ["3q1s70", "2q40", "q40_3q1s70", "3q4s70", "3q4s70_q2s9", "2q1", "q9_q1s9"]
)
def test_what_is_promised_is_what_the_builder_plans(
    install: Install, variant: str, text: str
) -> None:
    """The promise is made without a batch: both must split it alike."""
    install(CURRENT)
    text = f"{text} heads=4/2 head_size=64 layout=HND"
    run = FlashInferRun(text, variant)
    device = SM100 if variant == "TRTLLM_GEN" else SM90
    kernels = VARIANTS[variant]
    names = {"trtllm-gen": "gen"}
    launched = set()
    if run.metadata.decode is not None:
        launched.add(names.get(kernels.decode, kernels.decode))
    if run.metadata.prefill is not None:
        launched.add("context" if kernels.prefill == "trtllm-gen" else kernels.prefill)
    assert is_alive(variant, text, device, *launched)
    assert len(Backend.promised_kernels(run.workload, variant, device)) == len(launched)


def test_all_of_a_variant_s_kernels_are_listed_with_its_name() -> None:
    for variant in VARIANTS:
        listed = set(Backend.kernel_patterns(variant, SM90))
        promised = {
            pattern
            for text in (DECODE, PREFILL, MIXED)
            for group in Backend.promised_kernels(Workload.parse(text), variant, SM90)
            for pattern in group
        }
        assert listed
        assert listed <= promised
        assert all(re.compile(pattern) for pattern in promised)
    assert Backend.kernel_patterns("", SM90) == ()
    assert Backend.promised_kernels(Workload.parse(DECODE), "", SM90) == ()
