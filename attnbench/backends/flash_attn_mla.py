"""FLASH_ATTN_MLA: latent decode by FlashAttention 3's absorbed form, by the real libraries.

FA3 takes the rotary parts of the query and the keys as `q` and `k`, and the absorbed part as a
second query (`q_v`) that meets the values: the latents themselves. Any query lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import FlashAttentionMLA
from attnbench.backends.flash_attn import GRAPH_MAX_NUM_SPLITS, GRAPH_MAX_TOKENS
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import LibraryMLABackend, LibraryMLAImpl
from attnbench.backends.mla_builder import (
    DecodeBatch,
    LibraryMLABuilder,
    LibraryMLAMetadata,
    QueryLenSupport,
)
from attnbench.backends.mla_libraries import MLALibrary

NAME = "FLASH_ATTN_MLA"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashAttentionMLADecode:
    """Decodes of any lengths, and FA3's schedule of them (None: the kernel makes it)."""

    query_start_loc: torch.Tensor
    max_query_len: int
    seq_lens: torch.Tensor
    max_seq_len: int
    block_table: torch.Tensor
    schedule: torch.Tensor | None
    max_num_splits: int
    """Parts a context is split into at most; 0: FA3 chooses."""


class FlashAttentionMLAMetadataBuilder(LibraryMLABuilder[FlashAttentionMLADecode]):
    backend: ClassVar[str] = NAME
    query_len_support: QueryLenSupport = QueryLenSupport.VARLEN
    #: vLLM 0.22.1's: short prefills are cheaper in the absorbed form (mla/flashattn_mla.py:109).
    reorder_batch_threshold: int | None = 512

    def build_decode(
        self, batch: DecodeBatch, fast_build: bool, for_graph: bool
    ) -> FlashAttentionMLADecode:
        """As vLLM captures: a fixed bound on the splits, the schedule in memory that stays."""
        small = for_graph and batch.num_tokens <= GRAPH_MAX_TOKENS
        num_splits = GRAPH_MAX_NUM_SPLITS if small else 0
        schedule = None if fast_build else self._schedule(batch, num_splits)
        if for_graph and schedule is not None:
            schedule = self.graph_buffers.keep("schedule", schedule)
        return FlashAttentionMLADecode(
            query_start_loc=batch.query_start_loc,
            max_query_len=batch.max_query_len,
            seq_lens=batch.seq_lens,
            max_seq_len=batch.max_seq_len,
            block_table=batch.block_table,
            schedule=schedule,
            max_num_splits=num_splits,
        )

    def _schedule(self, batch: DecodeBatch, num_splits: int) -> torch.Tensor:
        """Every number must be what the kernel is called with later: it trusts the schedule."""
        shape, longest = self.spec.shape, batch.max_seq_len
        if "flash_attn_with_kvcache" in self.functions:
            # It takes no maximum: the kernel derives it from the page table.
            longest = batch.block_table.shape[1] * self.spec.block_size
        schedule: torch.Tensor = self.functions["get_scheduler_metadata"](
            batch_size=batch.num_decodes,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=longest,
            num_heads_q=shape.num_heads,
            num_heads_kv=1,
            headdim=shape.qk_rope_head_dim,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=self.spec.dtype,
            headdim_v=shape.kv_lora_rank,
            cu_seqlens_q=batch.query_start_loc,
            page_size=self.spec.block_size,
            causal=True,
            num_splits=num_splits,
        )
        return schedule


class FlashAttentionMLAImpl(LibraryMLAImpl[FlashAttentionMLADecode]):
    backend: ClassVar[str] = NAME

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[FlashAttentionMLADecode],
        output: torch.Tensor,
    ) -> torch.Tensor:
        decode = self.decode_of(attn_metadata)
        absorbed, rope = q[..., : self.kv_lora_rank], q[..., self.kv_lora_rank :]
        pages = kv_cache.unsqueeze(-2)  # one head
        latents, keys = pages[..., : self.kv_lora_rank], pages[..., self.kv_lora_rank :]
        common: dict[str, Any] = {
            "q": rope,
            "max_seqlen_q": decode.max_query_len,
            "cu_seqlens_q": decode.query_start_loc,
            "softmax_scale": self.scale,
            "causal": True,
            "scheduler_metadata": decode.schedule,
            "num_splits": decode.max_num_splits,
            "return_softmax_lse": True,
        }
        if "flash_attn_varlen_func" in self.functions:
            _, lse = self.functions["flash_attn_varlen_func"](
                k=keys,
                v=latents,
                q_v=absorbed,
                out=output,
                max_seqlen_k=decode.max_seq_len,
                seqused_k=decode.seq_lens,
                block_table=decode.block_table,
                fa_version=3,
                **common,
            )
        else:
            out, lse, *_ = self.functions["flash_attn_with_kvcache"](
                k_cache=keys,
                v_cache=latents,
                qv=absorbed,
                cache_seqlens=decode.seq_lens,
                page_table=decode.block_table,
                **common,
            )
            output.copy_(out)
        by_token: torch.Tensor = lse.transpose(0, 1)
        return by_token


class FlashAttentionMLABackend(LibraryMLABackend, FlashAttentionMLA):
    """Variants: FA3 of vLLM's wheel, FA3_UPSTREAM of FlashAttention's own repository."""

    impl_cls = FlashAttentionMLAImpl
    builder_cls = FlashAttentionMLAMetadataBuilder
    #: `q_v` needs a rotary part of up to 64 numbers and values of 256 or more (flash_api.cpp).
    latent_widths: ClassVar[tuple[tuple[int, int], ...]] = ((512, 64), (256, 64))

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        if config.kv_cache_dtype.startswith("fp8"):
            return "FA3's absorbed form reads no fp8 KV cache; ask for FLASHMLA"
        return None
