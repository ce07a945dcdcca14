"""The declared families and the chains against vLLM 0.22.1: recorded answers, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.backends.abstract import AttentionConfig, MultipleOf
from attnbench.backends.declared.families import families
from attnbench.backends.declared.vllm_0_22_1 import flash_attn_version
from attnbench.backends.device import Device
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.registry import get_backend_class
from attnbench.selection import platform_of, resolve_device
from attnbench.workload.types import AttentionType

RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_0_22_1.json").read_text())
BF16 = torch.bfloat16
PLAIN = AttentionConfig(head_size=128, dtype=BF16, num_heads=32, num_kv_heads=8)
R1_MLA: dict[str, Any] = {
    "head_size": 576,
    "use_mla": True,
    "num_heads": 128,
    "v_head_size": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
}
MLA = PLAIN._replace(**R1_MLA)


def _config(feature: str, dtype: str) -> AttentionConfig:
    values: dict[str, Any] = {**RECORDED["plain"], **RECORDED["features"][feature]}
    if "attn_type" in values:
        values["attn_type"] = AttentionType(values["attn_type"])
    return AttentionConfig(dtype=torch_dtype(dtype), **values)


@pytest.mark.parametrize("device_text", sorted({cell[0] for cell in RECORDED["cells"]}))
def test_chain_and_every_reason_equal_the_recorded_ones(device_text: str) -> None:
    device = resolve_device(device_text)
    platform = platform_of(device)
    cells = [cell for cell in RECORDED["cells"] if cell[0] == device_text]
    assert len(cells) > 100
    for _, dtype, feature, candidates in cells:
        config = _config(feature, dtype)
        chain = platform.get_backend_priorities(config, device)
        assert chain == tuple(name for name, _ in candidates), (dtype, feature)
        for name, indexes in candidates:
            recorded = sorted(RECORDED["reasons"][i] for i in indexes)
            ours = sorted(families()[name].validate_configuration(config, device))
            assert ours == recorded, (dtype, feature, name)
        valid = [name for name, indexes in candidates if not indexes]
        assert platform.get_followed_choice(config, device) == (valid or [""])[0]


HOPPER = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "TURBOQUANT")
HOPPER_MLA = ("FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "TRITON_MLA", "FLASHMLA_SPARSE")
BLACKWELL = ("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "TURBOQUANT")
BLACKWELL_MLA = (
    *("FLASHINFER_MLA", "TOKENSPEED_MLA", "CUTLASS_MLA", "FLASH_ATTN_MLA", "FLASHMLA"),
    "TRITON_MLA",
)


@pytest.mark.parametrize("device", ["sm70", "sm75", "sm80", "sm86", "sm89", "sm90", "sm120"])
def test_every_cuda_device_but_blackwell_data_centre_has_one_order(device: str) -> None:
    assert _chain(PLAIN, device) == HOPPER
    assert _chain(MLA, device) == HOPPER_MLA


@pytest.mark.parametrize("device", ["sm100", "sm103"])
def test_blackwell_orders(device: str) -> None:
    assert _chain(PLAIN, device) == BLACKWELL
    flashmla_first = (*BLACKWELL_MLA, "FLASHMLA_SPARSE", "FLASHINFER_MLA_SPARSE")
    flashinfer_first = (*BLACKWELL_MLA, "FLASHINFER_MLA_SPARSE", "FLASHMLA_SPARSE")
    assert _chain(MLA, device) == flashmla_first
    assert _chain(MLA._replace(num_heads=17), device) == flashmla_first
    assert _chain(MLA._replace(num_heads=16), device) == flashinfer_first
    assert _chain(MLA._replace(kv_cache_dtype="fp8_e4m3"), device) == flashinfer_first


def test_rocm_orders() -> None:
    unified = ("ROCM_ATTN", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN", "TURBOQUANT")
    assert _chain(PLAIN, "gfx942") == unified
    with_fa = ("ROCM_ATTN", "ROCM_AITER_FA", *unified[1:])
    assert _chain(PLAIN, "gfx942+aiter") == with_fa
    assert _chain(PLAIN, "gfx1100") == ("ROCM_ATTN", "TRITON_ATTN", "TURBOQUANT")
    # AITER serves MI300 only: elsewhere switching it on changes nothing.
    assert _chain(PLAIN, "gfx1100+aiter") == _chain(PLAIN, "gfx1100")
    assert _chain(MLA, "gfx942") == ("TRITON_MLA",)
    aiter_mla = ("ROCM_AITER_MLA", "TRITON_MLA", "ROCM_AITER_TRITON_MLA")
    assert _chain(MLA, "gfx942+aiter") == aiter_mla
    assert _chain(MLA._replace(use_sparse=True), "gfx942") == ("ROCM_AITER_MLA_SPARSE",)


def test_cpu_order() -> None:
    assert _chain(PLAIN, "cpu") == ("CPU_ATTN",)
    # vLLM 0.22.1 raises NotImplementedError here.
    assert _chain(MLA, "cpu") == ("TORCH_MLA",)
    cpu = resolve_device("cpu")
    assert platform_of(cpu).get_followed_choice(MLA, cpu) == ""
    assert platform_of(cpu).get_followed_choice(PLAIN, cpu) == "CPU_ATTN"


def test_different_widths_of_k_and_v_are_the_layer_s_choice() -> None:
    config = PLAIN._replace(v_head_size=64)
    assert _chain(config, "sm90") == ("FLASH_ATTN_DIFFKV", *HOPPER)
    assert _followed(config, "sm90") == "FLASH_ATTN_DIFFKV"
    assert _chain(config._replace(v_head_size=128), "sm90") == HOPPER


def test_gpt_oss_on_ampere_hopper_and_blackwell() -> None:
    gpt_oss = PLAIN._replace(head_size=64, has_sink=True)
    assert _reasons("FLASH_ATTN", gpt_oss, "sm80") == [
        "attention sinks not supported",
        "sink not supported on compute capability < 9.0",
    ]
    assert _reasons("FLASHINFER", gpt_oss, "sm80") == ["attention sinks not supported"]
    assert _followed(gpt_oss, "sm80") == "TRITON_ATTN"
    assert _followed(gpt_oss, "sm90") == "FLASH_ATTN"
    assert _followed(gpt_oss, "sm100") == "FLASHINFER"
    assert _followed(gpt_oss, "sm120") == "TRITON_ATTN"
    assert _followed(gpt_oss, "gfx942") == "ROCM_AITER_UNIFIED_ATTN"


#: The capability table: (name, device, changes to a config it accepts, reason or "").
SPOT_CHECKS = [
    ("FLASH_ATTN", "sm90", {"head_size": 72}, ""),
    ("FLASH_ATTN", "sm90", {"head_size": 100}, "head_size not supported"),
    ("FLASH_ATTN", "sm90", {"head_size": 512}, ""),
    ("FLASH_ATTN", "sm80", {"head_size": 512}, "head_size not supported"),
    ("FLASH_ATTN", "sm90", {"kv_cache_dtype": "fp8_e4m3"}, ""),
    ("FLASH_ATTN", "sm100", {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype not supported"),
    ("FLASH_ATTN", "sm90", {"block_size": 48}, ""),
    ("FLASH_ATTN", "sm75", {}, "compute capability not supported"),
    ("FLASH_ATTN", "sm80", {"use_per_head_quant_scales": True}, "per-head quant scales"),
    ("FLASH_ATTN", "sm90", {"use_per_head_quant_scales": True}, ""),
    ("FLASH_ATTN", "xpu", {"kv_cache_dtype": "fp8_e4m3", "has_sink": True}, ""),
    ("FLASH_ATTN_DIFFKV", "sm90", {"v_head_size": 64}, ""),
    ("FLASHINFER", "sm75", {}, ""),
    ("FLASHINFER", "sm70", {}, "compute capability not supported"),
    ("FLASHINFER", "sm121", {"kv_cache_dtype": "nvfp4"}, ""),
    ("FLASHINFER", "sm90", {"head_size": 96}, "head_size not supported"),
    ("FLASHINFER", "sm90", {"block_size": 48}, ""),
    ("FLASHINFER", "sm90", {"block_size": 24}, "block_size not supported"),
    ("FLASHINFER", "sm100", {"kv_cache_layout": "NHD"}, "kv_cache_layout NHD not supported"),
    ("FLASHINFER", "sm90", {"use_non_causal": True}, "non-causal attention not supported"),
    ("TURBOQUANT", "sm90", {"kv_cache_dtype": "turboquant_4bit_nc"}, ""),
    ("TURBOQUANT", "sm90", {}, "kv_cache_dtype not supported"),
    ("TRITON_ATTN", "sm70", {"dtype": torch.float32, "use_mm_prefix": True}, ""),
    ("TRITON_ATTN", "sm90", {"head_size": 16}, "head_size not supported"),
    ("TRITON_ATTN", "sm90", {"use_non_causal": True}, "non-causal attention not supported"),
    ("FLEX_ATTENTION", "sm90", {"attn_type": AttentionType.ENCODER_ONLY}, ""),
    ("FLEX_ATTENTION", "sm90", {"attn_type": AttentionType.ENCODER}, "type encoder not supported"),
    ("FLEX_ATTENTION", "sm90", {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype not supported"),
    ("CPU_ATTN", "cpu", {"head_size": 112, "dtype": torch.float32}, ""),
    ("CPU_ATTN", "cpu", {"head_size": 72}, "head_size not supported"),
    ("FLASH_ATTN_MLA", "sm90", R1_MLA, ""),
    ("FLASH_ATTN_MLA", "sm80", R1_MLA, "compute capability not supported"),
    ("FLASH_ATTN_MLA", "sm90", {**R1_MLA, "head_size": 512}, "head_size not supported"),
    ("FLASHMLA", "sm90", {**R1_MLA, "kv_cache_dtype": "fp8_e4m3", "block_size": 64}, ""),
    ("FLASHMLA", "sm90", {**R1_MLA, "block_size": 32}, "block_size not supported"),
    ("FLASHMLA", "sm100", R1_MLA, "FlashMLA Dense is only supported on Hopper devices"),
    ("FLASHINFER_MLA", "sm100", R1_MLA, ""),
    ("FLASHINFER_MLA", "sm100", {**R1_MLA, "qk_nope_head_dim": 96}, "qk_nope_head_dim"),
    ("TOKENSPEED_MLA", "sm100", {**R1_MLA, "kv_cache_dtype": "fp8_e4m3"}, ""),
    ("TOKENSPEED_MLA", "sm100", R1_MLA, "kv_cache_dtype not supported"),
    ("CUTLASS_MLA", "sm100", {**R1_MLA, "block_size": 128}, ""),
    ("CUTLASS_MLA", "sm100", {**R1_MLA, "block_size": 64}, "block_size not supported"),
    ("TRITON_MLA", "sm75", {**R1_MLA, "head_size": 96}, ""),
    ("TRITON_MLA", "sm75", {**R1_MLA, "dtype": torch.float32}, "dtype not supported"),
    ("FLASHMLA_SPARSE", "sm90", {**R1_MLA, "use_sparse": True}, ""),
    ("FLASHMLA_SPARSE", "sm90", R1_MLA, "non-sparse not supported"),
    ("FLASHINFER_MLA_SPARSE", "sm100", {**R1_MLA, "use_sparse": True}, ""),
    ("FLASHINFER_MLA_SPARSE", "sm90", {**R1_MLA, "use_sparse": True}, "compute capability"),
    ("ROCM_ATTN", "gfx942", {"dtype": torch.float32, "use_mm_prefix": True}, ""),
    ("ROCM_ATTN", "gfx942", {"has_sink": True}, "attention sinks not supported"),
    ("ROCM_ATTN", "sm90", {}, "device cuda not supported"),
    ("ROCM_AITER_FA", "gfx942", {"head_size": 64, "use_non_causal": True}, ""),
    ("ROCM_AITER_FA", "gfx90a", {}, "compute capability not supported"),
    ("ROCM_AITER_FA", "gfx942", {"head_size": 96}, "head_size not supported"),
    ("ROCM_AITER_UNIFIED_ATTN", "gfx942", {"has_sink": True, "head_size": 40}, ""),
    ("ROCM_AITER_UNIFIED_ATTN", "gfx942", {"use_non_causal": True}, "non-causal"),
    ("ROCM_AITER_MLA", "gfx942", {**R1_MLA, "block_size": 1, "kv_cache_dtype": "fp8_e5m2"}, ""),
    ("ROCM_AITER_TRITON_MLA", "gfx942", R1_MLA, ""),
    ("ROCM_AITER_MLA_SPARSE", "gfx942", {**R1_MLA, "use_sparse": True, "block_size": 64}, ""),
    ("XPU_MLA_SPARSE", "xpu", {**R1_MLA, "use_sparse": True}, ""),
]


@pytest.mark.parametrize(("name", "device", "changes", "reason"), SPOT_CHECKS)
def test_capability_table(name: str, device: str, changes: dict[str, Any], reason: str) -> None:
    reasons = _reasons(name, PLAIN._replace(**changes), device)
    if reason:
        assert any(reason in found for found in reasons), reasons
    else:
        assert reasons == []


def test_every_row_of_the_capability_table_is_spot_checked() -> None:
    assert {name for name, *_ in SPOT_CHECKS} == set(families())


@pytest.mark.parametrize(
    ("device", "changes", "version"),
    [
        ("sm75", {}, None),
        ("sm80", {}, 2),
        ("sm90", {}, 3),
        ("sm90", {"use_alibi": True}, 2),
        ("sm90", {"head_size": 512}, 4),
        ("sm100", {}, 4),
        ("sm100", {"head_size": 256}, 2),
        ("sm100", {"head_size": 192}, 4),
        ("sm100", {"use_batch_invariant": True}, 2),
        ("sm120", {}, 2),
        ("xpu", {}, 2),
    ],
)
def test_flash_attention_version(device: str, changes: dict[str, Any], version: int | None) -> None:
    config = PLAIN._replace(**changes)
    assert flash_attn_version(config, resolve_device(device)) == version


def test_a_declared_class_answers_for_each_device_it_is_asked_about() -> None:
    """vLLM's own predicates read one global platform; two devices in one process must not mix."""
    config = PLAIN._replace(kv_cache_dtype="fp8_e4m3")
    answers = [_reasons("FLASH_ATTN", config, d) for d in ("sm90", "sm100", "sm90")]
    assert answers == [[], ["kv_cache_dtype not supported"], []]
    assert families()["FLASH_ATTN"].device is None
    bound = families()["FLASH_ATTN"].at(resolve_device("sm90"))
    assert bound.validate_configuration(config, resolve_device("sm100")) == answers[1]


@pytest.mark.parametrize(
    ("name", "device", "changes", "ours", "theirs"),
    [
        # docs/selection.md, "Where our kernel of the same name differs", one line each.
        ("TRITON_ATTN", "sm90", {"use_mm_prefix": True}, False, True),
        ("TRITON_ATTN", "sm90", {"use_batch_invariant": True}, False, True),
        ("TRITON_ATTN", "sm90", {"use_non_causal": True}, True, False),
        ("TRITON_ATTN", "sm90", {"block_size": 1}, True, False),
        ("TRITON_ATTN", "sm80", {"kv_cache_dtype": "fp8_e4m3"}, False, True),
        ("FLEX_ATTENTION", "sm90", {"use_mm_prefix": True}, False, True),
        ("FLEX_ATTENTION", "sm90", {"attn_type": AttentionType.ENCODER_DECODER}, True, False),
        ("TRITON_MLA", "sm90", {**R1_MLA, "dtype": torch.float32}, True, False),
        ("TRITON_MLA", "sm75", R1_MLA, False, True),
        ("FLASH_ATTN", "sm90", {"head_size": 264}, False, True),
        ("FLASH_ATTN", "sm100", {"head_size": 512}, False, True),
        ("FLASH_ATTN", "sm90", {"has_sink": True, "use_alibi": True}, False, True),
        ("CPU_ATTN", "cpu", {"has_sink": True}, True, False),
    ],
)
def test_documented_differences_from_vllm_s_kernel_of_the_same_name(
    name: str, device: str, changes: dict[str, Any], ours: bool, theirs: bool
) -> None:
    config = PLAIN._replace(**changes)
    where = resolve_device(device)
    assert (not get_backend_class(name).validate_configuration(config, where)) is ours
    assert (not families()[name].validate_configuration(config, where)) is theirs


def test_preferred_block_sizes() -> None:
    preferred = {
        "FLASH_ATTN": 16,
        "FLASHMLA": 64,
        "FLASHINFER_MLA": 32,
        "CUTLASS_MLA": 128,
        "ROCM_AITER_UNIFIED_ATTN": 64,
    }
    for name, size in preferred.items():
        assert families()[name].get_preferred_block_size(16) == size
    assert families()["TRITON_MLA"].get_supported_kernel_block_sizes() == (MultipleOf(16),)


def _chain(config: AttentionConfig, device: str) -> tuple[str, ...]:
    where = resolve_device(device)
    return platform_of(where).get_backend_priorities(config, where)


def _followed(config: AttentionConfig, device: str) -> str:
    where = resolve_device(device)
    return platform_of(where).get_followed_choice(config, where)


def _reasons(name: str, config: AttentionConfig, device: str) -> list[str]:
    where: Device = resolve_device(device)
    return families()[name].validate_configuration(config, where)
