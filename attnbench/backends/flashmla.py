"""FLASHMLA: DeepSeek's dense latent decode on Hopper, by the real libraries.

What a call costs beside the kernel: the bf16 kernel makes its schedule in the first call after
`build`, as in vLLM, so that neither a later call nor `metadata_build` has it; an fp8 cache needs
fp8 queries, quantised in `forward_mqa` unless they come so (vLLM's layer does it before), and that
kernel, like all of UPSTREAM's, returns a new tensor, which is copied to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import FlashMLA
from attnbench.backends.dtypes import is_fp8
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import (
    DecodeBatch,
    LibraryMLABackend,
    LibraryMLABuilder,
    LibraryMLAImpl,
    LibraryMLAMetadata,
)
from attnbench.backends.mla_libraries import MLA_LIBRARIES, MLALibrary, load_functions
from attnbench.backends.paged_ops import quantize
from attnbench.workload.types import AttentionShape, AttentionType

NAME = "FLASHMLA"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashMLADecode:
    """Decodes of one length. `schedule` is the library's own; fp8: (tiles, splits), int32."""

    num_decodes: int
    query_len: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    schedule: Any


class FlashMLABackend(LibraryMLABackend, FlashMLA):
    """Variants: VLLM (the build in its wheel: bf16, fp16 and fp8 caches) and UPSTREAM (no fp8)."""

    install_hint: ClassVar[str] = MLA_LIBRARIES[NAME]["VLLM"].install

    @classmethod
    def get_impl_cls(cls) -> type[FlashMLAImpl]:
        """Raises BackendUnavailableError when no FlashMLA library is installed."""
        cls.require_library()
        return FlashMLAImpl

    @classmethod
    def get_builder_cls(cls) -> type[FlashMLAMetadataBuilder]:
        """Raises BackendUnavailableError when no FlashMLA library is installed."""
        cls.require_library()
        return FlashMLAMetadataBuilder

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        if not config.kv_cache_dtype.startswith("fp8"):
            return None
        if not lib.ops:
            return f"{lib.variant} reads no dense fp8 KV cache; FLASHMLA:VLLM does"
        if config.dtype is not torch.bfloat16:
            return "FlashMLA writes bf16 when the KV cache is fp8; use dtype=bf16"
        return None


class FlashMLAMetadataBuilder(LibraryMLABuilder[FlashMLADecode]):
    backend: ClassVar[str] = NAME
    #: vLLM 0.22.1's: short prefills are cheaper in the absorbed form (mla/flashmla.py:112).
    reorder_batch_threshold: int | None = 128

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.functions = load_functions(NAME, self.library)

    def build_decode(self, batch: DecodeBatch, fast_build: bool, for_graph: bool) -> FlashMLADecode:
        if self.is_quantized:
            rows = batch.query_len * self.spec.shape.num_heads
            schedule = self.functions["get_mla_decoding_metadata_dense_fp8"](
                batch.seq_lens, rows, 1
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
    """One call of the library. `do_kv_cache_update` must have run before either forward."""

    backend: ClassVar[str] = NAME
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
        self.functions = load_functions(NAME, self.library)
        self.writes_output = "out" in self.library.functions["flash_mla_with_kvcache"]

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
        if self.is_quantized and not is_fp8(q.dtype):
            q = quantize(q, torch.float8_e4m3fn, layer._q_scale_float)
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
