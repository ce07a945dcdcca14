"""Sparse latent attention: positions into cache slots, and the `fp8_ds_mla` cache format.

A token of that format is 656 bytes: 512 e4m3 values, four fp32 scales, 64 bf16 values. The cache is
passed three times, as e4m3, fp32 and bf16, and strides are in bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SCALES_AT = tl.constexpr(512)
_ROPE_AT = tl.constexpr(528)
_LARGEST = tl.constexpr(448.0)  # of e4m3
_MIN_SCALE = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32


@triton.jit
def topk_slots_kernel(
    slots_ptr,  # (num_tokens, WIDTH) int32, contiguous; -1: none
    indices_ptr,  # (num_tokens, TOPK) int32, positions in the request; -1: none
    request_of_token_ptr,  # (num_tokens,) int32
    block_table_ptr,  # (num_reqs, n) int32
    workspace_start_ptr,  # (num_tokens,) int32 or None; >= 0: rows of a workspace, not slots
    indices_stride_token,
    block_table_stride,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per (token, tile of columns). Columns behind TOPK hold none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    index = tl.load(
        indices_ptr + token * indices_stride_token + column, mask=column < TOPK, other=-1
    )
    is_there = index >= 0
    inside = tl.where(is_there, index, 0)
    row = block_table_ptr + tl.load(request_of_token_ptr + token) * block_table_stride
    block = tl.load(row + inside // BLOCK_SIZE, mask=is_there, other=0)
    slot = block * BLOCK_SIZE + inside % BLOCK_SIZE
    if workspace_start_ptr is not None:
        start = tl.load(workspace_start_ptr + token)
        slot = tl.where(start >= 0, start + inside, slot)
    tl.store(slots_ptr + token * WIDTH + column, tl.where(is_there, slot, -1), mask=column < WIDTH)


@triton.jit
def write_ds_mla_kernel(
    latent_ptr,  # (num_tokens, 512)
    rope_ptr,  # (num_tokens, 64)
    values_ptr,  # the cache as e4m3, as fp32 and as 16-bit numbers
    scales_ptr,
    cache_rope_ptr,
    slot_mapping_ptr,  # (num_tokens,) int64; negative: padding, skipped
    latent_stride_token,
    rope_stride_token,
    cache_stride_block,  # bytes
    cache_stride_token,
    BLOCK_SIZE: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        row = (slot // BLOCK_SIZE) * cache_stride_block + (slot % BLOCK_SIZE) * cache_stride_token
        tile = tl.arange(0, 4)
        column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
        value = tl.load(latent_ptr + token * latent_stride_token + column).to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=1), _LARGEST), _MIN_SCALE)
        code = tl.div_rn(value, tl.broadcast_to(scale[:, None], (4, 128)))
        code = tl.minimum(tl.maximum(code, -_LARGEST), _LARGEST)
        tl.store(values_ptr + row + column, code.to(values_ptr.dtype.element_ty))
        tl.store(scales_ptr + (row + _SCALES_AT) // 4 + tile, scale)
        rope = tl.arange(0, 64)
        key = tl.load(rope_ptr + token * rope_stride_token + rope)
        tl.store(cache_rope_ptr + (row + _ROPE_AT) // 2 + rope, key)


@triton.jit
def read_ds_mla_kernel(
    output_ptr,  # (num_rows, 576), contiguous
    slots_ptr,  # (num_rows,) int32
    values_ptr,
    scales_ptr,
    cache_rope_ptr,
    cache_stride_block,
    cache_stride_token,
    BLOCK_SIZE: tl.constexpr,
):
    """One program per row: the token in a slot, dequantised."""
    at = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + at).to(tl.int64)
    row = (slot // BLOCK_SIZE) * cache_stride_block + (slot % BLOCK_SIZE) * cache_stride_token
    tile = tl.arange(0, 4)
    column = tile[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(values_ptr + row + column).to(tl.float32)
    value *= tl.load(scales_ptr + (row + _SCALES_AT) // 4 + tile)[:, None]
    out = output_ptr + at * 576
    tl.store(out + column, value.to(output_ptr.dtype.element_ty))
    rope = tl.arange(0, 64)
    key = tl.load(cache_rope_ptr + (row + _ROPE_AT) // 2 + rope).to(tl.float32)
    tl.store(out + 512 + rope, key.to(output_ptr.dtype.element_ty))
