"""vLLM 0.22.1's own backends that share a name with one attnbench runs."""

from __future__ import annotations

from attnbench.backends.abstract import MultipleOf
from attnbench.backends.declared.base import ALL_ATTN_TYPES
from attnbench.backends.declared.vllm_0_22_1 import (
    _HALF_AND_FP32,
    _KV_E4M3,
    _KV_FP8,
    _MLA,
    _Declared,
)
from attnbench.workload.types import AttentionType


class VllmTritonAttention(_Declared):
    name = "TRITON_ATTN"
    where = "triton_attn.py:271"
    supported_dtypes = _HALF_AND_FP32
    supported_kv_cache_dtypes = (*_KV_FP8, "int8_per_token_head", "fp8_per_token_head")
    block_sizes = (MultipleOf(16),)
    attn_types = ALL_ATTN_TYPES
    sink = True
    mm_prefix = True
    batch_invariance = True
    device_kinds = ("cuda", "rocm", "xpu")

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size >= 32

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True


class VllmFlexAttention(_Declared):
    name = "FLEX_ATTENTION"
    where = "flex_attention.py:80"
    supported_dtypes = _HALF_AND_FP32
    block_sizes = (MultipleOf(16),)
    attn_types = frozenset({AttentionType.DECODER, AttentionType.ENCODER_ONLY})
    mm_prefix = True
    non_causal = True
    batch_invariance = True


class VllmTritonMLA(_MLA):
    name = "TRITON_MLA"
    where = "mla/triton_mla.py:36"
    supported_kv_cache_dtypes = _KV_E4M3
    head_sizes = ()
    block_sizes = (MultipleOf(16),)
    batch_invariance = True
    device_kinds = ("cuda", "rocm", "xpu")


class VllmCPUAttention(_Declared):
    name = "CPU_ATTN"
    where = "cpu_attn.py:44"
    supported_dtypes = _HALF_AND_FP32
    supported_kv_cache_dtypes = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")
    head_sizes = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    block_sizes = (MultipleOf(16),)
    attn_types = ALL_ATTN_TYPES
    layout = "HND"
    device_kinds = ("cpu",)
