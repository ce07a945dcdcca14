"""FLASH_ATTN: FlashAttention 2, 3 and 4 over a paged KV cache, by the real libraries.

What it accepts is vLLM 0.22.1's FLASH_ATTN as declared for the selector, less what none of its
libraries takes. What a call costs beside the kernel: an fp8 KV cache needs fp8 queries, quantised
in `forward` unless they come so (vLLM's layer does it before); the `_UPSTREAM` libraries return a
new tensor, which is copied to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.declared.vllm_0_22_1 import FlashAttention, flash_attn_version
from attnbench.backends.device import Device
from attnbench.backends.dtypes import is_fp8
from attnbench.backends.flash_attn_calls import (
    NO_WINDOW,
    Descales,
    FlashAttentionMetadata,
    LayerOptions,
)
from attnbench.backends.flash_attn_kernels import load_kernels
from attnbench.backends.flash_attn_library import (
    LIBRARIES,
    missing_reason,
    require_any,
    variants_of,
)
from attnbench.backends.flash_attn_refusal import refusal
from attnbench.backends.graph_buffers import GraphBuffers
from attnbench.backends.impl import AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_impl import PagedAttentionImpl
from attnbench.backends.paged_ops import quantize
from attnbench.errors import UsageError
from attnbench.workload.types import AttentionShape, AttentionType

#: vLLM 0.22.1's `flash_attn_max_num_splits_for_cuda_graph`, and the most tokens it captures
#: (config/attention.py:28, config/compilation.py:686). The kernel's scratch has this many parts.
GRAPH_MAX_NUM_SPLITS = 32
GRAPH_MAX_TOKENS = 512


class FlashAttentionBackend(PairedCacheBackend, FlashAttention):
    """Variants: FA3, FA4 and FA2 of vLLM's wheel, and _UPSTREAM ones of FlashAttention's own
    packages. Asked for none, the version is the one vLLM takes for the configuration."""

    install_hint: ClassVar[str] = LIBRARIES["FA3"].install

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Raises BackendUnavailableError when no FlashAttention library is installed."""
        require_any()
        return FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Raises BackendUnavailableError when no FlashAttention library is installed."""
        require_any()
        return FlashAttentionMetadataBuilder

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        return variants_of(device)

    @classmethod
    def default_variant(cls, config: AttentionConfig, device: Device) -> str:
        """vLLM 0.22.1's rule (fa_utils.py:60-180)."""
        return f"FA{flash_attn_version(config, device) or 2}"

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return (LIBRARIES[variant].kernel_pattern,) if variant in LIBRARIES else ()

    @classmethod
    def variant_refusal(cls, variant: str, config: AttentionConfig, device: Device) -> str | None:
        return refusal(variant, config, device)

    @classmethod
    def variant_unavailable(cls, variant: str, device: Device) -> str | None:
        if device.kind != "cuda":
            return f"on {device} FLASH_ATTN has kernels in vLLM only, which attnbench does not call"
        return missing_reason(variant)

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        """The default variant's reason when no variant of `device` can be loaded."""
        reasons = []
        for variant in cls.get_variants(device):
            reason = cls.variant_unavailable(variant, device)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0]

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """vLLM's reason, else that of the default variant when no variant takes the combination."""
        if reason := super().supports_combination(config, device):
            return reason
        if all(refusal(variant, config, device) for variant in cls.get_variants(device)):
            return refusal(cls.default_variant(config, device), config, device)
        return None


class FlashAttentionMetadataBuilder(AttentionMetadataBuilder[FlashAttentionMetadata]):
    """Passes the batch on and, for FA3, makes the kernel's schedule ahead of time, as vLLM does."""

    #: FA2's graphs of single-token batches serve no other ones; FA3's serve all. FA4 as in vLLM.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: ClassVar[bool] = True

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.kernels = load_kernels(variant)
        self._buffers = GraphBuffers()

    @property
    def cudagraph_support(self) -> AttentionCGSupport:
        if self.kernels.library.version == 3:
            return AttentionCGSupport.ALWAYS
        return self.get_cudagraph_support(self.spec)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """`common_prefix_len` changes nothing: a shared prefix gets no pass of its own."""
        return self._build(common_attn_metadata, 0, not fast_build)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        """As vLLM captures: a fixed bound on FA3's splits, its schedule in memory that stays."""
        common = common_attn_metadata
        is_fa3 = self.kernels.library.version == 3
        small = is_fa3 and common.num_actual_tokens <= GRAPH_MAX_TOKENS
        metadata = self._build(common, GRAPH_MAX_NUM_SPLITS if small else 0, True)
        schedule, key_start_loc = metadata.scheduler_metadata, metadata.key_start_loc
        if schedule is not None:
            metadata.scheduler_metadata = self._buffers.keep("schedule", schedule)
        if key_start_loc is not None:
            metadata.key_start_loc = self._buffers.keep("key_start_loc", key_start_loc)
        return metadata

    def _build(
        self, common: CommonAttentionMetadata, max_num_splits: int, ahead_of_time: bool
    ) -> FlashAttentionMetadata:
        key_start_loc = None
        if self.kernels.needs_key_start_loc:
            key_start_loc = torch.zeros_like(common.query_start_loc)
            torch.cumsum(common.seq_lens, 0, dtype=torch.int32, out=key_start_loc[1:])
        schedule = None
        if ahead_of_time:
            schedule = self.kernels.schedule(self.spec, common, max_num_splits)
        return FlashAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            key_start_loc=key_start_loc,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            scheduler_metadata=schedule,
            max_num_splits=max_num_splits,
        )

    def update_block_table(
        self,
        metadata: FlashAttentionMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> FlashAttentionMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class FlashAttentionImpl(PagedAttentionImpl[FlashAttentionMetadata]):
    """One call of the library."""

    name: ClassVar[str] = "FLASH_ATTN"
    can_return_lse_for_decode: ClassVar[bool] = True
    supports_quant_query_input: ClassVar[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises UsageError without a variant, BackendUnavailableError without its library."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.kernels = load_kernels(variant)
        window = NO_WINDOW
        if self.sliding_window:
            left = self.sliding_window - 1
            window = (left, left if self.is_encoder else 0)
        self.options = LayerOptions(
            scale=self.scale,
            window=window,
            soft_cap=self.logits_soft_cap,
            alibi_slopes=alibi_slopes,
            # FA3 and FA4 take sinks in bf16, as models store them.
            sinks=None if sinks is None else sinks.to(torch.bfloat16),
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `AttentionImpl.forward`; with an fp8 cache `query` may be fp8 already."""
        self.refuse_scales(output_scale, output_block_scale)
        if self.is_encoder:
            tokens = slice(attn_metadata.num_actual_tokens)
            new = (query[tokens], key[tokens], value[tokens], output[tokens])
            self.kernels.dense(*new, attn_metadata, self.options)
        else:
            self._paged(layer, query, kv_cache, attn_metadata, output, return_lse=False)
        return output

    def forward_with_lse(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` over the cache, which also gives the LSE: (num_tokens, num_heads) float32.

        Raises UsageError for encoders, and for ALiBi, whose LSE FA2 shifts row by row.
        """
        if self.is_encoder or self.alibi_slopes is not None:
            raise UsageError("FLASH_ATTN gives an LSE over a KV cache and without ALiBi only")
        lse = self._paged(layer, query, kv_cache, attn_metadata, output, return_lse=True)
        assert lse is not None
        return lse.transpose(0, 1)

    def _paged(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        return_lse: bool,
    ) -> torch.Tensor | None:
        num_tokens = metadata.num_actual_tokens
        if num_tokens != len(query):
            query, output = query[:num_tokens], output[:num_tokens]
        key_cache, value_cache = kv_cache.unbind(0)
        descales: Descales | None = None
        if self.is_quantized:
            if not is_fp8(query.dtype):
                query = quantize(query, torch.float8_e4m3fn, layer._q_scale_float)
            size = (len(metadata.seq_lens), self.num_kv_heads)
            scales: list[Any] = [layer._q_scale, layer._k_scale, layer._v_scale]
            descales = Descales(*(scale.expand(size) for scale in scales))
        return self.kernels.paged(
            query,
            key_cache,
            value_cache,
            output,
            metadata,
            self.options,
            descales,
            return_lse,
        )
