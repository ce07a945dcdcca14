"""Finding a library, refusing one that is not here or not fit, and what the selector says of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import FlashAttention
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flash_attn import FlashAttentionBackend as Backend
from attnbench.backends.flash_attn_kernels import load_kernels
from attnbench.backends.flash_attn_library import LIBRARIES, library, load_functions
from attnbench.backends.registry import backend_status, get_backend_class
from attnbench.errors import BackendUnavailableError, SelectionError
from attnbench.measure.plan import PlannedPoint, plan_workloads
from attnbench.measure.point import refusals
from attnbench.selection import consider, select
from attnbench.selection.builtin_platforms import CudaPlatform
from attnbench.workload import AttentionType, Workload
from tests.backends.flash_attn.conftest import Install
from tests.backends.flash_attn.fake_library import RECORDED, signature_of

SM80, SM90, SM100 = cuda_device(8, 0), cuda_device(9, 0), cuda_device(10, 0)
PLAIN = AttentionConfig(head_size=128, dtype=torch.bfloat16, num_heads=32, num_kv_heads=8)
NAMES = ("vllm", "flash_attn", "flash_attn_interface")


@pytest.fixture
def nothing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """No FlashAttention library is installed, whatever this machine has."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("attnbench.backends.flash_attn_library.find_spec", lambda name: None)


# --- signatures -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "variant"), [(r, v) for r, facts in RECORDED.items() for v in facts["variants"]]
)
def test_what_is_passed_is_in_every_recorded_signature(record: str, variant: str) -> None:
    assert RECORDED[record]["module"] == LIBRARIES[variant].module
    for name, wanted in LIBRARIES[variant].functions.items():
        parameters = signature_of(record, name).parameters
        assert set(wanted) <= set(parameters), name
        required = {n for n, p in parameters.items() if p.default is p.empty}
        assert required <= set(wanted), name


def test_every_variant_has_a_record() -> None:
    recorded = {variant for facts in RECORDED.values() for variant in facts["variants"]}
    assert recorded == set(LIBRARIES)


def test_another_signature_is_refused_before_it_is_called(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm-0.22.1")
    module = sys.modules[LIBRARIES["FA3"].module]
    monkeypatch.setattr(module, "flash_attn_varlen_func", lambda q, k, v, out: None)
    with pytest.raises(BackendUnavailableError, match=r"has no parameter .*fa_version.*vllm==0"):
        load_kernels("FA3")
    monkeypatch.delattr(module, "flash_attn_varlen_func")
    with pytest.raises(BackendUnavailableError, match="has no flash_attn_varlen_func"):
        load_kernels("FA2")


# --- what is not here -----------------------------------------------------------------------------
@pytest.mark.usefixtures("nothing")
def test_nothing_installed_is_said_with_the_commands() -> None:
    status = backend_status("FLASH_ATTN")
    assert status is not None
    for words in ("vllm", "flash_attn_interface", "pip install vllm==0.22.1", "pip install flash"):
        assert words in status
    with pytest.raises(BackendUnavailableError):
        Backend.get_impl_cls()
    for variant, lib in LIBRARIES.items():
        reason = Backend.variant_unavailable(variant, SM90)
        assert reason is not None
        assert reason.startswith(f"FLASH_ATTN:{variant} cannot be imported (ModuleNotFoundError")
        assert lib.install in reason
        with pytest.raises(BackendUnavailableError, match=variant):
            load_kernels(variant)


def test_one_build_never_stands_in_for_another(install: Install) -> None:
    install("flash-attn-2.8.3.post2")
    assert Backend.variant_unavailable("FA2_UPSTREAM", SM90) is None
    assert backend_status("FLASH_ATTN", SM90) is None
    for variant in ("FA3", "FA2", "FA3_UPSTREAM"):
        reason = backend_status("FLASH_ATTN", SM90, variant)
        assert reason is not None
        assert f"FLASH_ATTN:{variant} cannot be imported" in reason
        assert "also installed: FLASH_ATTN:FA2_UPSTREAM" in reason


def test_a_wheel_without_one_version_says_why(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm-0.22.1")
    module = sys.modules[LIBRARIES["FA3"].module]
    monkeypatch.setattr(module, "FA3_AVAILABLE", False)
    monkeypatch.setattr(
        module, "FA3_UNAVAILABLE_REASON", "libcuda.so.1: cannot open", raising=False
    )
    reason = Backend.variant_unavailable("FA3", SM90)
    assert reason is not None
    assert "libcuda.so.1: cannot open" in reason
    assert Backend.variant_unavailable("FA2", SM90) is None


def test_xpu_is_declared_and_not_run() -> None:
    xpu = Device("xpu")
    assert Backend.supports_device(xpu)
    reason = Backend.unavailable_reason(xpu)
    assert reason is not None
    assert "does not call" in reason


# --- vLLM's kernels without vLLM ------------------------------------------------------------------
def _write_vllm(folder: Path) -> None:
    """vLLM's layout: an `__init__` that must not run, and the interface."""
    package = folder / "vllm" / "vllm_flash_attn"
    package.mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("raise RuntimeError('vLLM itself was imported')\n")
    (package / "__init__.py").write_text(
        "from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func\n"
    )
    lines = ["FA2_AVAILABLE = FA3_AVAILABLE = FA4_AVAILABLE = True"]
    for name in RECORDED["vllm-0.22.1"]["functions"]:
        parameters = ", ".join(
            n if default is None else f"{n}={default.replace('torch.bfloat16', 'None')}"
            for n, default in RECORDED["vllm-0.22.1"]["functions"][name]
        )
        lines.append(f"def {name}({parameters}): return {name!r}")
    (package / "flash_attn_interface.py").write_text("\n".join(lines) + "\n")


def test_vllm_s_kernel_files_alone_are_enough_and_vllm_itself_is_never_imported(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_vllm(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        functions = load_functions(library("FA3"))
        assert functions["get_scheduler_metadata"](1, 1, 1, 1, 1, 1, None) == (
            "get_scheduler_metadata"
        )
        assert "vllm" not in sys.modules
        assert load_functions(library("FA2")).keys() == {"flash_attn_varlen_func"}
        with pytest.raises(BackendUnavailableError, match=r"No module named .*cute.*quack-kernels"):
            load_functions(library("FA4"))
        cute = tmp_path / "vllm" / "vllm_flash_attn" / "cute"
        cute.mkdir()
        (cute / "utils.py").touch()
        (cute / "interface.py").write_text("from vllm.vllm_flash_attn.cute import utils\n")
        importlib.invalidate_caches()
        assert load_functions(library("FA4")).keys() == {"flash_attn_varlen_func"}
        assert "vllm.vllm_flash_attn.cute.interface" in sys.modules
        assert "vllm" not in sys.modules
        with pytest.raises(RuntimeError, match="vLLM itself was imported"):
            __import__("vllm")
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "vllm"]:
            del sys.modules[name]


# --- what each variant takes ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "changes", "variant"),
    [
        (SM80, {}, "FA2"),
        (SM90, {}, "FA3"),
        (SM90, {"use_alibi": True}, "FA2"),
        (SM90, {"head_size": 512}, "FA4"),
        (SM100, {}, "FA4"),
        (SM100, {"use_alibi": True}, "FA2"),
        (SM100, {"head_size": 256}, "FA2"),
        (SM100, {"use_batch_invariant": True}, "FA2"),
        (cuda_device(12, 0), {}, "FA2"),
    ],
)
def test_the_default_is_the_version_vllm_takes(
    device: Device, changes: dict[str, Any], variant: str
) -> None:
    config = PLAIN._replace(**changes)
    assert Backend.default_variant(config, device) == variant
    assert Backend.default_variant(config, device) in Backend.get_variants(device)
    selection = select(config, device, "FLASH_ATTN")
    assert selection.variant == variant
    assert selection.candidates[0].note == variant


def test_variants_by_device() -> None:
    upstream = ("FA3_UPSTREAM", "FA4_UPSTREAM", "FA2_UPSTREAM")
    assert Backend.get_variants(SM90) == ("FA3", "FA4", "FA2", *upstream) == tuple(LIBRARIES)
    assert Backend.get_variants(SM100) == ("FA4", "FA2", "FA4_UPSTREAM", "FA2_UPSTREAM")
    for device in (SM80, cuda_device(12, 0)):
        assert Backend.get_variants(device) == ("FA2", "FA2_UPSTREAM")
    with pytest.raises(SelectionError, match=r"FA3 needs compute capability 9\.x, sm80 has 8\.0"):
        select(PLAIN, SM80, "FLASH_ATTN:FA3")


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ("FA3", {"use_alibi": True}, "no ALiBi"),
        ("FA3", {"kv_cache_dtype": "fp8_e4m3", "dtype": torch.float16}, "writes bf16"),
        ("FA3", {"kv_cache_dtype": "fp8_e4m3", "head_size": 72}, "multiples of 16: 72"),
        (
            "FA3",
            {"kv_cache_dtype": "fp8_e4m3", "attn_type": AttentionType.ENCODER_ONLY},
            "nothing is cached",
        ),
        ("FA3", {"has_sink": True, "num_heads": 128}, "at most 64 query heads: 128"),
        ("FA3_UPSTREAM", {"has_sink": True}, "vLLM's build"),
        ("FA2", {"has_sink": True}, "no sinks"),
        ("FA2", {"kv_cache_dtype": "fp8_e4m3"}, "no fp8"),
        ("FA2_UPSTREAM", {"block_size": 16}, "multiples of 256"),
        ("FA2", {"kv_cache_dtype": "fp16"}, "same type"),
        ("FA2", {"head_size": 512}, "up to 256, not 512; ask for FLASH_ATTN:FA4, on Hopper"),
        ("FA3", {"head_size": 512}, "FA3 takes head sizes up to 256, not 512"),
        ("FA4_UPSTREAM", {"head_size": 512}, "FA4_UPSTREAM takes head sizes up to 256, not 512"),
        ("FA4", {"use_alibi": True}, "FA4 has no ALiBi"),
        ("FA4", {"kv_cache_dtype": "fp8_e4m3"}, "no scales"),
        ("FA4_UPSTREAM", {"head_size": 72}, "multiples of 16: 72"),
    ],
)
def test_what_a_variant_refuses(variant: str, changes: dict[str, Any], words: str) -> None:
    reason = Backend.variant_refusal(variant, PLAIN._replace(**changes), SM90)
    assert reason is not None
    assert words in reason
    assert Backend.variant_refusal(variant, PLAIN, SM90) is None
    asked = consider(PLAIN._replace(**changes), SM90, f"FLASH_ATTN:{variant}")
    assert asked.backend == ""
    assert any(words in r for r in asked.candidates[0].reasons)


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ("FA4", {}, ""),
        ("FA4", {"has_sink": True, "num_heads": 128}, ""),
        ("FA4", {"head_size": 192}, "FA4 takes head sizes up to 128 on sm100, not 192"),
        ("FA4", {"head_size": 256}, "up to 128 on sm100, not 256; ask for FLASH_ATTN:FA2"),
        ("FA4_UPSTREAM", {"head_size": 192}, "up to 128 and 256 on sm100, not 192"),
        ("FA4_UPSTREAM", {"head_size": 256}, ""),
        ("FA4", {"head_size": 72, "attn_type": AttentionType.ENCODER}, ""),
        ("FA3", {}, "FA3 needs compute capability 9.x, sm100 has 10.0"),
    ],
)
def test_what_fa4_takes_on_blackwell(variant: str, changes: dict[str, Any], words: str) -> None:
    reason = Backend.variant_refusal(variant, PLAIN._replace(**changes), SM100)
    assert bool(reason) == bool(words)
    assert words in (reason or "")


def test_fa4_is_for_hopper_and_blackwell() -> None:
    for device, has in ((SM80, "8.0"), (cuda_device(12, 0), "12.0")):
        reason = Backend.variant_refusal("FA4", PLAIN, device)
        assert reason is not None
        assert reason.endswith(f"FA4 needs compute capability 9.x, 10.x, 11.x, {device} has {has}")


def test_two_libraries_of_one_package_are_told_apart(
    nothing: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`flash_attn` may hold FA2, FA4 (its `cute` folder), or both."""
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(
        "attnbench.backends.flash_attn_library.find_spec",
        lambda name: spec if name == "flash_attn" else None,
    )
    found = [lib.variant for lib in LIBRARIES.values() if lib.is_found]
    assert found == []
    (tmp_path / "cute").mkdir()
    assert [lib.variant for lib in LIBRARIES.values() if lib.is_found] == ["FA4_UPSTREAM"]
    reason = Backend.variant_unavailable("FA2", SM90)
    assert reason is not None
    assert reason.endswith("also installed: FLASH_ATTN:FA4_UPSTREAM")
    (tmp_path / "flash_attn_interface.py").touch()
    both = [lib.variant for lib in LIBRARIES.values() if lib.is_found]
    assert both == ["FA4_UPSTREAM", "FA2_UPSTREAM"]


def test_blocks_matter_only_where_a_cache_is_read() -> None:
    config = PLAIN._replace(block_size=16, attn_type=AttentionType.ENCODER)
    assert Backend.variant_refusal("FA2_UPSTREAM", config, SM90) is None


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        (SM100, {"head_size": 512}, "FA2 takes head sizes up to 256, not 512"),
        (SM90, {"has_sink": True, "use_alibi": True}, "FA2 has no sinks"),
        (SM90, {"head_size": 264}, "FA4 reads a paged cache of head sizes that are multiples"),
    ],
)
def test_what_only_vllm_can_run_is_refused_here_and_followed_still_says_vllm_s_choice(
    device: Device, changes: dict[str, Any], words: str
) -> None:
    config = PLAIN._replace(**changes)
    assert FlashAttention.validate_configuration(config, device) == []
    (reason,) = Backend.validate_configuration(config, device)
    assert words in reason
    assert consider(config, device).followed in ("FLASH_ATTN", "FLASHINFER")


@pytest.mark.parametrize("device", [SM80, SM90, SM100, cuda_device(7, 5), Device("cpu")])
def test_vllm_s_reasons_come_first_and_unchanged(device: Device) -> None:
    for changes in (
        {"head_size": 100},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"block_size": 24},
        {"use_mm_prefix": True},
        {"has_sink": True, "head_size": 64},
        {"v_head_size": 64},
        {"use_sparse": True},
    ):
        config = PLAIN._replace(**changes)
        theirs = FlashAttention.validate_configuration(config, device)
        ours = Backend.validate_configuration(config, device)
        assert ours[: len(theirs)] == theirs
        assert len(ours) <= len(theirs) + 1


# --- in a plan ------------------------------------------------------------------------------------
def test_a_plan_takes_the_version_each_workload_gets_in_vllm() -> None:
    workloads = [Workload.parse("8q1s4k"), Workload.parse("8q1s4k alibi=1")]
    points = plan_workloads(workloads, ["FLASH_ATTN"], SM90)
    assert [p.variant for p in points] == ["FA3", "FA2"]
    points = plan_workloads(workloads, ["FLASH_ATTN:FA2_UPSTREAM"], SM90)
    assert [p.variant for p in points] == ["FA2_UPSTREAM"] * 2


def test_a_point_on_an_absent_or_unfit_variant_is_refused_with_the_reason(
    install: Install,
) -> None:
    install("flash-attn-2.8.3.post2")
    workload = Workload.parse("8q1s4k")
    (absent,) = refusals(PlannedPoint(workload, "FLASH_ATTN", "FA3"), SM90)
    assert "FLASH_ATTN:FA3 cannot be imported" in absent
    (unfit,) = refusals(PlannedPoint(workload, "FLASH_ATTN", "FA2_UPSTREAM"), SM90)
    assert "multiples of 256" in unfit
    fit = Workload.parse("8q1s4k block=256")
    assert refusals(PlannedPoint(fit, "FLASH_ATTN", "FA2_UPSTREAM"), SM90) == []


def test_the_chain_takes_it_on_a_present_gpu_with_its_library_and_skips_it_without(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaPlatform, "present_device", lambda self: SM90)
    install("flash-attn-2.8.3.post2")
    registry.reload_entry_points()
    skipped = consider(PLAIN, SM90)
    assert skipped.backend != "FLASH_ATTN"
    assert "also installed: FLASH_ATTN:FA2_UPSTREAM" in skipped.candidates[0].reasons[0]
    assert consider(PLAIN, SM90, "FLASH_ATTN:FA2_UPSTREAM").backend == "FLASH_ATTN"
    install("vllm-0.22.1")
    registry.reload_entry_points()
    taken = select(PLAIN, SM90)
    assert (taken.backend, taken.variant, taken.followed) == ("FLASH_ATTN", "FA3", "FLASH_ATTN")


def test_it_is_registered_as_runnable() -> None:
    assert get_backend_class("FLASH_ATTN") is Backend
    assert "FLASH_ATTN" in registry.runnable_backend_names()
    assert Backend.get_name() == "FLASH_ATTN"
    assert Backend.get_kv_cache_shape(3, 16, 8, 128) == (2, 3, 16, 8, 128)
