"""The expanded form of latent attention through a FlashAttention library: MLA's prefill axis.

The latents of a prefill request are projected up to keys and values of every head, and one varlen
call of FlashAttention does the rest. Requests are taken together up to `CHUNK_TOKENS` keys, the
size of vLLM 0.22.1's workspace (64 Ki tokens), so that the expanded keys of a batch never exist as
a whole. A longer request runs alone, its context cut into parts of that many keys: the new tokens
attend to each other in one call, to each part of the context in another, and the results merge by
LSE, as in vLLM, whose new tokens are not cut either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from attnbench.backends.dtypes import movable
from attnbench.backends.flash_attn_library import library, load_functions
from attnbench.backends.impl import MLALayer
from attnbench.backends.merge import PartialState
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.mla_prefill_library import takes_widths
from attnbench.backends.paged_ops import dequantize
from attnbench.workload.types import AttentionShape

#: Keys expanded together (mla_attention.py: determine_chunked_prefill_workspace_size; what it takes
#: of an engine's longest model and batch is more than this for every context that is cut here).
CHUNK_TOKENS = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Some prefill requests, attended to in one call; integer tensors int32 but `key_*` (int64).

    tokens: their rows among the prefill tokens.
    query_start_loc, key_start_loc: (num_reqs + 1,) running sums of new tokens, of all tokens.
    key_block, key_slot: (num_keys,) where each key's latent is in the cache; None: the new tokens
        are all there is, and their latents come with the call.
    causal: False for a part of a context, all of which comes before the queries.
    context: parts of the context, where it is attended to apart; the keys above are then the new
        tokens.
    """

    tokens: slice
    query_start_loc: torch.Tensor
    key_start_loc: torch.Tensor
    max_query_len: int
    max_seq_len: int
    key_block: torch.Tensor | None
    key_slot: torch.Tensor | None
    causal: bool = True
    context: tuple[PrefillChunk, ...] = ()


def host_seq_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """`seq_lens` on the host; waits for the device where they are only there."""
    return common.seq_lens.cpu() if common.seq_lens_cpu is None else common.seq_lens_cpu


def plan_chunks(
    common: CommonAttentionMetadata, num_decodes: int, block_size: int
) -> tuple[PrefillChunk, ...]:
    """Chunks of the requests from `num_decodes` on."""
    plan = _Plan(common, num_decodes, block_size)
    chunks, first = [], num_decodes
    while first < common.num_reqs:
        last, total = first + 1, plan.seq_lens[first]
        while last < common.num_reqs and total + plan.seq_lens[last] <= CHUNK_TOKENS:
            total += plan.seq_lens[last]
            last += 1
        has_context = total > plan.query_len(first)
        if total > CHUNK_TOKENS and has_context:
            chunks.append(plan.cut(first))
        else:
            chunks.append(plan.whole(first, last))
        first = last
    return tuple(chunks)


class _Plan:
    """A batch's lengths on the host, and the chunks made of them."""

    def __init__(self, common: CommonAttentionMetadata, num_decodes: int, block_size: int) -> None:
        self.common = common
        self.block_size = block_size
        self.starts: list[int] = common.query_start_loc_cpu.tolist()
        self.seq_lens: list[int] = host_seq_lens(common).tolist()
        self.first_token = self.starts[num_decodes]

    def query_len(self, request: int) -> int:
        return self.starts[request + 1] - self.starts[request]

    def whole(self, first: int, last: int) -> PrefillChunk:
        """Requests `first` to `last` over everything they see."""
        lens = self.seq_lens[first:last]
        is_new = lens == [self.query_len(request) for request in range(first, last)]
        return self._chunk(first, lens, None if is_new else [0] * len(lens))

    def cut(self, request: int) -> PrefillChunk:
        """One request: its new tokens, and beside them its context in parts of whole blocks."""
        query_len = self.query_len(request)
        context_len = self.seq_lens[request] - query_len
        size = max(CHUNK_TOKENS // self.block_size, 1) * self.block_size
        parts = tuple(
            self._chunk(request, [min(size, context_len - start)], [start], causal=False)
            for start in range(0, context_len, size)
        )
        return replace(self._chunk(request, [query_len], None), context=parts)

    def _chunk(
        self, first: int, num_keys: list[int], key_starts: list[int] | None, causal: bool = True
    ) -> PrefillChunk:
        """Requests from `first` on over `num_keys` keys each, from `key_starts` on in the cache;
        None: over their new tokens."""
        last = first + len(num_keys)
        device = self.common.query_start_loc.device
        lens = torch.tensor(num_keys)
        ends = torch.zeros(len(lens) + 1, dtype=torch.int32)
        ends[1:] = lens.cumsum(0)
        query_starts = torch.tensor(self.starts[first : last + 1], dtype=torch.int32)
        block = slot = None
        if key_starts is not None:
            # The gather's indices depend on lengths only: made on the host, looked up on the
            # device.
            request = torch.repeat_interleave(torch.arange(first, last), lens)
            offset = torch.tensor(key_starts) - ends[:-1]
            position = torch.arange(int(ends[-1])) + offset.repeat_interleave(lens)
            request, position = request.to(device), position.to(device)
            block = self.common.block_table_tensor[request, position // self.block_size].long()
            slot = position % self.block_size
        return PrefillChunk(
            tokens=slice(
                self.starts[first] - self.first_token, self.starts[last] - self.first_token
            ),
            query_start_loc=(query_starts - query_starts[0]).to(device),
            key_start_loc=ends.to(device),
            max_query_len=int(query_starts.diff().max()),
            max_seq_len=max(num_keys),
            key_block=block,
            key_slot=slot,
            causal=causal,
        )


@dataclass(frozen=True, slots=True)
class Latents:
    """What the keys and values of a layer are made of.

    kv_c_normed (num_tokens, kv_lora_rank), k_pe (num_tokens, 1, qk_rope_head_dim): of the prefill
        tokens, read where a chunk has new tokens only.
    kv_cache: (num_blocks, block_size, width), read where it has others.
    """

    layer: MLALayer
    shape: AttentionShape
    kv_c_normed: torch.Tensor
    k_pe: torch.Tensor
    kv_cache: torch.Tensor

    def expand(self, chunk: PrefillChunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (num_keys, num_heads, qk_head_dim), values (num_keys, num_heads, v_head_dim)."""
        layer, shape = self.layer, self.shape
        if chunk.key_block is None or chunk.key_slot is None:
            kv_c, rope = self.kv_c_normed[chunk.tokens], self.k_pe[chunk.tokens]
        else:
            stored = movable(self.kv_cache)[chunk.key_block, chunk.key_slot]
            latent = dequantize(
                stored.view(self.kv_cache.dtype), self.kv_c_normed.dtype, layer._k_scale_float
            )
            kv_c, rope = latent[:, : shape.kv_lora_rank], latent[:, None, shape.kv_lora_rank :]
        return project(layer, kv_c, rope)


def project(
    layer: MLALayer, kv_c: torch.Tensor, rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, kv_lora_rank) and rotary keys (n, 1, rope) up to the keys (n, num_heads,
    qk_head_dim) and values (n, num_heads, v_head_dim) of all heads."""
    nope = torch.einsum("sl,hnl->shn", kv_c, layer.W_UK)
    key = torch.cat([nope, rope.expand(-1, nope.shape[1], -1)], dim=-1)
    return key, torch.einsum("sl,hlv->shv", kv_c, layer.W_UV).contiguous()


class PrefillKernels:
    """`flash_attn_varlen_func` of one FLASH_ATTN variant, over keys of their own length."""

    def __init__(self, variant: str) -> None:
        """Raises BackendUnavailableError when the library is not here."""
        self.library = library(variant)
        self.varlen: Callable[..., Any] = load_functions(self.library)["flash_attn_varlen_func"]

    def run_chunk(
        self,
        query: torch.Tensor,
        latents: Latents,
        output: torch.Tensor,
        chunk: PrefillChunk,
        scale: float,
    ) -> None:
        """Attention of one chunk; query and output (num_tokens, num_heads, size) of the batch."""
        query, output = query[chunk.tokens], output[chunk.tokens]
        if chunk.context:
            state = self._part(query, *latents.expand(chunk), chunk, scale)
            for part in chunk.context:
                state = state.merge(self._part(query, *latents.expand(part), part, scale))
            output.copy_(state.finish()[0])
            return
        key, value = latents.expand(chunk)
        width = value.shape[-1]
        more: dict[str, Any] = {}
        if self.library.is_vllm and takes_widths(self.library, query.shape[-1], width):
            more["out"] = output
        result = self._call(query, key, value, chunk, scale, **more)
        if not more:
            output.copy_(result[..., :width])

    def _part(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        scale: float,
    ) -> PartialState:
        result, lse = self._call(query, key, value, chunk, scale, return_softmax_lse=True)
        # The LSE is (num_heads, num_tokens), of natural logarithm.
        return PartialState.from_output(result[..., : value.shape[-1]].float(), lse.transpose(0, 1))

    def _call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        scale: float,
        **more: Any,
    ) -> Any:
        if not takes_widths(self.library, query.shape[-1], value.shape[-1]):
            value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
        if self.library.is_vllm:
            more["fa_version"] = self.library.version
        return self.varlen(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=chunk.query_start_loc,
            cu_seqlens_k=chunk.key_start_loc,
            max_seqlen_q=chunk.max_query_len,
            max_seqlen_k=chunk.max_seq_len,
            softmax_scale=scale,
            causal=chunk.causal,
            **more,
        )


@cache
def load_prefill(variant: str) -> PrefillKernels:
    """The prefill library of FLASH_ATTN's `variant`. Raises BackendUnavailableError."""
    return PrefillKernels(variant)
