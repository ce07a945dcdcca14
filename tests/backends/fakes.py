"""A backend that accepts everything and runs nothing, for tests of the contract and registry."""

from __future__ import annotations

from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.impl import AttentionImplBase
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.workload.types import AttentionType


class FakeBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        return common_attn_metadata


class FakeImpl(AttentionImplBase[CommonAttentionMetadata]):
    pass


class AcceptsAll(AttentionBackend):
    supported_dtypes = (torch.float16, torch.bfloat16, torch.float32)
    supported_kv_cache_dtypes = ("auto", "fp16", "bf16", "fp8_e4m3")

    @staticmethod
    def get_name() -> str:
        return "ACCEPTS_ALL"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase[Any]]:
        return FakeImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder[Any]]:
        return FakeBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return True

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return True

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True


class NeedsLibrary(AcceptsAll):
    install_hint = "pip install no-such-attention"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase[Any]]:
        raise ImportError("No module named 'no_such_attention'")


PLAIN = AttentionConfig(head_size=128, dtype=torch.bfloat16)
