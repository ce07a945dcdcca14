"""What each kernel of torch's `scaled_dot_product_attention` refuses, by torch's own rules.

Read in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`can_use_*_attention`, commit 001f694)
and, for the CPU, seen when run. A rule that depends on the version of cuDNN or AOTriton is given as
the widest version has it: what an older one refuses is an error when it runs, never another kernel.
"""

from __future__ import annotations

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device, DeviceCapability

_HALF = (torch.float16, torch.bfloat16)
#: Widest head of each kernel: flash on CUDA (AOTriton on ROCm), cuDNN on 9.0 and 10.x (elsewhere).
_FLASH_WIDTH = {"cuda": 256, "rocm": 512}
_CUDNN_WIDTH = {True: 256, False: 128}


def sdpa_refusal(variant: str, config: AttentionConfig, device: Device) -> str | None:
    """Why the kernel `variant` refuses `config` on `device`; None: it takes it, or may."""
    refuse = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient}.get(variant)
    reason = refuse(config, device) if refuse is not None else None
    return f"torch's {variant} kernel {reason}; ask for TORCH_SDPA:math" if reason else None


def _flash(config: AttentionConfig, device: Device) -> str | None:
    if config.v_head_size not in (None, config.head_size):
        return "needs values as wide as keys"
    if config.use_alibi:
        return "takes no bias by head"
    if device.kind == "cpu":
        return None
    if config.dtype not in _HALF:
        return "is fp16 or bf16"
    if config.head_size > _FLASH_WIDTH.get(device.kind, 256):
        return f"takes heads of at most {_FLASH_WIDTH.get(device.kind, 256)} numbers"
    return _too_old(device)


def _cudnn(config: AttentionConfig, device: Device) -> str | None:
    if config.dtype not in _HALF:
        return "is fp16 or bf16"
    widths = (config.head_size, config.v_head_size or config.head_size)
    if any(width % 8 for width in widths):
        return "takes heads of multiples of 8 numbers"
    capability = device.capability
    # The width of heads on 9.0 and 10.x grew with cuDNN 9.11 and 9.22.
    is_wide = capability is None or capability.major in (9, 10)
    if max(widths) > _CUDNN_WIDTH[is_wide]:
        return f"takes heads of at most {_CUDNN_WIDTH[is_wide]} numbers here"
    return _too_old(device)


def _efficient(config: AttentionConfig, device: Device) -> str | None:
    alignment = 8 if config.dtype in _HALF else 4
    widths = (config.head_size, config.v_head_size or config.head_size)
    if any(width % alignment for width in widths):
        return f"takes heads of multiples of {alignment} numbers in this dtype"
    if device.kind == "rocm" and config.num_heads != config.num_kv_heads:
        return "takes as many KV heads as query heads on ROCm"
    if config.dtype is torch.bfloat16:
        return _too_old(device)
    return None


def _too_old(device: Device) -> str | None:
    capability = device.capability
    if capability is not None and capability < DeviceCapability(8, 0):
        return f"needs compute capability 8.0, {device} has {capability}"
    return None
