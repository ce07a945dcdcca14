"""Explicit request, chain, fallback, memo, errors; no side effect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnbench.backends import registry
from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.device import Device
from attnbench.backends.registry import register_backend, unregister_backend
from attnbench.errors import DeviceError, SelectionError, UnknownBackendError
from attnbench.selection import (
    Platform,
    Selection,
    Source,
    candidates,
    consider,
    platform,
    resolve_device,
    select,
)
from tests.backends.fakes import AcceptsAll

BF16 = torch.bfloat16
PLAIN = AttentionConfig(head_size=128, dtype=BF16, num_heads=32, num_kv_heads=8)
SM90 = resolve_device("sm90")


class RefusesAll(AcceptsAll):
    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return False

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return False


class OnlyBlock64(AcceptsAll):
    @classmethod
    def get_supported_kernel_block_sizes(cls) -> tuple[int, ...]:
        return (64,)


class TwoVariants(AcceptsAll):
    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        return ("fast", "slow")


class ToyPlatform(Platform):
    """Three names in its chain, one device that is here and any number that are not."""

    kind = "toy"
    follows = "a test"
    examples = ("toy",)
    chain = ("T_FIRST", "T_SECOND", "T_THIRD")

    def present_device(self) -> Device | None:
        return Device("toy", "here")

    def parse_device(self, text: str) -> Device | None:
        return None

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        return self.chain

    def get_followed_choice(self, config: AttentionConfig, device: Device) -> str:
        return "THEIRS"


HERE = Device("toy", "here")
ELSEWHERE = Device("toy", "elsewhere")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A platform of our own whose chain is T_FIRST, T_SECOND, T_THIRD."""
    found, problems = platform._found()
    monkeypatch.setattr(platform, "_found", lambda: ({**found, "toy": ToyPlatform()}, problems))
    before = set(registry._registered)
    yield
    for name in set(registry._registered) - before:
        unregister_backend(name)


def _register(**classes: type[AttentionBackend]) -> None:
    for name, cls in classes.items():
        register_backend(name, f"{cls.__module__}.{cls.__qualname__}", override=True)


@pytest.mark.usefixtures("toy")
class TestChain:
    def test_first_that_accepts_wins_and_all_are_reported(self) -> None:
        _register(T_FIRST=RefusesAll, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        selection = select(PLAIN, HERE)
        assert selection.backend == "T_SECOND"
        assert selection.source is Source.CHAIN
        assert selection.follows == "a test"
        assert selection.followed == "THEIRS"
        chain = selection.candidates[:3]
        assert [(c.name, c.priority, c.accepted) for c in chain] == [
            ("T_FIRST", 0, False),
            ("T_SECOND", 1, True),
            ("T_THIRD", 2, True),
        ]
        assert chain[0].reasons == ("head_size not supported", "dtype not supported")
        assert [c.name for c in selection.better_ranked()] == ["T_FIRST"]

    def test_fallback_is_any_runnable_backend_and_named_so(self) -> None:
        _register(T_FIRST=RefusesAll, T_SECOND=RefusesAll, T_THIRD=RefusesAll, T_OTHER=AcceptsAll)
        selection = select(PLAIN, HERE)
        assert selection.backend == "T_OTHER"
        assert selection.source is Source.FALLBACK
        fallbacks = [c.name for c in selection.candidates if c.source is Source.FALLBACK]
        assert "TORCH_SDPA" in fallbacks
        assert "TURBOQUANT" not in fallbacks
        assert set(fallbacks).isdisjoint(ToyPlatform.chain)

    def test_nothing_accepts_names_every_candidate_with_every_reason(self) -> None:
        _register(T_FIRST=RefusesAll, T_SECOND=RefusesAll, T_THIRD=OnlyBlock64)
        config = PLAIN._replace(block_size=16)
        with pytest.raises(SelectionError) as caught:
            select(config, HERE)
        message = str(caught.value)
        assert message.startswith("no valid attention backend for (head_size 128, bfloat16")
        for candidate in candidates(config, HERE):
            assert candidate.reasons
            assert f"{candidate.name}: {'; '.join(candidate.reasons)}" in message
        assert "T_FIRST: head_size not supported; dtype not supported" in message
        assert "\n" not in message
        assert consider(config, HERE).backend == ""

    def test_block_size_alone_that_rules_out_a_better_one_is_noted(self) -> None:
        _register(T_FIRST=OnlyBlock64, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        (note,) = select(PLAIN._replace(block_size=16), HERE).notes
        assert "block size 16 alone rules out T_FIRST" in note
        assert select(PLAIN, HERE).backend == "T_FIRST"
        assert select(PLAIN, HERE).notes == ()

    def test_a_missing_library_is_a_reason_only_on_the_device_that_is_here(self) -> None:
        register_backend("T_FIRST", "tests.backends.fakes.NeedsLibrary", override=True)
        _register(T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        here = select(PLAIN, HERE)
        assert here.device_is_present
        assert here.backend == "T_SECOND"
        assert "pip install no-such-attention" in here.candidates[0].reasons[0]
        elsewhere = select(PLAIN, ELSEWHERE)
        assert not elsewhere.device_is_present
        assert elsewhere.backend == "T_FIRST"

    def test_registering_a_backend_changes_the_memoised_answer(self) -> None:
        _register(T_FIRST=RefusesAll, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        assert select(PLAIN, HERE).backend == "T_SECOND"
        _register(T_FIRST=AcceptsAll)
        assert select(PLAIN, HERE).backend == "T_FIRST"


@pytest.mark.usefixtures("toy")
class TestExplicit:
    def test_wins_over_the_chain(self) -> None:
        _register(T_FIRST=AcceptsAll, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        selection = select(PLAIN, HERE, "T_THIRD")
        assert (selection.backend, selection.source) == ("T_THIRD", Source.EXPLICIT)
        assert selection.requested == "T_THIRD"
        assert [c.name for c in selection.candidates] == ["T_THIRD"]

    def test_never_falls_back(self) -> None:
        _register(T_FIRST=AcceptsAll, T_SECOND=RefusesAll, T_THIRD=AcceptsAll)
        with pytest.raises(SelectionError) as caught:
            select(PLAIN, HERE, "T_SECOND")
        message = str(caught.value)
        assert "T_SECOND was asked for and refuses" in message
        assert "head_size not supported; dtype not supported" in message
        assert "leave the request out to take T_FIRST" in message
        refused = consider(PLAIN, HERE, "T_SECOND")
        assert refused.backend == ""
        assert [c.name for c in refused.candidates] == ["T_SECOND"]

    def test_a_variant_may_be_named(self) -> None:
        _register(T_FIRST=TwoVariants, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        assert select(PLAIN, HERE).variant == "fast"
        assert select(PLAIN, HERE, "T_FIRST:slow").variant == "slow"
        with pytest.raises(SelectionError, match=r"no variant 'other'.*fast, slow"):
            select(PLAIN, HERE, "T_FIRST:other")

    @pytest.mark.parametrize("nothing", ["", "auto", "AUTO"])
    def test_auto_asks_for_nothing(self, nothing: str) -> None:
        _register(T_FIRST=AcceptsAll, T_SECOND=AcceptsAll, T_THIRD=AcceptsAll)
        assert select(PLAIN, HERE, nothing).source is Source.CHAIN


def test_every_registered_name_wins_or_fails_and_never_becomes_another() -> None:
    for name in registry.backend_names():
        for device in (SM90, resolve_device("cpu")):
            assert consider(PLAIN, device, name).backend in (name, "")


def test_unknown_names_and_kinds_are_errors() -> None:
    with pytest.raises(UnknownBackendError, match="did you mean FLASH_ATTN"):
        select(PLAIN, SM90, "FLASH_ATN")
    with pytest.raises(DeviceError, match="no platform for devices of kind 'npu'"):
        select(PLAIN, Device("npu"))


def test_two_devices_in_one_process_are_memoised_apart() -> None:
    sm100 = resolve_device("sm100")
    first = select(PLAIN, SM90)
    other = select(PLAIN, sm100)
    assert (first.backend, other.backend) == ("FLASH_ATTN", "FLASHINFER")
    assert select(PLAIN, SM90) is first
    assert select(PLAIN, sm100) is other
    assert select(PLAIN._replace(has_sink=True, head_size=64), SM90) is not first


def test_a_declared_family_can_be_asked_for_on_a_named_device_only() -> None:
    mla = PLAIN._replace(
        use_mla=True, head_size=576, v_head_size=128, qk_nope_head_dim=128, qk_rope_head_dim=64
    )
    assert select(mla, SM90, "FLASHMLA").backend == "FLASHMLA"
    reasons = consider(PLAIN, resolve_device("cpu"), "TURBOQUANT").candidates[0].reasons
    assert "device cpu not supported" in reasons
    assert any(reason.startswith("selection only: ") for reason in reasons)


def test_a_present_gpu_skips_what_this_process_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench.selection.builtin_platforms import CudaPlatform

    registry.reload_entry_points()  # a new generation: no memoised answer is read
    monkeypatch.setattr(CudaPlatform, "present_device", lambda self: SM90)
    monkeypatch.setattr(
        registry.get_backend_class("TRITON_ATTN"),
        "unavailable_reason",
        classmethod(lambda cls, device: None),
    )
    monkeypatch.setattr(
        registry.get_backend_class("FLASH_ATTN"),
        "unavailable_reason",
        classmethod(lambda cls, device: "its library is not installed"),
    )
    try:
        selection = select(PLAIN, SM90)
    finally:
        registry.reload_entry_points()
    assert selection.device_is_present
    assert selection.backend == "TRITON_ATTN"
    assert selection.followed == "FLASH_ATTN"
    refused = {c.name: c.reasons for c in selection.better_ranked()}
    assert set(refused) == {"FLASH_ATTN", "FLASHINFER"}
    assert [len(reasons) for reasons in refused.values()] == [1, 1]
    assert "installed" in refused["FLASH_ATTN"][0]
    assert "flashinfer is not installed; pip install" in refused["FLASHINFER"][0]


def test_selection_has_no_side_effect(tmp_path: Path) -> None:
    """In a fresh process: no environment, torch setting, thread, file or vendor library changes."""
    code = """
import json, os, sys, threading
import torch
from attnbench.backends.abstract import AttentionConfig
from attnbench.selection import consider, resolve_device

def state():
    return {
        "environ": dict(os.environ),
        "default_dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "python_threads": threading.active_count(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flash_sdp": torch.backends.cuda.flash_sdp_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "rng": torch.get_rng_state().tolist(),
        "files": sorted(os.listdir(".")),
        "path": list(sys.path),
    }

before = state()
plain = AttentionConfig(head_size=128, dtype=torch.bfloat16)
for text in ("sm80", "sm100", "gfx942", "cpu"):
    for config in (plain, plain._replace(has_sink=True), plain._replace(use_mla=True)):
        consider(config, resolve_device(text))
        consider(config, resolve_device(text), "TORCH_SDPA")
after = state()
changed = [key for key in before if before[key] != after[key]]
vendors = [m for m in ("vllm", "flash_attn", "flashinfer", "aiter") if m in sys.modules]
print(json.dumps([changed, vendors]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=200,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout) == [[], []]


def test_a_selection_is_a_value() -> None:
    selection = select(PLAIN, SM90)
    assert isinstance(hash(selection), int)
    assert isinstance(selection, Selection)
    with pytest.raises(AttributeError):
        selection.backend = "OTHER"  # type: ignore[misc]
