"""Writing to and reading from a paged KV cache with plain torch operations.

A *plane* is what holds the keys (or the values, or MLA's latents) of a cache:
`(num_blocks, block_size, *features)`, a view that may be strided (HND layout).
"""

from __future__ import annotations

import torch

from attnbench.backends.dtypes import is_fp8, movable


def quantize(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """`x / scale` in `dtype`; fp8 saturates at its largest value, as GPU conversions do."""
    if not is_fp8(dtype):
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def dequantize(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """`x * scale` in `dtype`; the scale applies to fp8 only."""
    return x.to(dtype).mul_(scale) if is_fp8(x.dtype) else x.to(dtype)


def write_slots(
    plane: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, scale: float = 1.0
) -> None:
    """Write `rows` (num_tokens, *features) to their slots; negative slots are skipped.

    `features` may be narrower in the last dimension than the plane's: the rest is left alone.
    """
    target = movable(plane[..., : rows.shape[-1]])
    values = movable(quantize(rows, plane.dtype, scale))
    slots, values = (_skipped if slot_mapping.device.type == "cpu" else _written_back)(
        target, slot_mapping, values
    )
    block_size = plane.shape[1]
    target[slots // block_size, slots % block_size] = values


def _skipped(
    target: torch.Tensor, slots: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if bool((slots < 0).any()):
        keep = slots >= 0
        return slots[keep], values[keep]
    return slots, values


def _written_back(
    target: torch.Tensor, slots: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a look at the slots would wait for the device: what is skipped writes to the first
    slot of the null block, which nobody else writes to, the value that it holds."""
    keep = (slots >= 0).view(-1, *[1] * (values.dim() - 1))
    return slots.clamp_min(0), torch.where(keep, values, target[0, 0])


def gather_tokens(plane: torch.Tensor, block_table: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` of each request's blocks: (num_reqs, num_tokens, *features).

    `plane` must be contiguous; `block_table` is (num_reqs, num_blocks of each request).
    """
    rows = movable(plane).index_select(0, block_table.reshape(-1)).view(plane.dtype)
    return rows.view(block_table.shape[0], -1, *plane.shape[2:])[:, :num_tokens]


def gather_heads(
    plane: torch.Tensor, block_table: torch.Tensor, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Whole blocks of a plane, heads first, in one copy whatever the layout.

    Args:
        plane: (num_blocks, block_size, num_kv_heads, head_size), NHD or HND in memory.
        block_table: (num_reqs, blocks of each request).
        scratch: memory to reuse, at least as many elements as the result, of the plane's dtype.

    Returns: (num_reqs, num_kv_heads, blocks * block_size, head_size), a view for NHD.
    """
    num_blocks, block_size, num_kv_heads, head_size = plane.shape
    num_reqs, blocks = block_table.shape
    source = movable(plane)
    out = None
    if scratch is not None:
        out = movable(scratch)[: block_table.numel() * block_size * num_kv_heads * head_size]
    if plane.is_contiguous():
        rows = source.view(num_blocks, -1)
        index = block_table.reshape(-1)
        shape = (num_reqs, blocks * block_size, num_kv_heads, head_size)
    else:
        # A row is one head's part of a block.
        rows = source.transpose(1, 2).reshape(num_blocks * num_kv_heads, -1)
        heads = torch.arange(num_kv_heads, device=plane.device, dtype=block_table.dtype)
        index = (block_table[:, None, :] * num_kv_heads + heads[:, None]).reshape(-1)
        shape = (num_reqs, num_kv_heads, blocks * block_size, head_size)
    if out is None:
        taken = rows.index_select(0, index)
    else:
        taken = out.view(index.shape[0], rows.shape[1])
        torch.index_select(rows, 0, index, out=taken)
    result = taken.view(plane.dtype).view(shape)
    return result.transpose(1, 2) if plane.is_contiguous() else result
