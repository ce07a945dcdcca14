"""What every backend's metadata is built from (`vllm/v1/attention/backend.py`)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(slots=True, kw_only=True)
class CommonAttentionMetadata:
    """Facts about one batch that all layers and backends share.

    Lengths are in tokens; integer tensors are int32 except `slot_mapping` (int64).
    """

    query_start_loc: torch.Tensor
    """(num_reqs + 1,), start of each request's tokens in query; on the device."""
    query_start_loc_cpu: torch.Tensor
    """The same on the host."""
    seq_lens: torch.Tensor
    """(num_reqs,), computed tokens plus new ones of each request; on the device."""
    num_reqs: int
    num_actual_tokens: int
    """Query tokens in the batch, padding excluded."""
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    """(num_reqs, max_num_blocks), physical block of each logical block."""
    slot_mapping: torch.Tensor
    """(num_actual_tokens,), block * block_size + offset where each new token is written."""
    causal: bool = True
    seq_lens_cpu: torch.Tensor | None = None
    """`seq_lens` on the host; None where it would cost a synchronisation."""
    encoder_seq_lens: torch.Tensor | None = None
    """(num_reqs,), encoder tokens of each request (encoder-decoder attention)."""
    encoder_seq_lens_cpu: torch.Tensor | None = None
    logits_indices_padded: torch.Tensor | None = None
    num_logits_indices: int | None = None
    dcp_local_seq_lens: torch.Tensor | None = None
    """(num_reqs,), tokens held by this rank under decode context parallelism."""
    dcp_local_seq_lens_cpu: torch.Tensor | None = None
    topk_indices_buffer: torch.Tensor | None = None
    """(num_actual_tokens, topk_tokens) int32: positions within its request that each new token
    attends to, -1 behind the last; None: dense. (vLLM's impl holds its indexer's buffer.)"""
    positions: torch.Tensor | None = None
    """(num_actual_tokens,), position of each new token in its sequence."""
    is_prefilling: torch.Tensor | None = None
    """(num_reqs,) bool, tells a short extend from a decode."""
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    """(num_reqs,), on the host; exact unless drafts may still be rejected."""

    def compute_num_computed_tokens(self) -> torch.Tensor:
        """(num_reqs,), tokens already in the cache before this step."""
        query_lens = self.query_start_loc[1:] - self.query_start_loc[:-1]
        return self.seq_lens - query_lens

    def batch_size(self) -> int:
        return self.num_reqs

    def naive_query_lens(self) -> torch.Tensor:
        """(num_reqs,), new tokens of each request."""
        return self.query_start_loc[1:] - self.query_start_loc[:-1]

    def replace(self, **changes: Any) -> CommonAttentionMetadata:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def unpadded(self, num_actual_tokens: int, num_actual_reqs: int) -> CommonAttentionMetadata:
        """A view without the padding a CUDA graph adds: the first requests and tokens only."""
        per_request = {
            "seq_lens",
            "seq_lens_cpu",
            "block_table_tensor",
            "encoder_seq_lens",
            "encoder_seq_lens_cpu",
            "dcp_local_seq_lens",
            "dcp_local_seq_lens_cpu",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
        }
        changes: dict[str, Any] = {
            f.name: value[:num_actual_reqs]
            for f in fields(self)
            if f.name in per_request and (value := getattr(self, f.name)) is not None
        }
        return replace(
            self,
            query_start_loc=self.query_start_loc[: num_actual_reqs + 1],
            query_start_loc_cpu=self.query_start_loc_cpu[: num_actual_reqs + 1],
            slot_mapping=self.slot_mapping[:num_actual_tokens],
            positions=None if self.positions is None else self.positions[:num_actual_tokens],
            topk_indices_buffer=(
                None
                if self.topk_indices_buffer is None
                else self.topk_indices_buffer[:num_actual_tokens]
            ),
            num_reqs=num_actual_reqs,
            num_actual_tokens=num_actual_tokens,
            **changes,
        )
