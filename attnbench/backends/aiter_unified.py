"""ROCM_AITER_UNIFIED_ATTN: AITER's one Triton kernel for whole batches. Not run on hardware yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.aiter_backend import AiterBackend, AiterImpl
from attnbench.backends.aiter_library import UNIFIED_PATTERN, require_aiter
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder
from attnbench.backends.declared.vllm_0_22_1 import RocmAiterUnifiedAttention
from attnbench.backends.device import Device
from attnbench.backends.impl import AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.errors import UsageError
from attnbench.workload.types import AttentionType

#: Query heads of one KV head that fit a tile of `unified_attention` (128 rows for long queries).
MAX_GROUP = 128


class RocmAiterUnifiedAttentionBackend(AiterBackend, RocmAiterUnifiedAttention):
    """`aiter.ops.triton`'s `unified_attention`."""

    @classmethod
    def get_impl_cls(cls) -> type[RocmAiterUnifiedAttentionImpl]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return RocmAiterUnifiedAttentionImpl

    @classmethod
    def get_builder_cls(cls) -> type[AiterUnifiedMetadataBuilder]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return AiterUnifiedMetadataBuilder

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return (UNIFIED_PATTERN,)

    @classmethod
    def library_refusal(cls, config: AttentionConfig) -> str | None:
        if config.attn_type is not AttentionType.DECODER or config.use_non_causal:
            # vLLM's class takes encoders too, by a kernel of vLLM.
            return (
                "AITER's unified_attention is causal only; VLLM:ROCM_AITER_UNIFIED_ATTN runs "
                "encoders by a kernel of vLLM"
            )
        size = config.block_size
        if size is not None and size & (size - 1):
            return (
                f"AITER's decode tile is one block: block_size must be a power of two, not {size}"
            )
        if config.num_heads // config.num_kv_heads > MAX_GROUP:
            return f"AITER takes at most {MAX_GROUP} query heads a KV head"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterUnifiedMetadata:
    """One step; integer tensors int32 but `slot_mapping` (int64)."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class AiterUnifiedMetadataBuilder(AttentionMetadataBuilder[AiterUnifiedMetadata]):
    """Passes the batch on."""

    #: vLLM's builder of it is ROCM_ATTN's (rocm_attn.py), which says this.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table: ClassVar[bool] = True

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AiterUnifiedMetadata:
        """`common_prefix_len` changes nothing. Raises UsageError for a batch that is not causal."""
        common = common_attn_metadata
        if not common.causal:
            raise UsageError("ROCM_AITER_UNIFIED_ATTN is causal only; use TRITON_ATTN")
        return AiterUnifiedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    def update_block_table(
        self,
        metadata: AiterUnifiedMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> AiterUnifiedMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class RocmAiterUnifiedAttentionImpl(AiterImpl[AiterUnifiedMetadata]):
    """One call. `do_kv_cache_update` must have run before `forward`."""

    name: ClassVar[str] = RocmAiterUnifiedAttention.name

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AiterUnifiedMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.refuse_scales(output_scale, output_block_scale)
        meta = attn_metadata
        key_cache, value_cache = kv_cache.unbind(0)
        self.functions["unified"](
            q=query[: meta.num_actual_tokens],
            k=key_cache,
            v=value_cache,
            out=output[: meta.num_actual_tokens],
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            seqused_k=meta.seq_lens,
            max_seqlen_k=meta.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=self.window,
            block_table=meta.block_table,
            softcap=self.logits_soft_cap,
            q_descale=None,
            k_descale=layer._k_scale,
            v_descale=layer._v_scale,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
        )
        return output
