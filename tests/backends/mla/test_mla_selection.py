"""Finding a library, refusing one that is not here or not fit, and what the selector says of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.mla_libraries import MLA_LIBRARIES, load_functions, variants_of
from attnbench.backends.registry import get_backend_class, runnable_backend_names
from attnbench.errors import BackendUnavailableError, SelectionError
from attnbench.selection import consider, select
from attnbench.workload import Workload
from tests.backends.flash_attn import fake_library as flash_attn
from tests.backends.mla.cases import BACKENDS, BUILDS
from tests.backends.mla.conftest import Install
from tests.backends.mla.fake_library import RECORDED, signature_of
from tests.backends.running import config_of

SM80, SM90, SM100 = cuda_device(8, 0), cuda_device(9, 0), cuda_device(10, 0)
R1 = config_of(Workload.parse("q1s1k shape=deepseek-v3 block=64"))._replace(kv_cache_layout=None)
ALL = [(name, variant) for name in BACKENDS for variant in MLA_LIBRARIES[name]]


@pytest.fixture
def nothing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the libraries is installed, whatever this machine has."""
    for name in [m for m in sys.modules if m.partition(".")[0] in ("vllm", "flash_mla")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("flashinfer", "flashinfer.mla", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("attnbench.backends.mla_libraries.find_spec", lambda name: None)
    monkeypatch.setattr("attnbench.backends.flash_attn_library.find_spec", lambda name: None)


# --- signatures -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("record", "backend", "variant"), BUILDS)
def test_what_is_passed_is_in_every_recorded_signature(
    record: str, backend: str, variant: str
) -> None:
    name, _, part = record.partition(" ")
    library = MLA_LIBRARIES[backend][variant]
    for path, wanted in library.functions.items():
        if part == "flash_attn":
            parameters = flash_attn.signature_of(name, path).parameters
        else:
            parameters = signature_of(record, path).parameters
        assert set(wanted) <= set(parameters), path
        required = {
            n
            for n, p in parameters.items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        assert required - {"self"} <= set(wanted), path
    if part != "flash_attn":
        facts = RECORDED[record]
        assert facts["module"] == library.module
        if library.ops:
            assert (facts["ops"]["module"], facts["ops"]["namespace"]) == (
                library.ops_module,
                library.ops_namespace,
            )
            assert set(library.ops) <= set(facts["ops"])


def test_every_variant_has_a_record() -> None:
    assert {(backend, variant) for _, backend, variant in BUILDS} == set(ALL)


def test_another_signature_is_refused_before_it_is_called(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm-0.22.1 flashmla")
    library = MLA_LIBRARIES["FLASHMLA"]["VLLM"]
    module = sys.modules[library.module]
    monkeypatch.setattr(module, "flash_mla_with_kvcache", lambda q, k_cache: None)
    with pytest.raises(BackendUnavailableError, match=r"has no parameter block_table.*vllm==0"):
        load_functions("FLASHMLA", library)
    monkeypatch.delattr(module, "flash_mla_with_kvcache")
    with pytest.raises(BackendUnavailableError, match="has no flash_mla_with_kvcache"):
        load_functions("FLASHMLA", library)


def test_an_extension_without_the_operator_is_refused(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm-0.22.1 cutlass")
    monkeypatch.delattr(torch.ops._C, "sm100_cutlass_mla_decode")
    reason = BACKENDS["CUTLASS_MLA"].variant_unavailable("SM100", SM100)
    assert reason is not None
    assert "vllm._C_stable_libtorch registers no sm100_cutlass_mla_decode" in reason


# --- what is not here -----------------------------------------------------------------------------
@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(("backend", "variant"), ALL)
def test_nothing_installed_is_said_with_the_command(backend: str, variant: str) -> None:
    library = MLA_LIBRARIES[backend][variant]
    reason = BACKENDS[backend].variant_unavailable(variant, SM90)
    assert reason is not None
    assert reason.startswith(f"{backend}:{variant} cannot be imported (ModuleNotFoundError")
    assert library.install in reason
    with pytest.raises(BackendUnavailableError, match=f"{backend} needs .*not installed"):
        BACKENDS[backend].get_impl_cls()
    with pytest.raises(BackendUnavailableError, match=f"{backend} needs .*not installed"):
        BACKENDS[backend].get_builder_cls()


def test_vllm_s_kernel_files_alone_are_enough_and_vllm_itself_is_never_imported(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm" / "third_party" / "flashmla"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('vLLM was imported')\n")
    (tmp_path / "vllm" / "_flashmla_C.py").write_text("")
    (tmp_path / "vllm" / "_flashmla_extension_C.py").write_text("")
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    lines = ["import vllm._flashmla_C"]
    for name in ("flash_mla_with_kvcache", "get_mla_metadata"):
        parameters = ", ".join(
            n if default is None else f"{n}={default}"
            for n, default in RECORDED["vllm-0.22.1 flashmla"]["functions"][name]
        )
        lines.append(f"def {name}({parameters}): return {name!r}")
    (package / "flash_mla_interface.py").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    operators = type("Operators", (), dict.fromkeys(MLA_LIBRARIES["FLASHMLA"]["VLLM"].ops, print))
    monkeypatch.setattr(torch.ops, "_flashmla_extension_C", operators, raising=False)
    for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        functions = load_functions("FLASHMLA", MLA_LIBRARIES["FLASHMLA"]["VLLM"])
        assert functions["get_mla_metadata"]() == "get_mla_metadata"
        assert "vllm" not in sys.modules
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
            del sys.modules[name]


def test_both_layouts_name_the_same_memory_of_latents() -> None:
    for layout in ("NHD", "HND"):
        config = R1._replace(kv_cache_layout=layout)
        assert BACKENDS["FLASHINFER_MLA"].validate_configuration(config, SM100) == []
        assert BACKENDS["FLASHMLA"].validate_configuration(config, SM90) == []


def of_each(decodes: tuple[str, ...], *prefills: str) -> tuple[str, ...]:
    """Every decode variant with the usual prefill library, then with each other one."""
    return (*decodes, *(f"{decode}+{prefill}" for prefill in prefills for decode in decodes))


# --- what each variant takes ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "device", "variants"),
    [
        ("FLASHMLA", SM90, of_each(("VLLM", "UPSTREAM"), "FA4", "FA2")),
        ("FLASHMLA", SM100, ()),
        ("FLASH_ATTN_MLA", SM90, of_each(("FA3", "FA3_UPSTREAM"), "FA4", "FA2")),
        ("FLASHINFER_MLA", SM90, of_each(("FA3", "FA2"), "FA4", "FA2")),
        ("FLASHINFER_MLA", SM80, ("FA2",)),
        ("FLASHINFER_MLA", SM100, of_each(("TRTLLM_GEN", "CUTE_DSL", "FA2"), "FA2")),
        ("FLASHINFER_MLA", cuda_device(12, 0), ("FA2",)),
        ("CUTLASS_MLA", SM100, ("SM100", "SM100+FA2")),
        ("CUTLASS_MLA", Device("cuda"), of_each(("SM100",), "FA3", "FA4")),
    ],
)
def test_variants_by_device(backend: str, device: Device, variants: tuple[str, ...]) -> None:
    assert variants_of(backend, device) == variants
    assert BACKENDS[backend].get_variants(device)


@pytest.mark.parametrize(
    ("backend", "variant", "device", "changes", "words"),
    [
        ("FLASHMLA", "VLLM", SM90, {"kv_lora_rank": 256}, "512+64 numbers, not 256+64"),
        ("FLASHMLA", "VLLM", SM90, {"has_sliding_window": True}, "no sliding window"),
        ("FLASHMLA", "VLLM", SM90, {"kv_cache_dtype": "fp16"}, "same type"),
        (
            "FLASHMLA",
            "VLLM",
            SM90,
            {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16},
            "writes bf16",
        ),
        ("FLASHMLA", "UPSTREAM", SM90, {"kv_cache_dtype": "fp8_e4m3"}, "FLASHMLA:VLLM does"),
        ("FLASHMLA", "VLLM+FA3", SM80, {}, r"needs compute capability 9.x"),
        ("FLASH_ATTN_MLA", "FA3", SM90, {"has_logits_soft_cap": True}, "no logits soft cap"),
        ("FLASHINFER_MLA", "FA3", SM80, {}, "needs compute capability 9.x"),
        ("FLASHINFER_MLA", "FA2+FA3", SM80, {}, "FA3 needs compute capability 9.x"),
        ("FLASHINFER_MLA", "FA2+FA4", SM80, {}, "FA4 needs compute capability 9.x, 10.x, 11.x"),
        (
            "FLASHINFER_MLA",
            "FA2+FA4",
            SM100,
            {"v_head_size": 96},
            "no kernel for keys of 192 numbers and values of 96",
        ),
        ("FLASHINFER_MLA", "FA2", SM80, {"kv_cache_dtype": "fp8_e4m3"}, "no scale"),
        ("FLASHINFER_MLA", "TRTLLM_GEN", SM100, {"dtype": torch.float16}, "writes bf16"),
        ("FLASHINFER_MLA", "FA2", SM80, {"kv_lora_rank": 256}, "kv_lora_rank 512 only"),
        (
            "FLASHINFER_MLA",
            "TRTLLM_GEN",
            SM100,
            {"num_heads": 24},
            "multiple of 64 query heads: 24",
        ),
        (
            "FLASHINFER_MLA",
            "TRTLLM_GEN",
            SM100,
            {"num_heads": 96},
            "multiple of 64 query heads: 96",
        ),
        ("FLASHINFER_MLA", "CUTE_DSL", SM100, {"num_heads": 64}, "FLASHINFER_MLA:TRTLLM_GEN"),
        ("FLASHINFER_MLA", "CUTE_DSL", SM100, {"kv_lora_rank": 256}, "512 only, not 256"),
        (
            "FLASHINFER_MLA",
            "CUTE_DSL",
            SM100,
            {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16},
            "writes bf16",
        ),
        ("CUTLASS_MLA", "SM100", SM100, {"kv_cache_dtype": "fp8_e4m3"}, "no scale"),
        ("CUTLASS_MLA", "SM100", SM100, {"num_heads": 256}, "at most 128 query heads"),
    ],
)
def test_what_a_variant_refuses(
    backend: str, variant: str, device: Device, changes: dict[str, Any], words: str
) -> None:
    reason = BACKENDS[backend].variant_refusal(variant, R1._replace(**changes), device)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("backend", "variant", "changes"),
    [
        ("FLASHMLA", "VLLM", {"kv_cache_dtype": "fp8_e4m3"}),
        ("FLASHMLA", "UPSTREAM", {"dtype": torch.float16, "kv_cache_dtype": "fp16"}),
        ("FLASH_ATTN_MLA", "FA3", {"kv_lora_rank": 256}),
        ("FLASHINFER_MLA", "TRTLLM_GEN", {"kv_lora_rank": 256, "num_heads": 24}),
        ("FLASHINFER_MLA", "CUTE_DSL", {"dtype": torch.float16}),
        ("FLASHINFER_MLA", "CUTE_DSL", {"kv_cache_dtype": "fp8_e4m3"}),
        *(("FLASHINFER_MLA", "TRTLLM_GEN", {"num_heads": n}) for n in (1, 7, 16, 32, 48, 64, 128)),
        ("CUTLASS_MLA", "SM100", {"num_heads": 128}),
        ("CUTLASS_MLA", "SM100+FA4", {}),
        ("CUTLASS_MLA", "SM100+FA2", {"v_head_size": 96}),
        ("CUTLASS_MLA", "SM100", {"v_head_size": 96}),
    ],
)
def test_what_a_variant_takes(backend: str, variant: str, changes: dict[str, Any]) -> None:
    device = SM90 if backend in ("FLASHMLA", "FLASH_ATTN_MLA") else SM100
    assert BACKENDS[backend].variant_refusal(variant, R1._replace(**changes), device) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", [SM80, SM90, SM100, cuda_device(12, 0), Device("cpu")])
def test_vllm_s_reasons_come_first_and_unchanged(backend: str, device: Device) -> None:
    ours_takes_more = {"compute capability not supported"} if backend == "FLASHINFER_MLA" else set()
    for changes in (
        {},
        {"head_size": 512},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"block_size": 24},
        {"use_sparse": True},
        {"has_sink": True},
        {"qk_nope_head_dim": 96},
    ):
        config = R1._replace(**changes)
        theirs = families()[backend].validate_configuration(config, device)
        ours = BACKENDS[backend].validate_configuration(config, device)
        kept = [reason for reason in theirs if reason not in ours_takes_more]
        assert ours[: len(kept)] == kept
        assert len(ours) <= len(kept) + 1


# --- selection ------------------------------------------------------------------------------------
def test_they_are_registered_as_runnable() -> None:
    for name, cls in BACKENDS.items():
        assert name in runnable_backend_names()
        assert get_backend_class(name) is cls
        assert cls.get_name() == name
        assert cls.is_mla()
        assert cls.get_kv_cache_shape(3, 64, 1, 576) == (3, 64, 576)


@pytest.mark.parametrize(
    ("device", "chosen", "variant"),
    [(SM90, "FLASH_ATTN_MLA", "FA3"), (SM100, "FLASHINFER_MLA", "TRTLLM_GEN")],
)
def test_the_chain_takes_what_vllm_takes(device: Device, chosen: str, variant: str) -> None:
    selection = select(R1, device)
    assert (selection.backend, selection.variant) == (chosen, variant)
    assert selection.followed == chosen


def test_kernels_vllm_does_not_use_are_run_when_asked_for_only() -> None:
    """FlashInfer's FA2 and FA3 change no answer of the chain."""
    for device in (SM80, cuda_device(8, 9), cuda_device(12, 0)):
        assert select(R1, device).backend == select(R1, device).followed == "TRITON_MLA"
        assert select(R1, device, "FLASHINFER_MLA:FA2").variant == "FA2"
    asked = consider(R1, SM90, "FLASHINFER_MLA")
    assert asked.backend == ""
    (reason,) = asked.candidates[0].reasons
    assert "ask for FLASHINFER_MLA:FA3 or FLASHINFER_MLA:FA2" in reason
    assert select(R1, SM90, "FLASHINFER_MLA:FA3").variant == "FA3"
    assert select(R1, SM90, "FLASHMLA:VLLM+FA2").variant == "VLLM+FA2"
    with pytest.raises(SelectionError, match="no variant 'FA3'"):
        select(R1, SM90, "FLASHMLA:FA3")


@pytest.mark.usefixtures("nothing")
def test_a_present_gpu_without_the_libraries_falls_back_with_the_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attnbench.selection.builtin_platforms import CudaPlatform

    monkeypatch.setattr(CudaPlatform, "present_device", lambda self: SM90)
    triton: type[AttentionBackend] = get_backend_class("TRITON_MLA")
    monkeypatch.setattr(triton, "unavailable_reason", classmethod(lambda cls, device: None))
    registry.reload_entry_points()
    config: AttentionConfig = R1
    selection = consider(config, SM90)
    assert selection.backend == "TRITON_MLA"
    for candidate in selection.better_ranked():
        assert any("not installed" in r or "ask for" in r for r in candidate.reasons)
