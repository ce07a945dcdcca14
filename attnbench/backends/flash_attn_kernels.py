"""One way to call each FlashAttention library: `FlashAttentionKernels` and its three kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from attnbench.backends.abstract import is_quantized_kv_cache
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.flash_attn_library import Library, library, load_functions
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
    """Parts a context is split into at most; 0: FA3 chooses."""


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


class VllmKernels(FlashAttentionKernels):
    """vLLM's builds: one function for both versions, paged and dense; it writes `out` itself."""

    def __init__(self, lib: Library, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(lib, functions)
        self.varlen = functions["flash_attn_varlen_func"]

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
        more: dict[str, Any]
        if self.library.version == 3:
            more = {
                "s_aux": layer.sinks,
                "scheduler_metadata": metadata.scheduler_metadata,
                "num_splits": metadata.max_num_splits,
            }
            if descales is not None:
                more |= {
                    "q_descale": descales.query,
                    "k_descale": descales.key,
                    "v_descale": descales.value,
                }
        else:
            more = {"alibi_slopes": layer.alibi_slopes}
        result = self.varlen(
            q=query,
            k=key_cache,
            v=value_cache,
            out=output,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            block_table=metadata.block_table,
            softmax_scale=layer.scale,
            causal=metadata.causal,
            window_size=layer.window,
            softcap=layer.soft_cap,
            return_softmax_lse=return_lse,
            fa_version=self.library.version,
            **more,
        )
        return result[1] if return_lse else None

    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
    ) -> None:
        if self.library.version == 3:
            more = {"s_aux": layer.sinks}
        else:
            more = {"alibi_slopes": layer.alibi_slopes}
        self.varlen(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=metadata.query_start_loc,
            cu_seqlens_k=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_query_len,
            softmax_scale=layer.scale,
            causal=False,
            window_size=layer.window,
            softcap=layer.soft_cap,
            fa_version=self.library.version,
            **more,
        )


class UpstreamKernels3(FlashAttentionKernels):
    """FA3 of its own repository. Its functions return a new tensor: the copy is in the time."""

    def __init__(self, lib: Library, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(lib, functions)
        self.with_kvcache = functions["flash_attn_with_kvcache"]
        self.varlen = functions["flash_attn_varlen_func"]

    def max_seqlen_k(self, spec: KVCacheSpec, common: CommonAttentionMetadata) -> int:
        # `flash_attn_with_kvcache` takes no maximum: the kernel derives it from the page table.
        return common.block_table_tensor.shape[1] * spec.block_size

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
        result = self.with_kvcache(
            q=query,
            k_cache=key_cache,
            v_cache=value_cache,
            cache_seqlens=metadata.seq_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            q_descale=None if descales is None else descales.query,
            k_descale=None if descales is None else descales.key,
            v_descale=None if descales is None else descales.value,
            softmax_scale=layer.scale,
            causal=metadata.causal,
            window_size=layer.window,
            softcap=layer.soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            num_splits=metadata.max_num_splits,
            return_softmax_lse=return_lse,
        )
        output.copy_(result[0] if return_lse else result)
        return result[1] if return_lse else None

    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
    ) -> None:
        result = self.varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=metadata.query_start_loc,
            cu_seqlens_k=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_query_len,
            softmax_scale=layer.scale,
            causal=False,
            window_size=layer.window,
            softcap=layer.soft_cap,
        )
        # Early releases return the LSE too, asked or not.
        output.copy_(result[0] if isinstance(result, tuple) else result)


class UpstreamKernels2(FlashAttentionKernels):
    """`flash_attn` 2.x. Its functions return a new tensor: the copy is in the time."""

    needs_key_start_loc = True

    def __init__(self, lib: Library, functions: dict[str, Callable[..., Any]]) -> None:
        super().__init__(lib, functions)
        self.varlen = functions["flash_attn_varlen_func"]

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
        result = self.varlen(
            q=query,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=metadata.query_start_loc,
            cu_seqlens_k=metadata.key_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=layer.scale,
            causal=metadata.causal,
            window_size=layer.window,
            softcap=layer.soft_cap,
            alibi_slopes=layer.alibi_slopes,
            block_table=metadata.block_table,
            return_attn_probs=return_lse,
        )
        output.copy_(result[0] if return_lse else result)
        return result[1] if return_lse else None

    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
    ) -> None:
        result = self.varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=metadata.query_start_loc,
            cu_seqlens_k=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_query_len,
            softmax_scale=layer.scale,
            causal=False,
            window_size=layer.window,
            softcap=layer.soft_cap,
            alibi_slopes=layer.alibi_slopes,
        )
        output.copy_(result)


_KINDS: dict[str, type[FlashAttentionKernels]] = {
    "FA3": VllmKernels,
    "FA2": VllmKernels,
    "FA3_UPSTREAM": UpstreamKernels3,
    "FA2_UPSTREAM": UpstreamKernels2,
}


@cache
def load_kernels(variant: str) -> FlashAttentionKernels:
    """The kernels of `variant`, their library imported.

    Raises: UsageError for a name that is none, BackendUnavailableError with the reason and the
        install command when the library is not here.
    """
    lib = library(variant)
    return _KINDS[variant](lib, load_functions(lib))
