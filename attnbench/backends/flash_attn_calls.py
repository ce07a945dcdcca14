"""What a call of FlashAttention needs: a step's metadata, a layer's options, and who calls it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnbench.backends.abstract import is_quantized_kv_cache
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.flash_attn_library import Library
from attnbench.backends.metadata import CommonAttentionMetadata

NO_WINDOW = (-1, -1)


@dataclass(slots=True, kw_only=True)
class FlashAttentionMetadata:
    """One step's metadata; lengths in tokens, integer tensors int32 but `slot_mapping` (int64)."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    max_seq_len: int
    seq_lens: torch.Tensor
    """(num_reqs,) keys of each request: of the encoder in encoder-decoder attention."""
    key_start_loc: torch.Tensor | None
    """(num_reqs + 1,) running sum of `seq_lens`, for a library that wants it in its place."""
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    scheduler_metadata: torch.Tensor | None = None
    """FA3's schedule, made ahead of time; None: the kernel makes it."""
    max_num_splits: int = 0
    """Parts a context is split into at most; 0: FA3 and FA4 choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What is the same in every call of a layer. `window` counts keys to the left and right."""

    scale: float
    window: tuple[int, int]
    soft_cap: float
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Descales:
    """(num_reqs, num_kv_heads) float32 scales of fp8 queries, keys and values."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class FlashAttentionKernels(ABC):
    """The kernels of one variant."""

    def __init__(self, lib: Library, functions: dict[str, Callable[..., Any]]) -> None:
        self.library = lib
        self.get_scheduler_metadata = functions.get("get_scheduler_metadata")

    #: The paged kernel takes running sums of key lengths, not the lengths.
    needs_key_start_loc = False

    def schedule(
        self, spec: KVCacheSpec, common: CommonAttentionMetadata, num_splits: int
    ) -> torch.Tensor | None:
        """FA3's schedule of a batch over the paged cache (int32); None: this version has none.

        Every argument must be what the kernel is called with later: it trusts the schedule.
        (vLLM 0.22.1 leaves `has_softcap` out, which tells the scheduler of other tiles.)
        """
        if self.get_scheduler_metadata is None:
            return None
        shape = spec.shape
        is_fp8 = is_quantized_kv_cache(spec.kv_cache_dtype)
        window = (shape.sliding_window - 1, 0) if shape.sliding_window else NO_WINDOW
        schedule: torch.Tensor = self.get_scheduler_metadata(
            batch_size=common.num_reqs,
            max_seqlen_q=common.max_query_len,
            max_seqlen_k=self.max_seqlen_k(spec, common),
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_size,
            cache_seqlens=common.seq_lens,
            qkv_dtype=torch.float8_e4m3fn if is_fp8 else spec.dtype,
            cu_seqlens_q=common.query_start_loc,
            page_size=spec.block_size,
            causal=common.causal,
            window_size=window,
            has_softcap=shape.logits_soft_cap > 0,
            num_splits=num_splits,
        )
        return schedule

    def max_seqlen_k(self, spec: KVCacheSpec, common: CommonAttentionMetadata) -> int:
        """The longest context, as the paged kernel will see it."""
        return common.max_seq_len

    @abstractmethod
    def paged(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
        descales: Descales | None,
        return_lse: bool = False,
    ) -> torch.Tensor | None:
        """Attention over the paged cache into `output`.

        Returns: LSE (num_heads, num_tokens) float32 if asked for.
        """

    @abstractmethod
    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
    ) -> None:
        """Attention of all new tokens of a request over each other (encoders) into `output`."""
