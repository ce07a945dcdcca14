"""The built-in platforms: CUDA by compute capability, ROCm, CPU. They follow vLLM 0.22.1."""

from __future__ import annotations

import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.declared.vllm_0_22_1 import is_mi300
from attnbench.backends.device import Device, DeviceCapability, cuda_device, parse_device
from attnbench.errors import DeviceError
from attnbench.selection.platform import Platform

_FEW_HEADS = 16  # FlashMLA pads the heads: below this FlashInfer's sparse kernel is tried first


class CudaPlatform(Platform):
    kind = "cuda"
    follows = "vLLM 0.22.1 vllm/platforms/cuda.py:79-147"
    examples = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120")

    def present_device(self) -> Device | None:
        if torch.version.hip is not None or not torch.cuda.is_available():
            return None
        return cuda_device(*torch.cuda.get_device_capability())

    def parse_device(self, text: str) -> Device | None:
        if text in ("cuda", "gpu"):
            device = self.present_device()
            if device is None and text == "cuda":
                raise DeviceError("no CUDA device here; name a capability, e.g. --device sm90")
            return device
        return _of_kind(text, self.kind)

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        blackwell = device.capability is not None and device.capability.major == 10
        if config.use_mla:
            return _blackwell_mla(config) if blackwell else _hopper_mla()
        if _widths_differ(config):
            # The layer, not vLLM's selector, decides this; the order behind it is the selector's.
            return ("FLASH_ATTN_DIFFKV", *self.get_backend_priorities(_same_width(config), device))
        first = ("FLASHINFER", "FLASH_ATTN") if blackwell else ("FLASH_ATTN", "FLASHINFER")
        return (*first, "TRITON_ATTN", "FLEX_ATTENTION", "TURBOQUANT")

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        capability = device.capability
        if (
            config.dtype is torch.bfloat16
            and capability is not None
            and capability < DeviceCapability(8, 0)
        ):
            return ("vLLM refuses bf16 below compute capability 8.0 before it selects a backend",)
        if _widths_differ(config):
            return (
                "vLLM's layer takes FLASH_ATTN_DIFFKV itself when the widths of K and V differ",
            )
        return ()


def _widths_differ(config: AttentionConfig) -> bool:
    return not config.use_mla and config.v_head_size not in (None, config.head_size)


def _same_width(config: AttentionConfig) -> AttentionConfig:
    return config._replace(v_head_size=None)


def _hopper_mla() -> tuple[str, ...]:
    """Every compute capability but 10.x."""
    return ("FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "TRITON_MLA", "FLASHMLA_SPARSE")


def _blackwell_mla(config: AttentionConfig) -> tuple[str, ...]:
    sparse = ("FLASHMLA_SPARSE", "FLASHINFER_MLA_SPARSE")
    if is_quantized_kv_cache(config.kv_cache_dtype) or config.num_heads <= _FEW_HEADS:
        sparse = ("FLASHINFER_MLA_SPARSE", "FLASHMLA_SPARSE")
    dense = ("FLASHINFER_MLA", "TOKENSPEED_MLA", "CUTLASS_MLA", "FLASH_ATTN_MLA", "FLASHMLA")
    return (*dense, "TRITON_MLA", *sparse)


class RocmPlatform(Platform):
    """`gfx942+aiter` names the same GPU with `VLLM_ROCM_USE_AITER=1`, which vLLM leaves off."""

    kind = "rocm"
    follows = "vLLM 0.22.1 vllm/platforms/rocm.py:362-393"
    examples = ("gfx942", "gfx942+aiter")

    def present_device(self) -> Device | None:
        if torch.version.hip is None or not torch.cuda.is_available():
            return None
        name: str = torch.cuda.get_device_properties(0).gcnArchName
        return Device("rocm", name.partition(":")[0])

    def parse_device(self, text: str) -> Device | None:
        if text in ("rocm", "gpu"):
            present = self.present_device()
            if present is None and text == "rocm":
                raise DeviceError("no ROCm device here; name an architecture, e.g. --device gfx942")
            return present
        arch, plus, suffix = text.partition("+")
        device = _of_kind(arch, self.kind)
        if device is None or not plus:
            return device
        if suffix != "aiter":
            raise DeviceError(
                f"unknown device {text!r}; after the architecture only +aiter may "
                "follow, e.g. gfx942+aiter"
            )
        return Device("rocm", f"{device.arch}+aiter")

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        aiter = device.arch.endswith("+aiter") and is_mi300(device)
        if config.use_sparse:
            return ("ROCM_AITER_MLA_SPARSE",)
        if config.use_mla:
            if aiter:
                return ("ROCM_AITER_MLA", "TRITON_MLA", "ROCM_AITER_TRITON_MLA")
            return ("TRITON_MLA",)
        names = ["ROCM_ATTN"]
        if aiter:
            names.append("ROCM_AITER_FA")
        if is_mi300(device):
            names.append("ROCM_AITER_UNIFIED_ATTN")
        return (*names, "TRITON_ATTN", "TURBOQUANT")

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        if device.arch.endswith("+aiter"):
            return ()
        assumed = "the aiter package is assumed installed and VLLM_ROCM_USE_AITER unset"
        return (f"{assumed}; write {device.arch}+aiter for VLLM_ROCM_USE_AITER=1",)

    def is_present(self, device: Device) -> bool:
        present = self.present_device()
        return present is not None and present.arch == device.arch.partition("+")[0]


class CpuPlatform(Platform):
    kind = "cpu"
    follows = "vLLM 0.22.1 vllm/platforms/cpu.py:70-86"
    examples = ("cpu",)

    def present_device(self) -> Device | None:
        return Device("cpu")

    def parse_device(self, text: str) -> Device | None:
        return _of_kind(text, self.kind)

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        # vLLM 0.22.1 has no MLA on CPU; ours is a choice of attnbench (see get_notes).
        return ("TORCH_MLA",) if config.use_mla else ("CPU_ATTN",)

    def get_followed_choice(self, config: AttentionConfig, device: Device) -> str:
        return "" if config.use_mla or config.use_sparse else "CPU_ATTN"

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        if config.use_mla:
            return ("vLLM 0.22.1 raises NotImplementedError for MLA on CPU; TORCH_MLA is ours",)
        return ("vLLM 0.22.1 takes CPU_ATTN on CPU whatever is asked, and checks nothing",)


def _of_kind(text: str, kind: str) -> Device | None:
    device = parse_device(text)
    return device if device is not None and device.kind == kind else None
