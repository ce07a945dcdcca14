"""One way to call each FlashAttention library: the kinds of `FlashAttentionKernels`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.flash_attn_calls import (
    Descales,
    FlashAttentionKernels,
    FlashAttentionMetadata,
    LayerOptions,
)
from attnbench.backends.flash_attn_library import Library, library, load_functions
from attnbench.backends.metadata import CommonAttentionMetadata


class VllmKernels(FlashAttentionKernels):
    """vLLM's builds: one function for all versions, paged and dense; it writes `out` itself."""

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
        elif self.library.version == 4:
            more = {"s_aux": layer.sinks, "num_splits": metadata.max_num_splits}
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
        if self.library.version >= 3:
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


class UpstreamKernels4(FlashAttentionKernels):
    """`flash_attn.cute`. Its function returns a new tensor: the copy is in the time."""

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
        out, lse = self.varlen(
            q=query,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_seq_len,
            seqused_k=metadata.seq_lens,
            page_table=metadata.block_table,
            softmax_scale=layer.scale,
            causal=metadata.causal,
            window_size=_open_ended(layer.window),
            learnable_sink=layer.sinks,
            softcap=layer.soft_cap,
            num_splits=_num_splits(query.device),
            return_lse=return_lse,
        )
        output.copy_(out)
        return lse if return_lse else None

    def dense(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        metadata: FlashAttentionMetadata,
        layer: LayerOptions,
    ) -> None:
        out, _ = self.varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=metadata.query_start_loc,
            cu_seqlens_k=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_query_len,
            softmax_scale=layer.scale,
            causal=False,
            window_size=_open_ended(layer.window),
            learnable_sink=layer.sinks,
            softcap=layer.soft_cap,
            num_splits=_num_splits(query.device),
        )
        output.copy_(out)


def _open_ended(window: tuple[int, int]) -> tuple[int | None, int | None]:
    """`window` with None for a side without an end."""
    left, right = window
    return left if left >= 0 else None, right if right >= 0 else None


@cache
def _num_splits(device: torch.device) -> int:
    """0, with which FA4 chooses how to split a context; 1 on Hopper, where it does not split."""
    major, _ = torch.cuda.get_device_capability(device)
    return 1 if major == 9 else 0


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
    "FA4": VllmKernels,
    "FA2": VllmKernels,
    "FA3_UPSTREAM": UpstreamKernels3,
    "FA4_UPSTREAM": UpstreamKernels4,
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
