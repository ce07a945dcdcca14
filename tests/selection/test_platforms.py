"""Device texts, the current device, and platforms that come and go by entry point."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device, DeviceCapability
from attnbench.errors import DeviceError, UsageError
from attnbench.selection import (
    consider,
    current_device,
    platform,
    platform_problems,
    platforms,
    resolve_device,
)
from attnbench.selection.builtin_platforms import CudaPlatform, RocmPlatform

PLAIN = AttentionConfig(head_size=128, dtype=torch.bfloat16, num_heads=32, num_kv_heads=8)


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu")),
        ("sm90", Device("cuda", "sm90", DeviceCapability(9, 0))),
        ("SM_90a", Device("cuda", "sm90", DeviceCapability(9, 0))),
        ("cuda:sm86", Device("cuda", "sm86", DeviceCapability(8, 6))),
        ("8.9", Device("cuda", "sm89", DeviceCapability(8, 9))),
        ("sm120", Device("cuda", "sm120", DeviceCapability(12, 0))),
        ("12.1", Device("cuda", "sm121", DeviceCapability(12, 1))),
        ("gfx942", Device("rocm", "gfx942")),
        ("gfx90a", Device("rocm", "gfx90a")),
        ("gfx942+aiter", Device("rocm", "gfx942+aiter")),
        ("xpu", Device("xpu")),
    ],
)
def test_device_texts(text: str, device: Device) -> None:
    assert resolve_device(text) == device


@pytest.mark.parametrize("text", ["", "auto", " Auto "])
def test_auto_is_this_machine(text: str) -> None:
    assert resolve_device(text) == current_device()


@pytest.mark.parametrize("text", ["h100", "sm", "sm9", "sm999", "gfx942+foo", "npu0", "xpu:0"])
def test_a_text_that_names_nothing_says_what_would(text: str) -> None:
    with pytest.raises(DeviceError, match=r"sm90|gfx942\+aiter|write xpu"):
        resolve_device(text)


def test_cuda_without_one_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device sm90"):
        resolve_device("cuda")
    with pytest.raises(DeviceError, match="--device gfx942"):
        resolve_device("rocm")


def test_present_devices_of_each_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.version, "hip", None)
    assert CudaPlatform().present_device() == resolve_device("sm89")
    assert RocmPlatform().present_device() is None

    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    assert CudaPlatform().present_device() is None
    assert RocmPlatform().present_device() == resolve_device("gfx942")
    assert RocmPlatform().is_present(resolve_device("gfx942+aiter"))
    assert not RocmPlatform().is_present(resolve_device("gfx90a"))
    assert resolve_device("rocm") == resolve_device("gpu") == Device("rocm", "gfx942")
    assert Device("rocm", "gfx942").torch_device == "cuda"


def test_cpu_comes_last_so_that_an_accelerator_is_preferred() -> None:
    kinds = [found.kind for found in platforms()]
    assert kinds[:2] == ["cuda", "rocm"]
    assert kinds[-1] == "cpu"
    assert "xpu" in kinds


def test_every_example_is_a_device_of_its_platform() -> None:
    for found in platforms():
        assert found.follows
        for text in found.examples:
            device = resolve_device(text)
            assert device.kind == found.kind
            assert str(device) == text


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "FLASH_ATTN"),
        ({"dtype": torch.float32}, "TRITON_ATTN"),
        ({"use_mla": True}, "TRITON_MLA"),
        ({"use_mla": True, "use_sparse": True}, "XPU_MLA_SPARSE"),
        ({"kv_cache_dtype": "turboquant_k8v4"}, "TURBOQUANT"),
    ],
)
def test_the_shipped_plug_in_answers_for_xpu(changes: dict[str, object], backend: str) -> None:
    """vLLM 0.22.1 platforms/xpu.py:50-97 forces one backend in each case."""
    selection = consider(PLAIN._replace(**changes), Device("xpu"))  # type: ignore[arg-type]
    assert selection.followed == backend
    assert selection.candidates[0].name == backend
    assert "xpu.py" in selection.follows


@pytest.fixture
def entry_points_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test change what is installed, and puts everything back."""
    yield monkeypatch
    monkeypatch.undo()
    platform.reload_platforms()


def test_without_its_entry_point_the_device_is_gone(
    entry_points_of: pytest.MonkeyPatch,
) -> None:
    assert resolve_device("xpu") == Device("xpu")
    entry_points_of.setattr(
        platform, "entry_points", lambda group: importlib.metadata.EntryPoints()
    )
    platform.reload_platforms()
    assert [found.kind for found in platforms()] == ["cuda", "rocm", "cpu"]
    with pytest.raises(DeviceError, match="unknown device 'xpu'"):
        resolve_device("xpu")
    with pytest.raises(DeviceError, match="no platform for devices of kind 'xpu'"):
        consider(PLAIN, Device("xpu"))


def _install(folder: Path, package: str, line: str) -> None:
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[attnbench.platforms]\n{line}\n")


VENDOR = """
from attnbench.backends.device import Device
from attnbench.selection import Platform

class NpuPlatform(Platform):
    kind = "npu"
    follows = "the vendor's own rule"
    examples = ("npu",)

    def present_device(self):
        return None

    def parse_device(self, text):
        return Device("npu") if text == "npu" else None

    def get_backend_priorities(self, config, device):
        return ("TORCH_SDPA",)
"""


def test_a_vendor_slots_in_by_installing_a_package(
    tmp_path: Path, entry_points_of: pytest.MonkeyPatch
) -> None:
    (tmp_path / "npu_vendor.py").write_text(VENDOR)
    _install(tmp_path, "npu-vendor", "npu = npu_vendor:NpuPlatform")
    entry_points_of.syspath_prepend(str(tmp_path))
    platform.reload_platforms()
    device = resolve_device("npu")
    selection = consider(PLAIN, device)
    assert selection.follows == "the vendor's own rule"
    assert selection.candidates[0].name == "TORCH_SDPA"
    assert selection.followed == ""


def test_a_broken_plug_in_is_reported_and_takes_nothing_down(
    tmp_path: Path, entry_points_of: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "broken-vendor", "npu = no_such_vendor:Platform\npath = pathlib:Path")
    entry_points_of.syspath_prepend(str(tmp_path))
    platform.reload_platforms()
    assert resolve_device("sm90").kind == "cuda"
    broken, wrong = sorted(platform_problems())
    assert "npu of package broken-vendor cannot be loaded" in broken
    assert "uninstall broken-vendor" in broken
    assert "path of package broken-vendor is no Platform" in wrong


def test_two_owners_of_one_kind_are_both_named(
    tmp_path: Path, entry_points_of: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "second-xpu", "other = attnbench.plugins.xpu:XpuPlatform")
    entry_points_of.syspath_prepend(str(tmp_path))
    platform.reload_platforms()
    with pytest.raises(UsageError, match="registered twice") as caught:
        platforms()
    assert "package attnbench" in str(caught.value)
    assert "package second-xpu" in str(caught.value)
