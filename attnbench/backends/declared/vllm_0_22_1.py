"""What vLLM 0.22.1's attention backends accept, family by family.

Facts read in that wheel; `where` names the file under `vllm/v1/attention/backends/`. KV dtypes are
written in our words (fp16, bf16); `fp8` is vLLM's alias of `fp8_e4m3`, which one family takes only
by that name.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig, MultipleOf
from attnbench.backends.declared.base import ALL_ATTN_TYPES, DECODER, DeclaredBackend
from attnbench.backends.device import Device, DeviceCapability
from attnbench.workload.types import AttentionType

VERSION = "vLLM 0.22.1"

_HALF = (torch.float16, torch.bfloat16)
_HALF_AND_FP32 = (*_HALF, torch.float32)
_KV = ("auto", "fp16", "bf16")
_KV_E4M3 = (*_KV, "fp8", "fp8_e4m3")
_KV_FP8 = (*_KV_E4M3, "fp8_e5m2")
_FP8_FLASH_ATTN = ("fp8", "fp8_e4m3")
_ENCODERS = frozenset({AttentionType.ENCODER, AttentionType.ENCODER_ONLY})
_MI300 = ("gfx942", "gfx950")


class _Declared(DeclaredBackend):
    version = VERSION


# --- FlashAttention, FlashInfer, TurboQuant -------------------------------------------------------
def flash_attn_version(config: AttentionConfig, device: Device) -> int | None:
    """FlashAttention version behind `FLASH_ATTN` (fa_utils.py:60-180), all of them installed."""
    if device.kind == "xpu":
        return 2
    if device.capability is None or device.capability < DeviceCapability(8, 0):
        return None
    major = device.capability.major
    version = {9: 3, 10: 4}.get(major, 2)
    if config.use_alibi:
        version = 2
    if version == 3 and config.head_size > 256:
        version = 4
    if version == 4 and config.use_batch_invariant:
        version = 2
    if version == 4 and major >= 10 and config.head_size > 128 and config.head_size != 192:
        version = 2
    return version


class FlashAttention(_Declared):
    name = "FLASH_ATTN"
    where = "flash_attn.py:68"
    libraries = "FlashAttention 2, 3 and 4 (in vLLM's wheel)"
    block_sizes = (MultipleOf(16),)
    attn_types = ALL_ATTN_TYPES
    non_causal = True
    batch_invariance = True
    device_kinds = ("cuda", "xpu")

    @classmethod
    def _default_version(cls) -> int:
        """The version before a configuration is known; FA4 is not batch-invariant."""
        version = {9: 3, 10: 4}.get(cls._major(), 2)
        return 2 if version == 4 and cls.batch_invariant else version

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        has_fa4 = cls._major() in (9, 10, 11)
        return head_size % 8 == 0 and head_size <= (512 if has_fa4 else 256)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str) -> bool:
        if kv_cache_dtype in _FP8_FLASH_ATTN:
            on_xpu = cls.device is not None and cls.device.kind == "xpu"
            return on_xpu or cls._major() == 9
        return kv_cache_dtype in _KV

    @classmethod
    def supports_sink(cls) -> bool:
        on_xpu = cls.device is not None and cls.device.kind == "xpu"
        return on_xpu or cls._default_version() in (3, 4)

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return cls._default_version() >= 3

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        capability = device.capability
        if config.has_sink and capability is not None and capability < DeviceCapability(9, 0):
            return "sink not supported on compute capability < 9.0"
        return None

    @classmethod
    def note(cls, config: AttentionConfig, device: Device) -> str:
        version = flash_attn_version(config, device)
        return f"FA{version}" if version else ""


class FlashAttentionDiffKV(FlashAttention):
    """vLLM's layer takes it, before the selector is asked, when the widths of K and V differ."""

    name = "FLASH_ATTN_DIFFKV"
    where = "flash_attn_diffkv.py:36"

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return True


class FlashInfer(_Declared):
    name = "FLASHINFER"
    where = "flashinfer.py:326"
    libraries = "flashinfer-python; on SM10x its cubins (package, or NVIDIA's artifact host)"
    supported_kv_cache_dtypes = (*_KV_FP8, "nvfp4")
    head_sizes = (64, 128, 256, 512)
    block_sizes = (16, 32, 64)

    @classmethod
    def supports_sink(cls) -> bool:
        return cls._major() == 10 and not cls.batch_invariant

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return DeviceCapability(7, 5) <= capability <= DeviceCapability(12, 1)

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        return "HND" if cls._major() == 10 else None

    @classmethod
    def note(cls, config: AttentionConfig, device: Device) -> str:
        if cls.at(device)._major() != 10:
            return "fa2/fa3 kernels"
        if config.has_sink:
            return "TRTLLM-GEN kernels; without cubins sinks are refused and FLASH_ATTN is next"
        return "TRTLLM-GEN kernels for decode up to 256 tokens, native ones above"


class TurboQuant(_Declared):
    name = "TURBOQUANT"
    where = "turboquant_attn.py:90"
    block_sizes = (16, 32, 64, 128)
    device_kinds = ("cuda", "rocm", "xpu")

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str) -> bool:
        return kv_cache_dtype.startswith("turboquant_")


# --- MLA on CUDA ----------------------------------------------------------------------------------
class _MLA(_Declared):
    mla = True
    #: MLACommonBackend, model_executor/layers/attention/mla_attention.py:1197
    head_sizes: ClassVar[tuple[int, ...]] = (320, 576)
    majors: ClassVar[tuple[int, ...]] = ()  # empty: any compute capability

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return not cls.majors or capability.major in cls.majors


class FlashAttentionMLA(_MLA):
    name = "FLASH_ATTN_MLA"
    where = "mla/flashattn_mla.py:43"
    libraries = "FlashAttention 3 (in vLLM's wheel)"
    block_sizes = (MultipleOf(16),)
    batch_invariance = True
    majors = (9,)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        if device.capability is not None and device.capability.major == 9:
            return None
        return "FlashAttention MLA not supported on this device"


class FlashMLA(_MLA):
    name = "FLASHMLA"
    where = "mla/flashmla.py:47"
    libraries = "FlashMLA (in vLLM's wheel)"
    supported_kv_cache_dtypes = _KV_E4M3
    block_sizes = (64,)
    majors = (9, 10)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        major = device.capability.major if device.capability is not None else 0
        if config.use_sparse:
            if major in (9, 10):
                return None
            return "FlashMLA Sparse is only supported on Hopper and Blackwell devices"
        return None if major == 9 else "FlashMLA Dense is only supported on Hopper devices"


class FlashInferMLA(_MLA):
    name = "FLASHINFER_MLA"
    where = "mla/flashinfer_mla.py:38"
    libraries = "flashinfer-python"
    supported_kv_cache_dtypes = _KV_E4M3
    block_sizes = (32, 64)
    majors = (10,)
    layout = "HND"

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        width = config.qk_nope_head_dim
        if width not in (64, 128, 192):
            return f"FlashInfer MLA takes qk_nope_head_dim 64, 128 or 192, not {width}"
        return None


class TokenspeedMLA(_MLA):
    name = "TOKENSPEED_MLA"
    where = "mla/tokenspeed_mla.py:59"
    libraries = "tokenspeed-mla"
    supported_kv_cache_dtypes = ("fp8", "fp8_e4m3")
    block_sizes = (32, 64)
    majors = (10,)
    layout = "HND"

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        dims = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_size)
        if dims != (128, 64, 128):
            return f"tokenspeed_mla takes DeepSeek-R1's MLA widths (128, 64, 128), not {dims}"
        return None


class CutlassMLA(_MLA):
    name = "CUTLASS_MLA"
    where = "mla/cutlass_mla.py:38"
    supported_kv_cache_dtypes = _KV_E4M3
    block_sizes = (128,)
    majors = (10,)


class FlashMLASparse(_MLA):
    name = "FLASHMLA_SPARSE"
    where = "mla/flashmla_sparse.py:93"
    libraries = "FlashMLA (in vLLM's wheel)"
    sparse = True
    supported_dtypes = (torch.bfloat16,)
    supported_kv_cache_dtypes = ("auto", "bf16", "fp8_ds_mla", "fp8")
    head_sizes = (576,)
    block_sizes = (64,)
    majors = (9, 10)


class FlashInferMLASparse(_MLA):
    name = "FLASHINFER_MLA_SPARSE"
    where = "mla/flashinfer_mla_sparse.py:55"
    libraries = "flashinfer-python"
    sparse = True
    supported_kv_cache_dtypes = _KV_E4M3
    head_sizes = (576,)
    block_sizes = (32, 64)
    majors = (10,)
    layout = "HND"

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        width = config.qk_nope_head_dim
        if width not in (128, 192):
            return f"FlashInfer MLA Sparse takes qk_nope_head_dim 128 or 192, not {width}"
        if not config.use_sparse:
            return "FlashInfer MLA Sparse requires model with index_topk config"
        return None


# --- ROCm and XPU ---------------------------------------------------------------------------------
class RocmAttention(_Declared):
    name = "ROCM_ATTN"
    where = "rocm_attn.py:165"
    supported_dtypes = _HALF_AND_FP32
    supported_kv_cache_dtypes = _KV_FP8
    head_sizes: ClassVar[tuple[int, ...]] = (32, 64, 80, 96, 128, 160, 192, 224, 256)
    block_sizes = (MultipleOf(16),)
    attn_types = DECODER | _ENCODERS
    mm_prefix = True
    non_causal = True
    device_kinds = ("rocm",)


class RocmAiterFlashAttention(_Declared):
    """`get_name()` in vLLM is FLASH_ATTN; the registered name is the one to key on."""

    name = "ROCM_AITER_FA"
    where = "rocm_aiter_fa.py:716"
    libraries = "aiter"
    supported_kv_cache_dtypes = _KV_FP8
    head_sizes = (64, 128, 256)
    block_sizes = (16, 32)
    non_causal = True
    device_kinds = ("rocm",)

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        # ROCm devices carry an architecture where CUDA's carry a compute capability.
        return None if is_mi300(device) else "compute capability not supported"


class RocmAiterUnifiedAttention(RocmAttention):
    name = "ROCM_AITER_UNIFIED_ATTN"
    where = "rocm_aiter_unified_attn.py:26"
    libraries = "aiter"
    head_sizes = ()
    attn_types = ALL_ATTN_TYPES
    sink = True
    non_causal = False

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size >= 32

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int = 16) -> int:
        return 64


class RocmAiterMLA(_MLA):
    name = "ROCM_AITER_MLA"
    where = "mla/rocm_aiter_mla.py:54"
    libraries = "aiter"
    supported_kv_cache_dtypes = _KV_FP8
    head_sizes = ()
    block_sizes = (MultipleOf(1),)
    device_kinds = ("rocm",)


class RocmAiterTritonMLA(RocmAiterMLA):
    name = "ROCM_AITER_TRITON_MLA"
    where = "mla/aiter_triton_mla.py:6"


class RocmAiterMLASparse(_MLA):
    name = "ROCM_AITER_MLA_SPARSE"
    where = "mla/rocm_aiter_mla_sparse.py:264"
    libraries = "aiter"
    sparse = True
    supported_kv_cache_dtypes = _KV_E4M3
    head_sizes = ()
    block_sizes = (1, 64)
    device_kinds = ("rocm",)


class XpuMLASparse(_MLA):
    name = "XPU_MLA_SPARSE"
    where = "mla/xpu_mla_sparse.py:37"
    sparse = True
    head_sizes = (576,)
    device_kinds = ("xpu",)


def is_mi300(device: Device) -> bool:
    """gfx942 and gfx950, where vLLM 0.22.1 uses AITER (platforms/rocm.py: on_mi3xx)."""
    return device.arch.startswith(_MI300)
