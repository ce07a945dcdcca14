"""Finding the library, refusing what is not fit, and what the selector says of it."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import FlashInfer
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flashinfer import FlashInferBackend as Backend
from attnbench.backends.flashinfer_library import (
    VARIANTS,
    lacking_parameters,
    load_names,
    uses,
)
from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.errors import BackendUnavailableError, SelectionError
from attnbench.measure.compile_ahead import kernels
from attnbench.measure.plan import PlannedPoint, plan_workloads
from attnbench.measure.point import refusals
from attnbench.selection import consider, select
from attnbench.selection.builtin_platforms import CudaPlatform
from attnbench.workload import Workload
from tests.backends.flashinfer.conftest import CURRENT, Install
from tests.backends.flashinfer.fake_library import RECORDED, signature_of

SM80, SM90, SM100, SM120 = (cuda_device(major, 0) for major in (8, 9, 10, 12))
PLAIN = AttentionConfig(head_size=128, dtype=torch.bfloat16, num_heads=32, num_kv_heads=8)


@pytest.fixture
def nothing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer is not installed, whatever this machine has."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("attnbench.backends.flashinfer_library.find_spec", lambda name: None)


# --- signatures -----------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("record", RECORDED)
def test_what_is_passed_is_in_every_recorded_signature(record: str, variant: str) -> None:
    for path, wanted in uses(VARIANTS[variant]).items():
        signature = signature_of(record, path)
        assert lacking_parameters(signature, wanted) == [], path
        required = {
            name
            for name, p in signature.parameters.items()
            if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and name != "self"
        }
        assert required <= set(wanted), path


def test_every_recorded_name_is_used_by_some_variant() -> None:
    used = {path for variant in VARIANTS.values() for path in uses(variant)}
    for facts in RECORDED.values():
        assert set(facts["functions"]) == used


def test_another_signature_is_refused_before_it_is_called(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(CURRENT)
    cls = sys.modules["flashinfer.prefill"].BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setattr(cls, "plan", lambda self, qo_indptr, causal: None)
    with pytest.raises(BackendUnavailableError, match=r"has no parameter .*o_data_type.*pip inst"):
        load_names(VARIANTS["FA2"])
    monkeypatch.delattr(cls, "plan")
    with pytest.raises(BackendUnavailableError, match=r"has no BatchPrefill\w+\.plan"):
        load_names(VARIANTS["XQA"])
    assert load_names(VARIANTS["TRTLLM_GEN"])


def test_a_function_that_takes_any_keyword_lacks_none() -> None:
    def plan(indptr: object, **kwargs: object) -> None: ...

    assert lacking_parameters(inspect.signature(plan), ("indptr", "sm_scale")) == []
    assert lacking_parameters(inspect.signature(lambda indptr: 0), ("sm_scale",)) == ["sm_scale"]


@pytest.mark.usefixtures("nothing")
def test_nothing_installed_is_said_with_the_command() -> None:
    status = backend_status("FLASHINFER")
    assert status is not None
    assert "pip install flashinfer-python==0.6.11.post2" in status
    for variant in VARIANTS:
        reason = Backend.variant_unavailable(variant, SM90)
        assert reason is not None
        assert reason.startswith(f"FLASHINFER:{variant} cannot be imported (ModuleNotFoundError")
    assert Backend.unavailable_reason(SM90) is not None


# --- what each variant takes ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "changes", "variant"),
    [
        (SM80, {}, "FA2"),
        (SM90, {}, "FA3"),
        (SM90, {"kv_cache_dtype": "fp8_e4m3"}, "FA2"),
        (SM90, {"head_size": 512}, "FA2"),
        (SM100, {}, "TRTLLM_GEN"),
        (SM100, {"kv_cache_dtype": "fp8_e4m3"}, "TRTLLM_GEN"),
        (SM100, {"has_logits_soft_cap": True}, "FA2"),
        (SM120, {}, "FA2"),
    ],
)
def test_the_default_is_what_vllm_runs(
    device: Device, changes: dict[str, Any], variant: str
) -> None:
    config = PLAIN._replace(**changes)
    assert Backend.default_variant(config, device) in Backend.get_variants(device)
    assert select(config, device, "FLASHINFER").variant == variant
    assert Backend.variant_refusal(variant, config, device) is None


def test_variants_by_device() -> None:
    everywhere = ("FA2", "CUDA_CORES", "CASCADE")
    assert set(Backend.get_variants(SM80)) == set(everywhere)
    assert set(Backend.get_variants(SM90)) == {*everywhere, "FA3", "FA3_DECODE", "XQA"}
    assert set(Backend.get_variants(SM100)) == {*everywhere, "XQA", "TRTLLM_GEN"}
    assert set(Backend.get_variants(SM120)) == {*everywhere, "XQA"}
    for device in (SM80, SM90, SM100, SM120):
        first = Backend.get_variants(device)[0]
        assert first == Backend.default_variant(PLAIN, device)
    with pytest.raises(SelectionError, match=r"TRTLLM_GEN needs compute capability 10\.x, sm90"):
        select(PLAIN, SM90, "FLASHINFER:TRTLLM_GEN")


@pytest.mark.parametrize(
    ("device", "variant", "changes", "words"),
    [
        (SM90, "FA2", {"use_alibi": True}, "no ALiBi"),
        (SM90, "FA2", {"kv_cache_dtype": "nvfp4"}, "nvfp4"),
        (SM90, "FA2", {"kv_cache_dtype": "fp16"}, "same type"),
        (SM100, "FA2", {"has_sink": True}, "TRTLLM-GEN (SM10x) does"),
        (SM90, "FA3", {"kv_cache_dtype": "fp8_e5m2"}, "e4m3 only"),
        (
            SM90,
            "FA3",
            {"kv_cache_dtype": "fp8_e4m3", "has_logits_soft_cap": True},
            "fp8 kernels have no soft cap",
        ),
        (SM90, "FA3_DECODE", {"head_size": 512}, "ends at head size 256"),
        (SM90, "CUDA_CORES", {"num_heads": 48}, "1, 2, 3, 4, 8 query heads a KV head: 6"),
        (SM90, "XQA", {"has_logits_soft_cap": True}, "no soft cap"),
        (SM90, "XQA", {"block_size": 48}, "blocks of 16, 32, 64, 128: 48"),
        (SM90, "XQA", {"kv_cache_dtype": "fp8_e5m2"}, "e4m3 only"),
        (SM100, "TRTLLM_GEN", {"has_logits_soft_cap": True}, "no soft cap"),
        (SM100, "TRTLLM_GEN", {"block_size": 128}, "blocks of 16, 32, 64: 128"),
        (SM90, "CASCADE", {"kv_cache_dtype": "fp8_e4m3"}, "no scales"),
        (SM90, "CASCADE", {"has_sliding_window": True}, "no window"),
        (SM90, "CASCADE", {"head_size": 512}, "cascade is FA3 on 9.x"),
    ],
)
def test_what_a_variant_refuses(
    device: Device, variant: str, changes: dict[str, Any], words: str
) -> None:
    config = PLAIN._replace(**changes)
    reason = Backend.variant_refusal(variant, config, device)
    assert reason is not None
    assert words in reason
    assert Backend.variant_refusal(variant, PLAIN, device) is None
    asked = consider(config, device, f"FLASHINFER:{variant}")
    assert asked.backend == ""
    assert any(words in r for r in asked.candidates[0].reasons)


def test_cascade_takes_head_size_512_where_its_auto_is_fa2() -> None:
    large = PLAIN._replace(head_size=512)
    assert Backend.variant_refusal("CASCADE", large, SM80) is None
    assert Backend.variant_refusal("CASCADE", large, SM100) is None
    assert Backend.variant_refusal("FA2", large, SM90) is None


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        (SM90, {"use_alibi": True}),
        (SM90, {"kv_cache_dtype": "nvfp4"}),
        (SM100, {"has_sink": True, "has_logits_soft_cap": True}),
    ],
)
def test_what_no_variant_takes_is_refused_here_and_not_by_what_vllm_declares(
    device: Device, changes: dict[str, Any]
) -> None:
    config = PLAIN._replace(**changes)
    assert FlashInfer.validate_configuration(config, device) == []
    assert len(Backend.validate_configuration(config, device)) == 1


def test_sinks_that_vllm_refuses_are_refused_once() -> None:
    for device in (SM80, SM90):
        reasons = Backend.validate_configuration(PLAIN._replace(has_sink=True), device)
        assert reasons == ["attention sinks not supported"]


@pytest.mark.parametrize("device", [SM80, SM90, SM100, cuda_device(7, 0), Device("cpu")])
def test_vllm_s_reasons_come_first_and_unchanged(device: Device) -> None:
    for changes in (
        {"head_size": 100},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "int8"},
        {"block_size": 24},
        {"use_mm_prefix": True},
        {"has_sink": True, "head_size": 64},
        {"v_head_size": 64},
        {"kv_cache_layout": "NHD"},
    ):
        config = PLAIN._replace(**changes)
        theirs = FlashInfer.validate_configuration(config, device)
        ours = Backend.validate_configuration(config, device)
        assert ours[: len(theirs)] == theirs
        assert len(ours) <= len(theirs) + 1


# --- compilation ----------------------------------------------------------------------------------
def keys(variant: str, *texts: str) -> list[str]:
    return [Backend.compilation_key(Workload.parse(t), variant, SM90) for t in texts]


@pytest.mark.parametrize("variant", ["FA2", "FA3", "XQA", "CUDA_CORES"])
def test_lengths_batch_and_heads_share_a_kernel(variant: str) -> None:
    same = ["8q1s4k", "q1s77", "32q1s1k heads=8/1 seed=3", "8q1s4k layout=HND"]
    found = keys(variant, *same)
    assert found[0]
    assert len(set(found)) == (2 if variant == "XQA" else 1)  # XQA is compiled for its group
    assert found[0] == found[1] == found[3]


@pytest.mark.parametrize("variant", ["FA2", "FA3", "XQA", "CUDA_CORES", "CASCADE"])
def test_what_a_kernel_is_compiled_for_tells_points_apart(variant: str) -> None:
    other = ["dtype=fp16", "kv=fp8_e4m3", "head_size=64", "window=100", "softcap=20"]
    found = keys(variant, "8q1s4k", *[f"8q1s4k {text}" for text in other])
    assert len(set(found)) == len(found)


def test_prefill_and_decode_are_told_apart_where_their_kernels_are() -> None:
    texts = ("8q1s4k", "q2k", "8q1s4k_q2k")
    assert len(set(keys("FA2", *texts))) == 1
    decode, prefill, both = keys("FA3", *texts)
    assert both == f"{decode} + {prefill}"
    assert keys("XQA", "8q1s4k", "8q1s4k block=32")[0] != keys("XQA", "8q1s4k block=32")[0]


def test_each_kernel_is_compiled_once(install: Install) -> None:
    install(CURRENT)
    workloads = [Workload.parse(t) for t in ("8q1s4k", "q1s512", "64q1s1k", "q2k", "q4k")]
    points = [PlannedPoint(w, "FLASHINFER", "FA3") for w in workloads]
    found = kernels(points, SM90)
    assert sorted(p.workload.text for p in found.values()) == ["q1s512", "q2k"]


# --- in a plan and a chain ------------------------------------------------------------------------
def test_a_plan_takes_what_each_workload_gets_in_vllm() -> None:
    workloads = [Workload.parse("8q1s4k"), Workload.parse("8q1s4k kv=fp8_e4m3")]
    points = plan_workloads(workloads, ["FLASHINFER"], SM90)
    assert [p.variant for p in points] == ["FA3", "FA2"]


def test_an_unfit_point_is_refused_with_the_reason(install: Install) -> None:
    install(CURRENT)
    workload = Workload.parse("8q1s4k softcap=20")
    (unfit,) = refusals(PlannedPoint(workload, "FLASHINFER", "XQA"), SM90)
    assert "no soft cap" in unfit
    assert refusals(PlannedPoint(workload, "FLASHINFER", "FA2"), SM90) == []


def test_the_chain_takes_it_on_a_present_gpu_with_its_library(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaPlatform, "present_device", lambda self: SM100)
    install(CURRENT)
    registry.reload_entry_points()
    taken = select(PLAIN, SM100)
    assert (taken.backend, taken.variant, taken.followed) == (
        "FLASHINFER",
        "TRTLLM_GEN",
        "FLASHINFER",
    )


def test_it_is_registered_as_runnable() -> None:
    assert get_backend_class("FLASHINFER") is Backend
    assert "FLASHINFER" in registry.runnable_backend_names()
    assert Backend.get_name() == "FLASHINFER"
