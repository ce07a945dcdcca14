"""TORCH_MLA's sparse path: each query attends to the latents its indexer chose, in torch.

Every request runs in the absorbed form, whatever its length: its queries have no keys in common
that would be worth expanding. A few tokens at a time, their latents are gathered from the cache
into (tokens, topk_tokens, width), and all heads of a token are the queries of one KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbench.backends.attend import attend
from attnbench.backends.ds_mla import ROW_BYTES, dequantize_rows
from attnbench.backends.dtypes import movable
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_ops import dequantize
from attnbench.backends.topk import topk_slots

#: Bytes of gathered latents, in fp32, that are worked on at a time.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTokens:
    """All tokens of a step: request_of_token (num_tokens,), block_table (num_reqs, n), and the
    indexer's positions (num_tokens, topk_tokens) int32."""

    request_of_token: torch.Tensor
    block_table: torch.Tensor
    topk_indices: torch.Tensor


def sparse_tokens(common: CommonAttentionMetadata, indices: torch.Tensor) -> SparseTokens:
    """What `attend_sparse` needs of a batch."""
    query_lens = common.query_start_loc_cpu.diff()
    return SparseTokens(
        request_of_token=torch.repeat_interleave(torch.arange(len(query_lens)), query_lens),
        block_table=common.block_table_tensor,
        topk_indices=indices,
    )


def attend_sparse(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    tokens: SparseTokens,
    output: torch.Tensor,
    scale: float,
    k_scale: float,
) -> torch.Tensor:
    """Write `output` (num_tokens, num_heads, kv_lora_rank); returns the LSE (num_tokens, num_heads)
    in float32. query: (num_tokens, num_heads, kv_lora_rank + rope)."""
    width, rank = query.shape[-1], output.shape[-1]
    slots = topk_slots(
        tokens.topk_indices, tokens.request_of_token, tokens.block_table, kv_cache.shape[1]
    )
    lse = torch.empty(query.shape[:2], dtype=torch.float32)
    step = max(1, _CHUNK_BYTES // (4 * width * slots.shape[1]))
    for first in range(0, len(query), step):
        part = slice(first, first + step)
        rows = movable(kv_cache).flatten(0, 1)[slots[part].clamp_min(0).long()]
        latents = read_latents(rows.view(kv_cache.dtype), query.dtype, k_scale)
        # Behind the last chosen one stands slot 0, of the null block: finite and of weight zero.
        hidden = (slots[part] < 0)[:, None, None, :]
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        wide, found = attend(query[part, None], latents[:, None], latents[:, None], scale, mask)
        output[part] = wide[:, 0, :, :rank].to(output.dtype)
        lse[part] = found[:, 0]
    return lse


def read_latents(stored: torch.Tensor, dtype: torch.dtype, k_scale: float) -> torch.Tensor:
    """Latents and rotary keys (..., kv_lora_rank + rope) of rows as a cache holds them."""
    if stored.dtype is torch.uint8 and stored.shape[-1] == ROW_BYTES:
        return dequantize_rows(stored, dtype)
    return dequantize(stored, dtype, k_scale)
