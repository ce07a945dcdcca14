"""Launches of the kernels around sparse latent attention (`triton_kernels/sparse.py`).

Their oracles in torch are `topk.topk_slots`, `ds_mla.write_rows` and `ds_mla.dequantize_rows`.
"""

from __future__ import annotations

from typing import Any

import torch

from attnbench.backends.triton_kernels.sparse import (
    read_ds_mla_kernel,
    topk_slots_kernel,
    write_ds_mla_kernel,
)
from attnbench.backends.triton_launch import Launch

_TILE = 512


def topk_slots_launch(
    slots: torch.Tensor,
    topk_indices: torch.Tensor,
    request_of_token: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    workspace_start: torch.Tensor | None = None,
) -> Launch:
    """The launch that writes `slots` (num_tokens, width), int32 and contiguous: where each position
    of `topk_indices` (num_tokens, topk_tokens <= width) lies, -1 where there is none.

    Args:
        request_of_token: (num_tokens,) int32, row of `block_table` (num_reqs, n) int32.
        workspace_start: (num_tokens,) int32; a token with a number >= 0 attends to a workspace in
            which its request starts at that row.
    """
    width = slots.shape[1]
    return Launch(
        topk_slots_kernel,
        (slots.shape[0], -(-width // _TILE), 1),
        {
            "slots_ptr": slots,
            "indices_ptr": topk_indices,
            "request_of_token_ptr": request_of_token,
            "block_table_ptr": block_table,
            "workspace_start_ptr": workspace_start,
            "indices_stride_token": topk_indices.stride(0),
            "block_table_stride": block_table.stride(0),
            "TOPK": topk_indices.shape[1],
            "WIDTH": width,
            "BLOCK_SIZE": block_size,
            "TILE": _TILE,
        },
        num_warps=4,
    )


def write_ds_mla_launch(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> Launch:
    """The launch that quantises latents (num_tokens, 512) and rotary keys (num_tokens, 1, 64), bf16
    or float32 and bf16, into their slots of `kv_cache` (num_blocks, block_size, 656) uint8."""
    return Launch(
        write_ds_mla_kernel,
        (slot_mapping.shape[0], 1, 1),
        {
            "latent_ptr": kv_c_normed,
            # Copied, not converted: as bits.
            "rope_ptr": k_pe.view(torch.int16),
            **_cache(kv_cache, torch.int16),
            "slot_mapping_ptr": slot_mapping,
            "latent_stride_token": kv_c_normed.stride(0),
            "rope_stride_token": k_pe.stride(0),
        },
        num_warps=4,
    )


def read_ds_mla_launch(output: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> Launch:
    """The launch that writes the tokens in `slots` (num_rows,) int32 to `output` (num_rows, 576),
    contiguous, dequantised."""
    return Launch(
        read_ds_mla_kernel,
        (slots.shape[0], 1, 1),
        {"output_ptr": output, "slots_ptr": slots, **_cache(kv_cache, torch.bfloat16)},
        num_warps=4,
    )


def _cache(kv_cache: torch.Tensor, rope: torch.dtype) -> dict[str, Any]:
    return {
        "values_ptr": kv_cache.view(torch.float8_e4m3fn),
        "scales_ptr": kv_cache.view(torch.float32),
        "cache_rope_ptr": kv_cache.view(rope),
        "cache_stride_block": kv_cache.stride(0),
        "cache_stride_token": kv_cache.stride(1),
        "BLOCK_SIZE": kv_cache.shape[1],
    }
