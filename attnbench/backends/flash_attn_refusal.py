"""What the kernels of each FLASH_ATTN variant refuse beyond vLLM's predicates.

Read off the libraries' own checks: hopper/flash_api.cpp and csrc/flash_attn/flash_api.cpp,
flash_attn/cute/interface.py and what it calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.backends.flash_attn_library import LIBRARIES, Library
from attnbench.workload.types import AttentionType

#: FlashAttention 2 and 3 end here, and FA4_UPSTREAM.
MAX_HEAD_SIZE = 256
#: FA4 of vLLM's wheel on Hopper.
MAX_HEAD_SIZE_FA4 = 512
#: FA3 refuses sinks of more query heads (vLLM's build, hopper/flash_api.cpp).
MAX_SINK_HEADS = 64


def refusal(variant: str, config: AttentionConfig, device: Device) -> str | None:
    """Why the kernels of `variant` refuse `config`, None if they take it (or are unknown)."""
    if variant not in LIBRARIES:
        return None
    lib = LIBRARIES[variant]
    if lib.majors and device.capability is not None and device.capability.major not in lib.majors:
        families = ", ".join(f"{major}.x" for major in lib.majors)
        return (
            f"FA{lib.version} needs compute capability {families}, {device} has {device.capability}"
        )
    if not config.kv_cache_dtype.startswith("fp8") and not _is_same_dtype(config):
        return f"a {config.kv_cache_dtype} KV cache needs queries of the same type"
    if reason := _BY_VERSION[lib.version](lib, config, device):
        return reason
    block_size = config.block_size
    if _reads_cache(config) and block_size is not None and block_size % lib.page_multiple:
        return (
            f"{variant} takes blocks of multiples of {lib.page_multiple} only; use "
            f"block={lib.page_multiple}"
        )
    return None


def _refusal_2(lib: Library, config: AttentionConfig, device: Device) -> str | None:
    if config.head_size > MAX_HEAD_SIZE:
        return _too_large(config, MAX_HEAD_SIZE, lib)
    if config.has_sink:
        return "FA2 has no sinks; FA3 (Hopper) and FA4 (Hopper, Blackwell) have"
    if config.kv_cache_dtype.startswith("fp8"):
        return "FA2 reads no fp8 KV cache; FA3 (Hopper) does"
    return None


def _refusal_3(lib: Library, config: AttentionConfig, device: Device) -> str | None:
    is_fp8 = config.kv_cache_dtype.startswith("fp8")
    if config.head_size > MAX_HEAD_SIZE:
        return _too_large(config, MAX_HEAD_SIZE, lib)
    if config.use_alibi:
        return "FA3 has no ALiBi; ask for FLASH_ATTN:FA2"
    if is_fp8 and config.dtype is not torch.bfloat16:
        return "FA3 writes bf16 when the KV cache is fp8; use dtype=bf16"
    if is_fp8 and config.head_size % 16:
        return f"FA3's fp8 kernels take head sizes that are multiples of 16: {config.head_size}"
    if is_fp8 and not _reads_cache(config):
        return "an fp8 KV cache has no meaning where nothing is cached; use kv=auto"
    if config.has_sink and not lib.is_vllm:
        return "sinks are in vLLM's builds of FA3 and FA4 only; ask for FLASH_ATTN:FA3"
    if config.has_sink and config.num_heads > MAX_SINK_HEADS:
        return f"FA3 takes sinks of at most {MAX_SINK_HEADS} query heads: {config.num_heads}"
    return None


def _refusal_4(lib: Library, config: AttentionConfig, device: Device) -> str | None:
    on_blackwell = device.capability is not None and device.capability.major >= 10
    size = config.head_size
    if on_blackwell and size > 128 and (lib.is_vllm or size != MAX_HEAD_SIZE):
        # vLLM's 256 reads no paged cache, and 192 is for values of 128 only (MLA).
        return _too_large(config, 128, lib, "" if lib.is_vllm else " and 256", device)
    most = MAX_HEAD_SIZE_FA4 if lib.is_vllm else MAX_HEAD_SIZE
    if size > most:
        return _too_large(config, most, lib)
    if config.use_alibi:
        return "FA4 has no ALiBi; ask for FLASH_ATTN:FA2"
    if config.kv_cache_dtype.startswith("fp8"):
        return "FA4 is given no scales, so it reads no fp8 KV cache; FA3 (Hopper) does"
    if _reads_cache(config) and size % 16:
        return (
            f"FA4 reads a paged cache of head sizes that are multiples of 16: {size}; ask for "
            "FLASH_ATTN:FA2"
        )
    return None


_Refusal = Callable[[Library, AttentionConfig, Device], str | None]
_BY_VERSION: dict[int, _Refusal] = {2: _refusal_2, 3: _refusal_3, 4: _refusal_4}


def _too_large(
    config: AttentionConfig, most: int, lib: Library, more: str = "", device: Device | None = None
) -> str:
    where = f" on {device}" if device is not None else ""
    instead = "FA2" if config.head_size <= MAX_HEAD_SIZE else "FA4, on Hopper"
    return (
        f"{lib.variant} takes head sizes up to {most}{more}{where}, not {config.head_size}; "
        f"ask for FLASH_ATTN:{instead}"
    )


def _reads_cache(config: AttentionConfig) -> bool:
    return config.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)


def _is_same_dtype(config: AttentionConfig) -> bool:
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return config.kv_cache_dtype in ("auto", names.get(config.dtype))
