"""FLASHMLA: DeepSeek's dense latent decode on Hopper, by the real libraries.

What a call costs beside the kernel: the bf16 kernel makes its schedule in the first call after
`build`, as in vLLM, so that neither a later call nor `metadata_build` has it; an fp8 cache needs
fp8 queries, quantised in `forward_mqa` unless they come so (vLLM's layer does it before), and that
kernel, like all of UPSTREAM's, returns a new tensor, which is copied to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import FlashMLA
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import LibraryMLABackend, LibraryMLAImpl
from attnbench.backends.mla_builder import DecodeBatch, LibraryMLABuilder, LibraryMLAMetadata
from attnbench.backends.mla_libraries import MLALibrary

NAME = "FLASHMLA"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashMLADecode:
    """Decodes of one length. `schedule` is the library's own; fp8: (tiles, splits), int32."""

    num_decodes: int
    query_len: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    schedule: Any


class FlashMLAMetadataBuilder(LibraryMLABuilder[FlashMLADecode]):
    backend: ClassVar[str] = NAME
    #: vLLM 0.22.1's: short prefills are cheaper in the absorbed form (mla/flashmla.py:112).
    reorder_batch_threshold: int | None = 128

    def build_decode(self, batch: DecodeBatch, fast_build: bool, for_graph: bool) -> FlashMLADecode:
        if self.is_quantized:
            rows = batch.query_len * self.spec.shape.num_heads
            schedule = self.functions["get_mla_decoding_metadata_dense_fp8"](
                batch.seq_lens, rows, 1
            )
            if for_graph:
                tiles, splits = schedule
                schedule = (
                    self.graph_buffers.keep("tiles", tiles),
                    self.graph_buffers.keep("splits", splits),
                )
        else:
            schedule, _ = self.functions["get_mla_metadata"]()
        return FlashMLADecode(
            num_decodes=batch.num_decodes,
            query_len=batch.query_len,
            block_table=batch.block_table,
            seq_lens=batch.seq_lens,
            schedule=schedule,
        )


class FlashMLAImpl(LibraryMLAImpl[FlashMLADecode]):
    backend: ClassVar[str] = NAME
    supports_quant_query_input: ClassVar[bool] = True

    @property
    def writes_output(self) -> bool:
        """Whether the library's function takes the output."""
        return "out" in self.library.functions["flash_mla_with_kvcache"]

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[FlashMLADecode],
        output: torch.Tensor,
    ) -> torch.Tensor:
        decode = self.decode_of(attn_metadata)
        num_decodes, query_len = decode.num_decodes, decode.query_len
        if self.is_quantized:
            q = self.quantized_query(layer, q)
        query = q.view(num_decodes, query_len, self.num_heads, q.shape[-1])
        keys = kv_cache.unsqueeze(-2)  # one head
        if self.is_quantized:
            out, lse = self.functions["fwd_kvcache_mla_fp8"](
                query,
                keys,
                self.kv_lora_rank,
                decode.seq_lens,
                decode.block_table,
                self.scale,
                True,  # causal
                *decode.schedule,
                layer._q_scale.reshape(1),
                layer._k_scale.reshape(1),
            )
            output.copy_(out.view(output.shape))
        else:
            more = {}
            if self.writes_output:
                # The kernel counts all heads of all new tokens as rows of one head.
                rows = query_len * self.num_heads
                more["out"] = output.view(num_decodes, 1, rows, self.kv_lora_rank)
            out, lse = self.functions["flash_mla_with_kvcache"](
                q=query,
                k_cache=keys,
                block_table=decode.block_table,
                cache_seqlens=decode.seq_lens,
                head_dim_v=self.kv_lora_rank,
                tile_scheduler_metadata=decode.schedule,
                softmax_scale=self.scale,
                causal=True,
                **more,
            )
            if not self.writes_output:
                output.copy_(out.view(output.shape))
        # (num_decodes, num_heads, query_len) over memory in our order: a view.
        by_token: torch.Tensor = lse.transpose(1, 2)
        return by_token.reshape(-1, self.num_heads)


class FlashMLABackend(LibraryMLABackend, FlashMLA):
    """Variants: VLLM (the build in its wheel: bf16, fp16 and fp8 caches) and UPSTREAM (no fp8)."""

    impl_cls = FlashMLAImpl
    builder_cls = FlashMLAMetadataBuilder

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        if not config.kv_cache_dtype.startswith("fp8"):
            return None
        if not lib.ops:
            return f"{lib.variant} reads no dense fp8 KV cache; FLASHMLA:VLLM does"
        if config.dtype is not torch.bfloat16:
            return "FlashMLA writes bf16 when the KV cache is fp8; use dtype=bf16"
        return None
