"""ROCM_AITER_MLA and ROCM_AITER_TRITON_MLA: latent attention by AITER's kernels.

Both decode by `mla_decode_fwd`'s assembly kernels; the expanded form is AITER's FlashAttention, the
second's its Triton one. The decode is the split-KV form, which plans its own splits in the call.
vLLM passes it a plan made ahead (`get_mla_metadata_v1`), whose signature changes between releases:
what that gains is to be seen with `VLLM:ROCM_AITER_MLA`.

Neither has been run on hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.aiter_library import (
    FMHA_PATTERN,
    INSTALL,
    MLA_PATTERN,
    TRITON_FMHA_PATTERN,
    device_refusal,
    load_functions,
    missing_reason,
    promised_by_phase,
    require_aiter,
)
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.cache_shapes import LatentCacheBackend
from attnbench.backends.declared.base import DeclaredBackend
from attnbench.backends.declared.vllm_0_22_1 import RocmAiterMLA, RocmAiterTritonMLA
from attnbench.backends.device import Device
from attnbench.backends.graph_buffers import GraphBuffers
from attnbench.backends.impl import MLAAttentionImpl, MLALayer
from attnbench.backends.merge import PartialState, merge_all
from attnbench.backends.mla_backend import LibraryMLAImpl
from attnbench.backends.mla_builder import (
    DecodeBatch,
    LibraryMLABuilder,
    LibraryMLAMetadata,
    QueryLenSupport,
)
from attnbench.backends.mla_prefill import Latents, PrefillChunk
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

#: Query heads its kernels exist for; fewer are repeated up to the first, as vLLM does.
KERNEL_HEADS = (16, 128)
LATENT_WIDTHS = (512, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterMLADecode:
    """Decodes of one new token. The kernel's page is one token: `kv_indices` are slots.

    qo_indptr, kv_indptr: (num_decodes + 1,); kv_indices: (all keys,); all int32.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_lens: torch.Tensor


class AiterMLABackend(LatentCacheBackend, DeclaredBackend):
    """vLLM's predicates and, beyond them, what AITER refuses."""

    install_hint: ClassVar[str] = INSTALL
    prefill_pattern: ClassVar[str] = FMHA_PATTERN

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return (MLA_PATTERN, cls.prefill_pattern)

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        return promised_by_phase(workload, MLA_PATTERN, cls.prefill_pattern)

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        return missing_reason(cls.name)

    @classmethod
    def supports_kv_cache_layout(cls, kv_cache_layout: str | None) -> bool:
        """Any: a latent has one head."""
        return kv_cache_layout is None or kv_cache_layout in cls.supported_layouts

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """vLLM's reason, else the library's."""
        return (
            super().supports_combination(config, device)
            or device_refusal(config, device)
            or cls._library_refusal(config)
        )

    @classmethod
    def _library_refusal(cls, config: AttentionConfig) -> str | None:
        heads = config.num_heads
        if not config.use_mla:
            return None
        if config.dtype is not torch.bfloat16:
            return "AITER's latent decode is bf16 or fp8; use dtype=bf16"
        if heads not in KERNEL_HEADS and KERNEL_HEADS[0] % heads:
            return (
                f"AITER's latent decode has kernels for 16 and 128 query heads (a divisor of 16 is "
                f"padded), not {heads}; use another tp="
            )
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        if config.kv_lora_rank and widths != LATENT_WIDTHS:
            return f"AITER takes latents of 512+64 numbers, not {widths[0]}+{widths[1]}"
        features = {
            "sliding window": config.has_sliding_window,
            "logits soft cap": config.has_logits_soft_cap,
            "ALiBi": config.use_alibi,
        }
        if refused := [name for name, is_set in features.items() if is_set]:
            return f"{cls.name} has no {' and no '.join(refused)}; leave it out"
        return None


class RocmAiterMLABackend(AiterMLABackend, RocmAiterMLA):
    """Expanded form: `aiter.flash_attn_varlen_func`."""

    @classmethod
    def get_impl_cls(cls) -> type[RocmAiterMLAImpl]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return RocmAiterMLAImpl

    @classmethod
    def get_builder_cls(cls) -> type[AiterMLAMetadataBuilder]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return AiterMLAMetadataBuilder


class RocmAiterTritonMLABackend(AiterMLABackend, RocmAiterTritonMLA):
    """Expanded form: `aiter.ops.triton`'s `flash_attn_varlen_func`."""

    prefill_pattern: ClassVar[str] = TRITON_FMHA_PATTERN

    @classmethod
    def get_impl_cls(cls) -> type[RocmAiterTritonMLAImpl]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return RocmAiterTritonMLAImpl

    @classmethod
    def get_builder_cls(cls) -> type[AiterMLAMetadataBuilder]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return AiterMLAMetadataBuilder


class AiterMLAMetadataBuilder(LibraryMLABuilder[AiterMLADecode]):
    """The split of the other libraries; the block table turned into slots."""

    backend: ClassVar[str] = RocmAiterMLA.name
    query_len_support: QueryLenSupport = QueryLenSupport.SINGLE_ONLY
    reorder_batch_threshold: int | None = 1
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        # Not the parent's, which looks for CUDA libraries by the variant's name.
        AttentionMetadataBuilder.__init__(self, spec, layer_names, device, variant)
        self.is_quantized = is_quantized_kv_cache(spec.kv_cache_dtype)
        self.graph_buffers = GraphBuffers()

    def _require_prefill(self, num_prefills: int) -> None:
        """AITER brings both forms."""

    def build_decode(self, batch: DecodeBatch, fast_build: bool, for_graph: bool) -> AiterMLADecode:
        size, device = self.spec.block_size, self.device
        lens = batch.seq_lens_cpu.long()
        starts = torch.zeros(len(lens) + 1, dtype=torch.int64)
        torch.cumsum(lens, 0, out=starts[1:])
        # Depends on lengths only: made on the host, looked up on the device.
        request = torch.repeat_interleave(torch.arange(len(lens)), lens)
        position = torch.arange(int(starts[-1])) - starts[:-1][request]
        request, position = request.to(device), position.to(device)
        slots = batch.block_table[request, position // size] * size + position % size
        indptr, indices = starts.to(device, torch.int32), slots.to(torch.int32)
        if for_graph:
            # As long as a context may grow, so that a later step fits the same memory.
            longest = indices.new_zeros(batch.block_table.numel() * size)
            longest[: len(indices)] = indices
            indptr = self.graph_buffers.keep("indptr", indptr)
            indices = self.graph_buffers.keep("indices", longest)
        return AiterMLADecode(
            qo_indptr=batch.query_start_loc,
            kv_indptr=indptr,
            kv_indices=indices,
            last_page_lens=torch.ones_like(batch.seq_lens),
        )


class RocmAiterMLAImpl(LibraryMLAImpl[AiterMLADecode]):
    """`do_kv_cache_update` must have run before either forward."""

    backend: ClassVar[str] = RocmAiterMLA.name
    supports_quant_query_input: ClassVar[bool] = True
    can_return_lse_for_decode: ClassVar[bool] = False
    #: The LSE of `flash_attn_varlen_func` is (num_heads, num_tokens), else (num_tokens, num_heads).
    lse_is_by_head: ClassVar[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises BackendUnavailableError when AITER cannot be called."""
        # Not the parent's, which looks for CUDA libraries by the variant's name.
        MLAAttentionImpl.__init__(
            self, shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant
        )
        self.is_quantized = is_quantized_kv_cache(kv_cache_dtype)
        self.functions = dict(load_functions(self.backend))
        self.repeats = max(1, KERNEL_HEADS[0] // self.num_heads)

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[AiterMLADecode],
        output: torch.Tensor,
    ) -> None:
        decode = self.decode_of(attn_metadata)
        if self.is_quantized:
            q = self.quantized_query(layer, q)
        result = output
        if self.repeats > 1:
            q = q.repeat_interleave(self.repeats, dim=1)
            result = output.new_empty((len(q), KERNEL_HEADS[0], self.kv_lora_rank))
        self.functions["mla"](
            q=q,
            kv_buffer=kv_cache.view(-1, 1, 1, kv_cache.shape[-1]),
            o=result,
            qo_indptr=decode.qo_indptr,
            kv_indptr=decode.kv_indptr,
            kv_indices=decode.kv_indices,
            kv_last_page_lens=decode.last_page_lens,
            max_seqlen_q=1,
            sm_scale=self.scale,
            q_scale=layer._q_scale if self.is_quantized else None,
            kv_scale=layer._k_scale if self.is_quantized else None,
        )
        if self.repeats > 1:
            output.copy_(result[:, :: self.repeats])

    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[AiterMLADecode],
        output: torch.Tensor,
    ) -> None:
        latents = Latents(layer, self.shape, kv_c_normed, k_pe, kv_cache)
        for chunk in attn_metadata.prefill:
            query, out = q[chunk.tokens], output[chunk.tokens]
            if not chunk.context:
                self._varlen(query, latents, chunk, out=out)
                continue
            states = [self._part(query, latents, part) for part in (chunk, *chunk.context)]
            out.copy_(merge_all(states).finish()[0])

    def _part(self, query: torch.Tensor, latents: Latents, chunk: PrefillChunk) -> PartialState:
        """The query's attention to the keys of one chunk alone."""
        result, lse = self._varlen(query, latents, chunk, return_lse=True)
        by_token = lse.transpose(0, 1) if self.lse_is_by_head else lse
        return PartialState.from_output(result.float(), by_token)

    def _varlen(
        self, query: torch.Tensor, latents: Latents, chunk: PrefillChunk, **more: Any
    ) -> Any:
        key, value = latents.expand(chunk)
        return self.functions["varlen"](
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=chunk.query_start_loc,
            cu_seqlens_k=chunk.key_start_loc,
            max_seqlen_q=chunk.max_query_len,
            max_seqlen_k=chunk.max_seq_len,
            softmax_scale=self.scale,
            causal=chunk.causal,
            **more,
        )


class RocmAiterTritonMLAImpl(RocmAiterMLAImpl):
    backend: ClassVar[str] = RocmAiterTritonMLA.name
    lse_is_by_head: ClassVar[bool] = False
