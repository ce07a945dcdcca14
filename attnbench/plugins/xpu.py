"""Intel GPUs, as a plug-in: a vendor's platform needs one class and one entry point.

vLLM 0.22.1 forces one backend per case here instead of checking a chain
(`vllm/platforms/xpu.py:50-97` and `:185`).
"""

from __future__ import annotations

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.errors import DeviceError
from attnbench.selection.platform import Platform


class XpuPlatform(Platform):
    kind = "xpu"
    follows = "vLLM 0.22.1 vllm/platforms/xpu.py:50-97, 185"
    examples = ("xpu",)

    def present_device(self) -> Device | None:
        return Device("xpu") if torch.xpu.is_available() else None

    def parse_device(self, text: str) -> Device | None:
        if text.startswith("xpu:"):
            raise DeviceError(f"unknown device {text!r}; write xpu, without an index")
        return Device("xpu") if text == "xpu" else None

    def get_backend_priorities(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        if config.kv_cache_dtype.startswith("turboquant_"):
            return ("TURBOQUANT",)
        if config.use_sparse:
            return ("XPU_MLA_SPARSE",)
        if config.use_mla:
            return ("TRITON_MLA",)
        if config.dtype is torch.float32:
            return ("TRITON_ATTN",)
        return ("FLASH_ATTN",)

    def get_followed_choice(self, config: AttentionConfig, device: Device) -> str:
        return self.get_backend_priorities(config, device)[0]

    def get_notes(self, config: AttentionConfig, device: Device) -> tuple[str, ...]:
        return ("vLLM 0.22.1 forces this backend on XPU and validates nothing",)
