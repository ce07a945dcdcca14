"""Attention of one tile on the CPU with its LSE, and how tiles merge.

A tile is some queries against some keys. Shared by CPU_ATTN and TORCH_MLA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

# Fused, float32 accumulation, returns the LSE. What `scaled_dot_product_attention` dispatches to on
# the CPU; called directly because the public function does not return the LSE.
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the keys of a tile.

    Args:
        query: (B, H, M, D); key: (B, H, S, D); value: (B, H, S, Dv). Strided is fine (a broadcast
            too), the last dimension must be contiguous.
        mask: float32, 0 or a bias or -inf; broadcastable to (B, H, M, S).
        is_causal: query i sees keys 0 to i (M == S); not together with `mask`.
        soft_cap: logits become `cap * tanh(logit / cap)`, before the mask.

    Returns: output (B, H, M, Dv), zeros where no key is visible; LSE (B, H, M) float32, there -inf.
    """
    if soft_cap:
        return _attend_eager(query, key, value, scale, mask, is_causal, soft_cap)
    width = value.shape[-1]
    if width != key.shape[-1]:
        # The fused kernel wants one width.
        wide = max(width, key.shape[-1])
        query, key, value = (pad(x, (0, wide - x.shape[-1])) for x in (query, key, value))
    output, lse = _fused(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)
    if mask is not None:
        # It reports 0 for rows without a visible key.
        lse = lse.masked_fill((mask == -torch.inf).all(dim=-1), -torch.inf)
    return output[..., :width], lse


def _attend_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    is_causal: bool,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (query.float() * (scale / soft_cap)) @ key.float().transpose(-1, -2)
    logits.tanh_().mul_(soft_cap)
    if is_causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu_(1)
        logits.masked_fill_(hidden, -torch.inf)
    if mask is not None:
        logits += mask
    top = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(finite(top)).exp_()
    denominator = weights.sum(dim=-1, keepdim=True)
    output = (weights @ value.float()).div_(denominator.clamp_min(torch.finfo(torch.float32).tiny))
    return output, (top + denominator.log()).squeeze(-1)


def causal_rows(
    query_len: int, first_query: int, first_key: int, num_keys: int
) -> Iterator[tuple[slice, bool]]:
    """Which queries see a chunk of keys without a mask: (rows, whether they are its diagonal).

    Queries are at positions `first_query` and on, keys at `first_key` and on; a chunk that begins
    before the first query must end there too.
    """
    row = max(0, first_key - first_query)
    if first_key >= first_query:
        yield slice(row, row + num_keys), True
        row += num_keys
    if row < query_len:
        yield slice(row, query_len), False


def finite(x: torch.Tensor) -> torch.Tensor:
    """`x` with -inf replaced by 0: `exp(-inf - 0)` is 0 where `exp(-inf - -inf)` is NaN."""
    return x.masked_fill(x == -torch.inf, 0.0)


def merge_into(
    output: torch.Tensor, lse: torch.Tensor, part_output: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Add a tile to running float32 `output` (..., Dv) and `lse` (...,), in place."""
    total = torch.logaddexp(lse, part_lse)
    shift = finite(total)
    output.mul_((lse - shift).exp_().unsqueeze(-1))
    output.addcmul_(part_output.float(), (part_lse - shift).exp_().unsqueeze(-1))
    lse.copy_(total)


def merge_splits(
    outputs: torch.Tensor,
    lses: torch.Tensor,
    owner: torch.Tensor,
    rank: torch.Tensor,
    num_owners: int,
    num_ranks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge all splits of the keys of each owner at once.

    Args:
        outputs: (num_splits, ..., Dv) float32; lses: (num_splits, ...) float32.
        owner: (num_splits,), whose part it is; rank: (num_splits,), which of its parts.

    Returns: output (num_owners, ..., Dv) and LSE (num_owners, ...), float32.
    """
    table = lses.new_full((num_owners, num_ranks, *lses.shape[1:]), -torch.inf)
    table[owner, rank] = lses
    total = table.logsumexp(dim=1)
    weights = (lses - finite(total)[owner]).exp_()
    output = outputs.new_zeros((num_owners, *outputs.shape[1:]))
    output.index_add_(0, owner, outputs * weights.unsqueeze(-1))
    return output, total


def add_sink(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """`output` (..., Dv) with `exp(sink)` added to each row's denominator."""
    return output * torch.sigmoid(lse - sinks).unsqueeze(-1)
