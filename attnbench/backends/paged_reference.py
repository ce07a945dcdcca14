"""Online-softmax attention over a paged cache, in float64: the second, independent way.

It goes through the block table one block at a time and merges partial states, as kernels do; it is
slow, and is there to prove the dense reference and the caches against each other.
"""

from __future__ import annotations

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.batch import AttentionBatch
from attnbench.backends.kv_cache import read_tokens, request_slots, stored_planes
from attnbench.backends.merge import PartialState, merge_all
from attnbench.backends.reference import ReferenceResult, masked_logits, query_positions
from attnbench.backends.topk import selected_keys
from attnbench.workload.types import AttentionType


def paged_attention(
    batch: AttentionBatch, kv_cache: torch.Tensor, backend: type[AttentionBackend]
) -> ReferenceResult:
    """Attention of `batch` from what `kv_cache` holds; new tokens must already be written.

    MLA runs in the absorbed form. Encoder and encoder-only attention read no cache and are refused
    by a ValueError.
    """
    if batch.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        raise ValueError(f"{batch.attn_type} attention has no cache; use reference_attention")
    shape, layer = batch.shape, batch.layer
    planes = stored_planes(backend, batch.spec, kv_cache)
    outputs, lses = [], []
    for request, (start, end) in enumerate(map(batch.query_range, range(len(batch.requests)))):
        query = batch.query[start:end].double()
        if shape.is_mla:
            query = absorb_query(batch, query)
        seq_len = batch.requests[request].seq_len
        blocks = []
        for first in range(0, seq_len, batch.spec.block_size):
            last = min(first + batch.spec.block_size, seq_len)
            slots = request_slots(batch, request, torch.arange(first, last, device=batch.device))
            key, value = read_tokens(batch, planes, slots)
            if shape.is_mla:
                key, value = torch.cat([key, value[:, 0]], dim=-1)[:, None], key[:, None]
            blocks.append(block_state(batch, request, query, key, value, first))
        state = merge_all(blocks)
        if batch.sinks is not None:
            state = state.merge(PartialState.from_sink(batch.sinks, state))
        output, lse = state.finish()
        if shape.is_mla:
            output = torch.einsum("thl,hlv->thv", output, layer.W_UV.double())
        outputs.append(output)
        lses.append(lse)
    return ReferenceResult(
        output=torch.cat(outputs),
        lse=torch.cat(lses),
        query_start_loc=batch.metadata.query_start_loc_cpu,
    )


def absorb_query(batch: AttentionBatch, query: torch.Tensor) -> torch.Tensor:
    """MLA queries (tokens, heads, nope + rope) as (tokens, heads, kv_lora_rank + rope), float64."""
    shape = batch.shape
    nope, rope = query[..., : shape.qk_nope_head_dim], query[..., shape.qk_nope_head_dim :]
    return torch.cat([torch.einsum("thn,hnl->thl", nope, batch.layer.W_UK.double()), rope], dim=-1)


def block_state(
    batch: AttentionBatch,
    request: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first_key: int,
) -> PartialState:
    """Partial state of all queries of a request over the keys of positions `first_key` onwards.

    query (query_len, num_heads, size), key (keys, num_kv_heads, size), value likewise; float64.
    """
    positions = query_positions(batch, request)
    selected = None
    if batch.topk_indices is not None:
        rows = slice(*batch.query_range(request))
        selected = selected_keys(batch.topk_indices[rows], first_key, len(key))
    group = query.shape[1] // key.shape[1]
    parts = []
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        logits = masked_logits(
            batch, query[:, heads], key[:, kv_head], positions, first_key, heads, selected
        )
        parts.append(PartialState.from_logits(logits, value[:, kv_head]))
    return PartialState(
        *(
            torch.cat([getattr(p, name) for p in parts], dim=1)
            for name in ("max", "denominator", "accumulator")
        )
    )
