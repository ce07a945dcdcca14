"""Finding AITER, the devices it is for, and what the selector makes of it."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.aiter_library import (
    FMHA_PATTERN,
    FUNCTIONS,
    MLA_PATTERN,
    PAGED_PATTERN,
    TRITON_FMHA_PATTERN,
    UNIFIED_PATTERN,
    load_functions,
)
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.errors import BackendUnavailableError
from attnbench.selection import resolve_device, select
from attnbench.selection.builtin_platforms import RocmPlatform
from attnbench.selection.selector import consider
from attnbench.workload import Workload
from tests.backends.aiter.conftest import Install
from tests.backends.aiter.fake_library import RECORDED, RECORDS

NAMES = tuple(FUNCTIONS)
MI300, MI350 = Device("rocm", "gfx942"), Device("rocm", "gfx950")
PLAIN = AttentionConfig(
    head_size=128, dtype=torch.bfloat16, block_size=16, num_heads=32, num_kv_heads=8
)
MLA = AttentionConfig(
    head_size=576,
    dtype=torch.bfloat16,
    use_mla=True,
    num_heads=16,
    v_head_size=128,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
)


def config_for(name: str) -> AttentionConfig:
    return MLA if "MLA" in name else PLAIN


# --- finding it -----------------------------------------------------------------------------------
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_release_has_what_is_passed(
    install: Install, name: str, record: str
) -> None:
    install(record)
    assert backend_status(name, MI350) is None
    recorded = RECORDED[record]["functions"]
    for role, wanted in FUNCTIONS[name].items():
        key = f"triton {wanted.name}" if "triton.mha" in wanted.modules[-1] else wanted.name
        assert recorded[key]["module"] in wanted.modules, role
        assert {*wanted.parameters} <= {parameter for parameter, _ in recorded[key]["parameters"]}


@pytest.mark.parametrize("name", NAMES)
def test_without_it_the_reason_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    load_functions.cache_clear()
    registry.reload_entry_points()
    monkeypatch.setitem(sys.modules, "aiter", None)
    monkeypatch.delitem(sys.modules, "aiter")
    reason = backend_status(name)
    assert reason is not None
    assert reason.startswith(f"{name} needs aiter, not installed; pip install amd-aiter")
    registry.reload_entry_points()


def test_a_function_that_is_gone_or_lacks_a_parameter_is_refused_when_loaded(
    install: Install,
) -> None:
    install("aiter-main", leave_out="paged_attention_v1")
    reason = backend_status("ROCM_AITER_FA", MI350)
    assert reason is not None
    assert "aiter has no paged_attention_v1" in reason
    assert backend_status("ROCM_AITER_UNIFIED_ATTN", MI350) is None


def test_a_lacking_parameter_is_named(install: Install) -> None:
    install("aiter-main", lacking="sinks")
    with pytest.raises(BackendUnavailableError, match="its unified_attention has no parameter sin"):
        load_functions("ROCM_AITER_UNIFIED_ATTN")
    load_functions("ROCM_AITER_FA")


def test_an_aiter_that_does_not_import_is_a_reason_and_no_traceback(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("aiter-main")
    get_backend_class("ROCM_AITER_MLA")

    def broken(name: str) -> None:
        raise RuntimeError("Get GPU arch from rocminfo failed")

    monkeypatch.setattr("attnbench.backends.aiter_library._import_module", broken)
    reason = backend_status("ROCM_AITER_MLA", MI350)
    assert reason is not None
    assert "RuntimeError: Get GPU arch from rocminfo failed" in reason
    assert reason.count("\n") == 0


def test_a_fault_inside_the_newer_module_is_not_taken_for_an_older_release(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("aiter-0.1.7.post2")

    def broken(name: str) -> ModuleType:
        if ".attention." in name:
            raise ModuleNotFoundError("No module named 'einops'", name="einops")
        return import_module(name)

    monkeypatch.setattr("attnbench.backends.aiter_library._import_module", broken)
    with pytest.raises(BackendUnavailableError, match="No module named 'einops'"):
        load_functions("ROCM_AITER_UNIFIED_ATTN")


# --- devices --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_devices(name: str) -> None:
    backend, config = get_backend_class(name), config_for(name)
    for device in (MI300, MI350, Device("rocm", "gfx942+aiter")):
        assert backend.validate_configuration(config, device) == []
    (reason,) = backend.validate_configuration(config, cuda_device(9, 0))[:1]
    assert reason == "device cuda not supported"
    reasons = backend.validate_configuration(config, Device("rocm", "gfx1100"))
    if name == "ROCM_AITER_FA":
        assert reasons == ["compute capability not supported"]
    else:
        assert reasons == ["AITER's attention is built for gfx942 and gfx950, this is gfx1100"]


@pytest.mark.parametrize("name", NAMES)
def test_fp8_where_its_numbers_are_ours(name: str) -> None:
    backend = get_backend_class(name)
    config = config_for(name)._replace(kv_cache_dtype="fp8_e4m3")
    assert backend.validate_configuration(config, MI350) == []
    (reason,) = backend.validate_configuration(config, MI300)
    assert reason.startswith("fp8 on gfx942 is e4m3fnuz")
    e5m2 = config._replace(kv_cache_dtype="fp8_e5m2")
    assert backend.validate_configuration(e5m2, MI350) == [
        "AITER reads e4m3 from an fp8 KV cache; use kv=fp8_e4m3"
    ]
    mixed = config._replace(kv_cache_dtype="fp16")
    assert backend.validate_configuration(mixed, MI350) == [
        "a fp16 KV cache needs queries of the same type"
    ]


def test_latent_features_are_refused() -> None:
    backend = get_backend_class("ROCM_AITER_MLA")
    config = MLA._replace(has_sliding_window=True, use_alibi=True)
    assert backend.validate_configuration(config, MI350) == [
        "ROCM_AITER_MLA has no sliding window and no ALiBi; leave it out"
    ]
    assert backend.validate_configuration(MLA._replace(kv_cache_layout="HND"), MI350) == []


@pytest.mark.parametrize("name", NAMES)
def test_vllm_s_own_reasons_come_first_and_unchanged(name: str) -> None:
    backend, theirs = get_backend_class(name), families()[name]
    plain = config_for(name)
    for changes in (
        {"head_size": 100},
        {"dtype": torch.float32},
        {"block_size": 24},
        {"has_sink": True},
        {"use_mm_prefix": True},
        {"use_non_causal": True},
        {"v_head_size": 64},
        {"use_sparse": True},
    ):
        config = plain._replace(**changes)
        expected = theirs.validate_configuration(config, MI350)
        found = backend.validate_configuration(config, MI350)
        assert found[: len(expected)] == expected
        assert len(found) <= len(expected) + 1


# --- the chain ------------------------------------------------------------------------------------
def test_registered_as_runnable_and_what_has_no_code_is_not() -> None:
    runnable = registry.runnable_backend_names()
    assert {*NAMES} <= {*runnable}
    # vLLM's own kernels: run as VLLM:ROCM_ATTN, never as ROCM_ATTN.
    assert "ROCM_ATTN" not in runnable
    assert "ROCM_AITER_MLA_SPARSE" not in runnable


def test_the_chain_takes_them_where_they_are_installed(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RocmPlatform, "present_device", lambda self: MI300)
    device = resolve_device("gfx942+aiter")
    install("aiter-main")
    taken = select(PLAIN, device)
    assert (taken.backend, taken.followed) == ("ROCM_AITER_FA", "ROCM_ATTN")
    assert select(MLA, device).backend == "ROCM_AITER_MLA"
    assert select(PLAIN, MI300).backend == "ROCM_AITER_UNIFIED_ATTN"
    # A soft cap is beyond FA's prefill: the next in the chain has one.
    capped = select(PLAIN._replace(has_logits_soft_cap=True), device)
    assert capped.backend == "ROCM_AITER_UNIFIED_ATTN"
    # Encoders: vLLM's class of the name takes them by another kernel.
    encoder = consider(PLAIN._replace(use_non_causal=True, head_size=96), device)
    assert encoder.backend != "ROCM_AITER_UNIFIED_ATTN"


# --- liveness -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        (
            UNIFIED_PATTERN,
            ["kernel_unified_attention_2d", "kernel_unified_attention_3d.kd"],
            ["reduce_segments", "my_kernel_unified_attention_2d"],
        ),
        (
            PAGED_PATTERN,
            ["void paged_attention_ll4mi_QKV_mfma16_kernel<__hip_bfloat16, 16, 128>(...)"],
            ["void paged_attention_ll4mi_reduce_kernel<__hip_bfloat16>(...)"],
        ),
        (
            FMHA_PATTERN,
            [
                "aiter::fmha_fwd_hd128_bf16_causal_rtz_group",
                "void ck_tile::kentry<2, ck_tile::FmhaFwdKernel<...>>",
            ],
            ["aiter::fmha_bwd_hd128_bf16", "pytorch_flash::flash_fwd_kernel"],
        ),
        (TRITON_FMHA_PATTERN, ["_attn_fwd"], ["_attn_bwd", "other_attn_fwd"]),
        (
            MLA_PATTERN,
            [
                "aiter::mla_dec_stage1_bf16_a16w16_subQ16_mqa16",
                "aiter::mla_a16w16_qh16_m16x4_n16x1_coex0_mask1",
                "aiter::mla_a8w8_qh16_qseqlen1_gqaratio16",
            ],
            ["aiter::mla_pfl_bf16_a16w16_causal_subQ16_mqa16", "_fwd_kernel_stage2_asm"],
        ),
    ],
)
def test_patterns_find_the_kernels_named_in_the_library_and_no_others(
    pattern: str, names: list[str], others: list[str]
) -> None:
    for name in names:
        assert re.search(pattern, name), name
    for name in others:
        assert not re.search(pattern, name), name


@pytest.mark.parametrize("name", NAMES)
def test_each_promises_its_kernels(name: str) -> None:
    expected = {
        "ROCM_AITER_UNIFIED_ATTN": (UNIFIED_PATTERN,),
        "ROCM_AITER_FA": (PAGED_PATTERN, FMHA_PATTERN),
        "ROCM_AITER_MLA": (MLA_PATTERN, FMHA_PATTERN),
        "ROCM_AITER_TRITON_MLA": (MLA_PATTERN, TRITON_FMHA_PATTERN),
    }
    assert get_backend_class(name).kernel_patterns("", MI300) == expected[name]


@pytest.mark.parametrize(
    ("name", "decode", "prefill"),
    [
        ("ROCM_AITER_FA", PAGED_PATTERN, FMHA_PATTERN),
        ("ROCM_AITER_TRITON_MLA", MLA_PATTERN, TRITON_FMHA_PATTERN),
    ],
)
def test_a_batch_promises_a_kernel_of_each_of_its_phases(
    name: str, decode: str, prefill: str
) -> None:
    for spec, expected in (
        ("4q1s70", ((decode,),)),
        ("2q40", ((prefill,),)),
        ("q4s70", ((prefill,),)),
        ("q40_2q1s70", ((decode,), (prefill,))),
    ):
        workload = Workload.parse(spec)
        assert get_backend_class(name).promised_kernels(workload, "", MI300) == expected
