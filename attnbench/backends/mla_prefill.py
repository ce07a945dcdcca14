"""The expanded form of latent attention through a FlashAttention library: MLA's prefill axis.

The latents of a prefill request are projected up to keys and values of every head, and one varlen
call of FlashAttention does the rest. Requests are taken together up to `CHUNK_TOKENS` keys, the
size of vLLM 0.22.1's workspace (64 Ki tokens), so that the expanded keys of a batch never exist as
a whole; a longer request is not cut, where vLLM cuts it and merges by LSE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from attnbench.backends.dtypes import movable
from attnbench.backends.flash_attn_library import library, load_functions
from attnbench.backends.impl import MLALayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_ops import dequantize
from attnbench.workload.types import AttentionShape

#: Keys expanded together.
CHUNK_TOKENS = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Some prefill requests, attended to in one call; integer tensors int32 but `key_*` (int64).

    tokens: their rows among the prefill tokens.
    query_start_loc, key_start_loc: (num_reqs + 1,) running sums of new tokens, of all tokens.
    key_block, key_slot: (num_keys,) where each key's latent is in the cache; None: the new tokens
        are all there is, and their latents come with the call.
    """

    tokens: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    max_query_len: int
    max_seq_len: int
    key_block: torch.Tensor | None
    key_slot: torch.Tensor | None


def host_seq_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """`seq_lens` on the host; waits for the device where they are only there."""
    return common.seq_lens.cpu() if common.seq_lens_cpu is None else common.seq_lens_cpu


def plan_chunks(
    common: CommonAttentionMetadata, num_decodes: int, block_size: int
) -> tuple[PrefillChunk, ...]:
    """Chunks of the requests from `num_decodes` on."""
    starts = common.query_start_loc_cpu.tolist()
    seq_lens: list[int] = host_seq_lens(common).tolist()
    chunks, first = [], num_decodes
    while first < common.num_reqs:
        last, total = first + 1, seq_lens[first]
        while last < common.num_reqs and total + seq_lens[last] <= CHUNK_TOKENS:
            total += seq_lens[last]
            last += 1
        chunks.append(_chunk(common, num_decodes, first, last, starts, seq_lens, block_size))
        first = last
    return tuple(chunks)


def _chunk(
    common: CommonAttentionMetadata,
    num_decodes: int,
    first: int,
    last: int,
    starts: list[int],
    seq_lens: list[int],
    block_size: int,
) -> PrefillChunk:
    device = common.query_start_loc.device
    lens = torch.tensor(seq_lens[first:last])
    key_starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    key_starts[1:] = lens.cumsum(0)
    query_starts = torch.tensor(starts[first : last + 1], dtype=torch.int32)
    query_starts = query_starts - query_starts[0]
    block = slot = None
    if not torch.equal(query_starts, key_starts):
        # The gather's indices depend on lengths only: made on the host, looked up on the device.
        request = torch.repeat_interleave(torch.arange(first, last), lens)
        position = torch.arange(int(key_starts[-1])) - key_starts[:-1].repeat_interleave(lens)
        request, position = request.to(device), position.to(device)
        block = common.block_table_tensor[request, position // block_size].long()
        slot = position % block_size
    return PrefillChunk(
        tokens=slice(starts[first] - starts[num_decodes], starts[last] - starts[num_decodes]),
        query_start_loc=query_starts.to(device),
        key_start_loc=key_starts.to(device),
        max_query_len=int(query_starts.diff().max()),
        max_seq_len=int(lens.max()),
        key_block=block,
        key_slot=slot,
    )


class PrefillKernels:
    """`flash_attn_varlen_func` of one FLASH_ATTN variant, over keys of their own length."""

    def __init__(self, variant: str) -> None:
        """Raises BackendUnavailableError when the library is not here."""
        self.library = library(variant)
        self.varlen: Callable[..., Any] = load_functions(self.library)["flash_attn_varlen_func"]

    def takes_widths(self, qk_head_dim: int, v_head_dim: int) -> bool:
        """Whether values may have this width; else they are padded to the keys'.

        FA3's own rule (hopper/flash_api.cpp); FA2 has one width for all.
        """
        if qk_head_dim == v_head_dim:
            return True
        if self.library.version == 2:
            return False
        large = 128 < qk_head_dim <= 192 and 96 < v_head_dim <= 128
        return large or (qk_head_dim <= 64 and v_head_dim <= 512)

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        chunk: PrefillChunk,
        scale: float,
    ) -> None:
        """Causal attention of the chunk's queries, its last tokens, into `output`."""
        width = value.shape[-1]
        fits = self.takes_widths(query.shape[-1], width)
        if not fits:
            value = F.pad(value, (0, query.shape[-1] - width))
        more: dict[str, Any] = {}
        if self.library.is_vllm:
            more["fa_version"] = self.library.version
            if fits:
                more["out"] = output
        result = self.varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=chunk.query_start_loc,
            cu_seqlens_k=chunk.key_start_loc,
            max_seqlen_q=chunk.max_query_len,
            max_seqlen_k=chunk.max_seq_len,
            softmax_scale=scale,
            causal=True,
            **more,
        )
        if "out" not in more:
            output.copy_(result[..., :width])


@cache
def load_prefill(variant: str) -> PrefillKernels:
    """The prefill library of FLASH_ATTN's `variant`. Raises BackendUnavailableError."""
    return PrefillKernels(variant)


def expand(
    layer: MLALayer,
    chunk: PrefillChunk,
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    shape: AttentionShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (num_keys, num_heads, qk_head_dim) and values (num_keys, num_heads, v_head_dim).

    Args:
        kv_c_normed, k_pe: the latents of the prefill tokens, read where the chunk has no context.
        kv_cache: (num_blocks, block_size, width), read where it has one.
    """
    if chunk.key_block is None or chunk.key_slot is None:
        kv_c, rope = kv_c_normed[chunk.tokens], k_pe[chunk.tokens]
    else:
        stored = movable(kv_cache)[chunk.key_block, chunk.key_slot].view(kv_cache.dtype)
        latent = dequantize(stored, kv_c_normed.dtype, layer._k_scale_float)
        kv_c, rope = latent[:, : shape.kv_lora_rank], latent[:, None, shape.kv_lora_rank :]
    nope = torch.einsum("sl,hnl->shn", kv_c, layer.W_UK)
    key = torch.cat([nope, rope.expand(-1, shape.num_heads, -1)], dim=-1)
    return key, torch.einsum("sl,hlv->shv", kv_c, layer.W_UV).contiguous()
