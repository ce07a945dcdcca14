"""Which keys a query sees, as a boolean mask: what the torch backends share."""

from __future__ import annotations

import torch


def visible(
    query_positions: torch.Tensor, key_positions: torch.Tensor, causal: bool, window: int
) -> torch.Tensor:
    """True where a query sees a key.

    Args:
        query_positions: (..., M), positions in the sequence.
        key_positions: (..., S).
        causal: no key after the query.
        window: keys less than this many positions away, the query's own included; 0: all.

    Returns: (..., M, S) bool.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen &= distance.abs() < window
    return seen


def additive(seen: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """0 where seen, -inf elsewhere."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)


def alibi_bias(
    slopes: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """(num_heads, M, S) float32: `-slope * |distance|` (Press et al., ICLR 2022, figure 3)."""
    distance = (query_positions[:, None] - key_positions[None, :]).abs()
    return -slopes.float()[:, None, None] * distance
