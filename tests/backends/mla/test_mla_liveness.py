"""The kernels a variant promises: a call that launched others only is not this variant."""

from __future__ import annotations

import re

import pytest

from attnbench.backends.device import cuda_device
from attnbench.backends.mla_libraries import MLA_LIBRARIES
from attnbench.backends.registry import get_backend_class
from attnbench.workload import Workload
from tests.backends.mla.cases import BACKENDS

SM90, SM100 = cuda_device(9, 0), cuda_device(10, 0)
ALL = [(name, variant) for name in MLA_LIBRARIES for variant in MLA_LIBRARIES[name]]
#: How CuTe DSL writes the module and class of a method it compiles.
CUTE_DSL = "flashinfercute_dslattentionmla_decodeBlackwellMultiLatentAttention"


@pytest.mark.parametrize(
    ("backend", "variant", "kernel"),
    [
        ("FLASHMLA", "VLLM", "void sm90::flash_fwd_splitkv_mla_kernel<Traits<cutlass::half_t>"),
        (
            "FLASHMLA",
            "VLLM",
            "void flash::flash_fwd_splitkv_mla_kernel<Flash_fwd_kernel_traits_mla",
        ),
        (
            "FLASH_ATTN_MLA",
            "FA3",
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::Coll",
        ),
        ("FLASHMLA", "VLLM+FA2", "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits"),
        (
            "FLASHINFER_MLA",
            "FA3",
            "void flashinfer::mla::hopper::BatchMLAPageAttentionHopperKernel<",
        ),
        ("FLASHINFER_MLA", "FA2", "void flashinfer::mla::BatchMLAPagedAttentionKernel<"),
        (
            "FLASHINFER_MLA",
            "TRTLLM_GEN",
            "fmhaSm100fKernel_QkvBfloat16OBfloat16HQk576HV512PagedKvDenseP32VarSeqQ16Kv128Persis",
        ),
        (
            "FLASHINFER_MLA",
            "TRTLLM_GEN",
            "fmhaSm103aKernel_QkvE4m3OBfloat16HQk576HV512HVPerCta256PagedKvDenseP64VarSeqQ64Kv128",
        ),
        (
            "FLASHINFER_MLA",
            "CUTE_DSL",
            f"kernel_cutlass_split_kv_kernel_{CUTE_DSL}Forward_object_at__TiledMMA_ThrLayoutVMNK",
        ),
        (
            "FLASHINFER_MLA",
            "CUTE_DSL",
            f"kernel_cutlass_split_kv_kernel_{CUTE_DSL}ForwardFP8_object_at__TiledMMA_ThrLayout",
        ),
        ("FLASHMLA", "UPSTREAM", "void sm90::flash_fwd_splitkv_mla_kernel<Traits<cutlass::bf"),
        ("FLASH_ATTN_MLA", "FA3_UPSTREAM", "void cutlass::device_kernel<flash::FlashAttnFwdSm90<"),
        (
            "CUTLASS_MLA",
            "SM100",
            "void cutlass::device_kernel<fmha::kernel::Sm100FmhaMlaKernelTmaWarpspecialized<",
        ),
    ],
)
def test_the_kernels_a_variant_promises(backend: str, variant: str, kernel: str) -> None:
    """Names as in the symbols of the wheels; a combine or a copy alone is another kernel."""
    device = SM100 if variant in ("SM100", "TRTLLM_GEN", "CUTE_DSL") else SM90
    patterns = BACKENDS[backend].kernel_patterns(variant, device)
    assert any(re.search(pattern, kernel) for pattern in patterns)
    for other in (
        "void flash::flash_fwd_splitkv_mla_combine_kernel<",
        "void smxx::decode::flash_fwd_mla_combine_kernel<",
        "vectorized_elementwise",
        "fmhaReductionKernel",
        "fmhaSm103aKernel_QkvBfloat16OBfloat16HQk192HV128SeparateQkvCausalVarSeqQ128Kv128",
        f"kernel_cutlass_reduction_kernel_{CUTE_DSL}Forward_object_at__",
        "_latent_attention_kernel",
    ):
        assert not any(re.search(pattern, other) for pattern in patterns)


FA2 = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits"
FA3 = "void cutlass::device_kernel<flash::FlashAttnFwdSm90<"
FA4 = (
    "kernel_cutlass_kernel_vllmvllm_flash_attncuteflash_fwd_sm100FlashAttentionForwardSm100_object"
)


@pytest.mark.parametrize(("backend", "variant"), ALL)
def test_every_variant_promises_kernels(backend: str, variant: str) -> None:
    backend_class = get_backend_class(backend)
    library = MLA_LIBRARIES[backend][variant]
    device = SM90 if 9 in library.majors else SM100
    decode, *prefills = backend_class.kernel_patterns(variant, device)
    assert decode == library.kernel_pattern != ""
    assert backend_class.kernel_patterns("NONE", device) == ()
    if library.runs_prefills:
        assert prefills == []
        return
    kernels = [FA3] if device is SM90 else [FA4, FA2]
    for pattern, kernel in zip(prefills, kernels, strict=True):
        assert re.search(pattern, kernel)
    for prefill, kernel in (("FA2", FA2), ("FA3", FA3), ("FA4", FA4)):
        first, named = backend_class.kernel_patterns(f"{variant}+{prefill}", device)
        assert first == decode
        assert re.search(named, kernel)


MLA = "shape=deepseek-v3 block=64"


@pytest.mark.parametrize(
    ("backend", "variant", "batch", "phases"),
    [
        ("FLASHMLA", "VLLM", "4q1s1k", "decode"),
        ("FLASHMLA", "VLLM", "4q128s1k", "decode"),
        ("FLASHMLA", "VLLM", "4q129s1k", "prefill"),
        ("FLASHMLA", "VLLM", "q600_4q1s1k", "decode, prefill"),
        # Equal lengths of one call: the third request is no decode.
        ("FLASHMLA", "VLLM", "2q4s1k_q3s1k", "decode, prefill"),
        ("FLASH_ATTN_MLA", "FA3", "2q4s1k_q3s1k", "decode"),
        ("FLASH_ATTN_MLA", "FA3", "2q4s1k_q513s1k", "decode, prefill"),
        ("FLASHINFER_MLA", "FA2", "q16s1k_q4s1k", "decode"),
        ("FLASHINFER_MLA", "TRTLLM_GEN", "q16s1k_q4s1k", "decode, prefill"),
        ("FLASHINFER_MLA", "CUTE_DSL", "q4s1k", "decode"),
        ("FLASHINFER_MLA", "CUTE_DSL", "q5s1k", "prefill"),
        # Short requests come first up to 16 new tokens, and are decodes up to 4.
        ("FLASHINFER_MLA", "CUTE_DSL", "q20s1k_q5s1k_q4s1k", "prefill"),
        ("CUTLASS_MLA", "SM100", "2q1s1k_q2s1k", "decode, prefill"),
        ("CUTLASS_MLA", "SM100", "2q2s1k", "prefill"),
        ("FLASHMLA", "NONE", "2q2s1k", ""),
    ],
)
def test_a_batch_promises_the_kernels_of_its_phases(
    backend: str, variant: str, batch: str, phases: str
) -> None:
    backend_class = get_backend_class(backend)
    workload = Workload.parse(f"{batch} {MLA}")
    device = SM90 if backend in ("FLASHMLA", "FLASH_ATTN_MLA") else SM100
    decode, prefill, *_ = (*backend_class.kernel_patterns(variant, device), "", "")
    expected = {"decode": (decode,), "prefill": (prefill,)}
    groups = tuple(expected[phase] for phase in phases.split(", ") if phase)
    assert backend_class.promised_kernels(workload, variant, device) == groups


@pytest.mark.parametrize(
    ("variant", "shape", "kernel"),
    [
        ("FA2", MLA, FA4),
        ("FA2+FA2", MLA, FA2),
        ("FA2", "heads=2/1 mla=512+64:96+128 block=64", FA2),
    ],
)
def test_the_prefill_kernels_promised_on_blackwell(variant: str, shape: str, kernel: str) -> None:
    backend_class = get_backend_class("FLASHINFER_MLA")
    ((pattern,),) = backend_class.promised_kernels(Workload.parse(f"q600 {shape}"), variant, SM100)
    assert [re.search(pattern, name) is not None for name in (FA2, FA4)] == [
        kernel == FA2,
        kernel == FA4,
    ]


def test_sparse_kernels_are_those_of_both_phases() -> None:
    backend_class = get_backend_class("FLASHMLA_SPARSE")
    for batch in ("4q1s1k", "q600", "q600_4q1s1k"):
        workload = Workload.parse(f"{batch} shape=deepseek-v3 topk=128:random block=64")
        ((pattern,),) = backend_class.promised_kernels(workload, "VLLM", SM90)
        assert pattern == MLA_LIBRARIES["FLASHMLA_SPARSE"]["VLLM"].kernel_pattern


def test_our_own_kernels_are_promised_by_their_names() -> None:
    patterns = get_backend_class("TRITON_MLA").kernel_patterns("", SM90)
    for kernel in ("latent_attention_kernel", "attention_kernel"):  # decode, prefill
        assert sum(re.search(pattern, kernel) is not None for pattern in patterns) == 1
    for other in ("merge_segments_kernel", "write_latent_kernel", "triton_poi_fused_add"):
        assert not any(re.search(pattern, other) for pattern in patterns)


@pytest.mark.parametrize(
    ("batch", "phases"),
    [("4q1s1k_q64s1k", [0]), ("q65s1k_q1s1k", [0, 1]), ("2q500", [1])],
)
def test_our_own_kernels_are_promised_by_phase(batch: str, phases: list[int]) -> None:
    backend_class = get_backend_class("TRITON_MLA")
    patterns = backend_class.kernel_patterns("", SM90)
    groups = backend_class.promised_kernels(Workload.parse(f"{batch} {MLA}"), "", SM90)
    assert groups == tuple((patterns[phase],) for phase in phases)
