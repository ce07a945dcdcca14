"""Which cached tokens a sparse query attends to, and where they lie in the cache.

What DeepSeek-V3.2's indexer would choose is drawn here: positions within the request, -1 behind the
last where a query sees fewer than `topk_tokens`, (num_tokens, topk_tokens) int32: what vLLM's
indexer leaves in its `topk_indices_buffer`. A query never attends to a position behind its own.

- `random`: any it may see, without repetition, in no order;
- `prefix`: its first ones;
- `window`: its last ones, its own included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnbench.workload.types import Request

_DRAWN_AT_ONCE = 1 << 22


def draw_topk_indices(
    requests: Sequence[Request],
    topk_tokens: int,
    pattern: str,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Positions for all query tokens of `requests`, on the host; one generator per request.

    Args:
        pattern: `random`, `prefix` or `window`.
    """
    total = sum(r.query_len for r in requests)
    indices = torch.full((total, topk_tokens), -1, dtype=torch.int32)
    start = 0
    for request, generator in zip(requests, generators, strict=True):
        own = torch.arange(request.seq_len - request.query_len, request.seq_len)
        rows = indices[start : start + request.query_len]
        if pattern == "random":
            _draw(rows, own, generator)
        else:
            seen = torch.arange(topk_tokens) + torch.zeros_like(own)[:, None]
            if pattern == "window":
                seen += (own[:, None] - topk_tokens + 1).clamp_min(0)
            rows.copy_(seen.masked_fill(seen > own[:, None], -1))
        start += request.query_len
    return indices


def _draw(rows: torch.Tensor, own: torch.Tensor, generator: torch.Generator) -> None:
    """Fill `rows` (query_len, topk_tokens) with distinct positions up to `own` (query_len,)."""
    num_keys = int(own[-1]) + 1
    count = min(rows.shape[1], num_keys)
    step = max(1, _DRAWN_AT_ONCE // num_keys)
    for first in range(0, len(own), step):
        here = own[first : first + step, None]
        order = torch.rand((len(here), num_keys), generator=generator)
        order.masked_fill_(torch.arange(num_keys) > here, -1.0)
        drawn = order.topk(count, dim=1)
        rows[first : first + step, :count] = drawn.indices.masked_fill(drawn.values < 0, -1)


def selected_keys(indices: torch.Tensor, first_key: int, num_keys: int) -> torch.Tensor:
    """(..., num_keys) bool: which positions from `first_key` on are in `indices` (..., k)."""
    column = indices.long() - first_key
    column = torch.where((column >= 0) & (column < num_keys), column, num_keys)
    chosen = torch.zeros((*indices.shape[:-1], num_keys + 1), dtype=torch.bool).to(indices.device)
    return chosen.scatter_(-1, column, True)[..., :num_keys]


def topk_slots(
    indices: torch.Tensor,
    request_of_token: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Cache slots of `indices` (num_tokens, k), -1 where there is none; int32.

    Args:
        request_of_token: (num_tokens,), the row of each token in `block_table`.
        block_table: (num_reqs, max_num_blocks).
    """
    inside = indices.clamp_min(0).long()
    blocks = block_table[request_of_token.long()[:, None], inside // block_size]
    return torch.where(indices < 0, -1, blocks * block_size + inside % block_size).to(torch.int32)
