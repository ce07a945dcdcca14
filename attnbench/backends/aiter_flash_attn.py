"""ROCM_AITER_FA: AITER's paged decode and its FlashAttention. Not run on hardware yet.

Single-token decodes run through `paged_attention_v1`, everything else through
`flash_attn_varlen_func` over dense keys. Where a request has a context, its pages are gathered for
that (`page_gather`): all keys any query sees, up to the new ones, and one call over them, where
vLLM gathers 32 Ki tokens of context at a time and merges by LSE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.aiter_backend import AiterBackend, AiterImpl
from attnbench.backends.aiter_library import (
    FMHA_PATTERN,
    PAGED_PATTERN,
    promised_by_phase,
    require_aiter,
)
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import RocmAiterFlashAttention
from attnbench.backends.device import Device
from attnbench.backends.dtypes import movable
from attnbench.backends.graph_buffers import GraphBuffers
from attnbench.backends.impl import AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.mla_prefill import host_seq_lens
from attnbench.backends.paged_ops import dequantize
from attnbench.workload.types import WorkloadFields

#: Keys one thread block of `paged_attention_v1` takes: its own default, and what vLLM passes.
PARTITION_SIZE = 256
#: Keys of one call over dense keys, unless a single request has more.
CHUNK_TOKENS = 64 * 1024


class RocmAiterFlashAttentionBackend(AiterBackend, RocmAiterFlashAttention):
    """`aiter.paged_attention_v1` and `aiter.flash_attn_varlen_func`."""

    @classmethod
    def get_impl_cls(cls) -> type[RocmAiterFlashAttentionImpl]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return RocmAiterFlashAttentionImpl

    @classmethod
    def get_builder_cls(cls) -> type[AiterFlashMetadataBuilder]:
        """Raises BackendUnavailableError when AITER is not installed."""
        require_aiter(cls.name)
        return AiterFlashMetadataBuilder

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return (PAGED_PATTERN, FMHA_PATTERN)

    @classmethod
    def promised_kernels(
        cls, workload: WorkloadFields, variant: str, device: Device
    ) -> tuple[tuple[str, ...], ...]:
        return promised_by_phase(workload, PAGED_PATTERN, FMHA_PATTERN)

    @classmethod
    def library_refusal(cls, config: AttentionConfig) -> str | None:
        if config.block_size is not None and config.block_size not in cls.block_sizes:
            return "AITER's paged_attention_v1 is compiled for blocks of 16 or 32; use block=16"
        if config.has_logits_soft_cap:
            # 0.1.7's choice of the assembly kernel does not look at it (`can_impl_fmha_v3_fwd`).
            return (
                "AITER's assembly prefill is taken whether or not there is a soft cap, and has "
                "none; ROCM_AITER_UNIFIED_ATTN has"
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseChunk:
    """Some requests of several new tokens; integer tensors int32 but `key_*` (int64).

    tokens: their rows in the batch.
    query_start_loc, key_start_loc: (num_reqs + 1,) running sums of new tokens, of their keys.
    key_block, key_slot: (num_keys,) where each key is in the cache; None: the new tokens are all.
    """

    tokens: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    max_query_len: int
    max_seq_len: int
    key_block: torch.Tensor | None
    key_slot: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterFlashMetadata:
    """The first `num_decodes` requests have one new token each; the others are in `chunks`.

    workspace: bytes for the partial results of the decodes.
    """

    num_decodes: int
    seq_lens: torch.Tensor
    max_seq_len: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    workspace: torch.Tensor
    chunks: tuple[DenseChunk, ...]
    causal: bool


class AiterFlashMetadataBuilder(AttentionMetadataBuilder[AiterFlashMetadata]):
    """Splits the batch: vLLM's threshold is 1 unless it speculates."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.graph_buffers = GraphBuffers()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AiterFlashMetadata:
        """`common_prefix_len` changes nothing."""
        return self._build(common_attn_metadata, common_attn_metadata.max_seq_len)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> AiterFlashMetadata:
        """For contexts as long as the block table allows: the kernel's grid counts partitions."""
        common = common_attn_metadata
        longest = common.block_table_tensor.shape[1] * self.spec.block_size
        metadata = self._build(common, longest)
        workspace = self.graph_buffers.keep("workspace", metadata.workspace)
        return replace(metadata, workspace=workspace)

    def _build(self, common: CommonAttentionMetadata, max_seq_len: int) -> AiterFlashMetadata:
        query_lens: list[int] = common.query_start_loc_cpu.diff().tolist()
        is_longer = (i for i, length in enumerate(query_lens) if length != 1)
        num_decodes = next(is_longer, common.num_reqs)
        return AiterFlashMetadata(
            num_decodes=num_decodes,
            seq_lens=common.seq_lens[:num_decodes],
            max_seq_len=max_seq_len,
            block_table=common.block_table_tensor[:num_decodes],
            query_start_loc=common.query_start_loc[: num_decodes + 1],
            workspace=self._workspace(num_decodes, max_seq_len),
            chunks=self._chunks(common, num_decodes),
            causal=common.causal,
        )

    def _chunks(self, common: CommonAttentionMetadata, first: int) -> tuple[DenseChunk, ...]:
        """The requests from `first` on, as many together as `CHUNK_TOKENS` keys allow."""
        starts: list[int] = common.query_start_loc_cpu.tolist()
        window = self.spec.shape.sliding_window if common.causal else 0
        seen = []  # keys of each request, from the first that any of its queries sees
        for request, seq_len in enumerate(host_seq_lens(common).tolist()):
            query_len = starts[request + 1] - starts[request]
            seen.append(min(seq_len, query_len + window - 1) if window else seq_len)
        chunks = []
        while first < common.num_reqs:
            last, total = first + 1, seen[first]
            while last < common.num_reqs and total + seen[last] <= CHUNK_TOKENS:
                total += seen[last]
                last += 1
            chunks.append(self._chunk(common, first, last, torch.tensor(seen[first:last])))
            first = last
        return tuple(chunks)

    def _chunk(
        self, common: CommonAttentionMetadata, first: int, last: int, seen: torch.Tensor
    ) -> DenseChunk:
        device = self.device
        queries = common.query_start_loc_cpu[first : last + 1]
        ends = torch.zeros(len(seen) + 1, dtype=torch.int32)
        ends[1:] = seen.cumsum(0)
        block = slot = None
        if not torch.equal(queries.diff(), ends.diff()):
            # Depends on lengths only: made on the host, looked up on the device.
            request = torch.repeat_interleave(torch.arange(first, last), seen)
            skipped = host_seq_lens(common)[first:last] - ends[1:]
            position = torch.arange(int(ends[-1])) + skipped.repeat_interleave(seen)
            request, position = request.to(device), position.to(device)
            size = self.spec.block_size
            block = common.block_table_tensor[request, position // size].long()
            slot = position % size
        return DenseChunk(
            tokens=slice(int(queries[0]), int(queries[-1])),
            query_start_loc=(queries - queries[0]).to(device, torch.int32),
            key_start_loc=ends.to(device),
            max_query_len=int(queries.diff().max()),
            max_seq_len=int(seen.max()),
            key_block=block,
            key_slot=slot,
        )

    def _workspace(self, num_decodes: int, max_seq_len: int) -> torch.Tensor:
        """Of each partition a partial output in the query's dtype and two float32 numbers."""
        shape = self.spec.shape
        parts = num_decodes * shape.num_heads * -(-max_seq_len // PARTITION_SIZE)
        size = parts * (shape.head_size * self.spec.dtype.itemsize + 2 * 4)
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class RocmAiterFlashAttentionImpl(AiterImpl[AiterFlashMetadata]):
    """`do_kv_cache_update` must have run before `forward`."""

    name: ClassVar[str] = RocmAiterFlashAttention.name

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AiterFlashMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.refuse_scales(output_scale, output_block_scale)
        left, right = self.window
        window = (left, right if attn_metadata.causal else left)
        for chunk in attn_metadata.chunks:
            tokens = chunk.tokens
            dense = (key[tokens], value[tokens])
            if chunk.key_block is not None:
                dense = self._gather(layer, kv_cache, chunk, query.dtype)
            self.functions["varlen"](
                q=query[tokens],
                k=dense[0],
                v=dense[1],
                cu_seqlens_q=chunk.query_start_loc,
                cu_seqlens_k=chunk.key_start_loc,
                max_seqlen_q=chunk.max_query_len,
                max_seqlen_k=chunk.max_seq_len,
                softmax_scale=self.scale,
                causal=attn_metadata.causal,
                window_size=window,
                alibi_slopes=self.alibi_slopes,
                out=output[tokens],
            )
        if first := attn_metadata.num_decodes:  # one token each
            self._decode(layer, query[:first], kv_cache, attn_metadata, output[:first])
        return output

    def _decode(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AiterFlashMetadata,
        output: torch.Tensor,
    ) -> None:
        key_cache, value_cache = kv_cache.unbind(0)
        self.functions["paged"](
            out=output,
            workspace_buffer=metadata.workspace,
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            scale=self.scale,
            block_tables=metadata.block_table,
            cu_query_lens=metadata.query_start_loc,
            context_lens=metadata.seq_lens,
            max_context_len=metadata.max_seq_len,
            alibi_slopes=self.alibi_slopes,
            kv_cache_dtype="fp8" if self.is_quantized else "auto",
            # The logical order; an HND cache is the same view with other strides, which it reads.
            kv_cache_layout="NHD",
            logits_soft_cap=self.logits_soft_cap,
            k_scale=layer._k_scale,
            v_scale=layer._v_scale,
            partition_size=PARTITION_SIZE,
            sliding_window=self.sliding_window,
        )

    def parts(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AiterFlashMetadata,
    ) -> Mapping[str, Callable[[], Any]]:
        """`page_gather`, where a request of several new tokens has a context."""
        gathered = [chunk for chunk in attn_metadata.chunks if chunk.key_block is not None]
        if not gathered:
            return {}
        gather = partial(self._gather, layer, kv_cache, dtype=query.dtype)
        return {"page_gather": lambda: [gather(chunk) for chunk in gathered]}

    def _gather(
        self,
        layer: AttentionLayer,
        kv_cache: torch.Tensor,
        chunk: DenseChunk,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (num_keys, num_kv_heads, head_size) of a chunk, in `dtype`."""
        assert chunk.key_block is not None
        stored = (movable(plane)[chunk.key_block, chunk.key_slot] for plane in kv_cache.unbind(0))
        keys, values = (x.view(kv_cache.dtype) for x in stored)
        return (
            dequantize(keys, dtype, layer._k_scale_float),
            dequantize(values, dtype, layer._v_scale_float),
        )
