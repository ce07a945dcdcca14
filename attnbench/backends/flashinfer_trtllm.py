"""XQA and TRTLLM-GEN, planned: functions that read the engine's own tables."""

from __future__ import annotations

from typing import Any

import torch

from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.backends.flashinfer_calls import PlannedTrtllm, workspace
from attnbench.backends.flashinfer_library import FP8_QUERY_KERNELS, TRTLLM_GEN
from attnbench.backends.flashinfer_wrappers import Span
from attnbench.backends.metadata import CommonAttentionMetadata


class TrtllmPlanner:
    """XQA and TRTLLM-GEN: nothing is planned on the host."""

    def __init__(self, spec: KVCacheSpec, names: dict[str, Any], device: torch.device) -> None:
        self.spec = spec
        self.names = names
        self.device = device

    @property
    def workspace(self) -> torch.Tensor:
        """Their own: it holds semaphores that must be zero before a call, and are after it."""
        return workspace(self.device, "trtllm")

    def decode(
        self, kernels: str, common: CommonAttentionMetadata, span: Span, query_len: int
    ) -> PlannedTrtllm:
        """Requests of `query_len` new tokens each."""
        return self._planned(
            kernels,
            "trtllm_batch_decode_with_kv_cache",
            common,
            span,
            backend=kernels,
            max_seq_len=common.max_seq_len,
            q_len_per_req=query_len,
        )

    def prefill(self, common: CommonAttentionMetadata, span: Span) -> PlannedTrtllm:
        """Requests of any number of new tokens."""
        starts = common.query_start_loc[span.first : span.last + 1] - span.first_token
        page_size = self.spec.block_size
        # Pages, not tokens, as FlashInfer's own wrapper and vLLM pass them.
        counts = (common.seq_lens[span.first : span.last] + page_size - 1) // page_size
        page_starts = torch.zeros_like(starts)
        torch.cumsum(counts, 0, dtype=torch.int32, out=page_starts[1:])
        lengths = common.query_start_loc_cpu[span.first : span.last + 1].diff()
        return self._planned(
            TRTLLM_GEN,
            "trtllm_batch_context_with_kv_cache",
            common,
            span,
            max_q_len=int(lengths.max()),
            max_kv_len=common.max_seq_len,
            batch_size=span.last - span.first,
            cum_seq_lens_q=starts,
            cum_seq_lens_kv=page_starts,
        )

    def _planned(
        self,
        kernels: str,
        name: str,
        common: CommonAttentionMetadata,
        span: Span,
        **arguments: Any,
    ) -> PlannedTrtllm:
        shape = self.spec.shape
        is_quantized = is_fp8(torch_dtype(self.spec.kv_cache_dtype))
        return PlannedTrtllm(
            kernels,
            self.names[name],
            is_quantized and kernels in FP8_QUERY_KERNELS,
            shape.scale,
            {
                "workspace_buffer": self.workspace,
                "block_tables": common.block_table_tensor[span.first : span.last],
                "seq_lens": common.seq_lens[span.first : span.last],
                "window_left": shape.sliding_window - 1 if shape.sliding_window else -1,
                "kv_layout": self.spec.kv_cache_layout,
                **arguments,
            },
        )
