"""Merges the partial states (max, denominator, accumulator) of a context split into segments."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.backends.triton_kernels.rows import locate_tile

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_segments_kernel(
    output_ptr,  # (num_tokens, num_heads, V_HEAD_SIZE)
    lse_ptr,  # (num_tokens, num_heads) float32, or None
    partial_acc_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS, V_HEAD_SIZE) float32
    partial_max_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS) float32
    partial_sum_ptr,
    query_start_loc_ptr,
    tile_request_ptr,
    tile_start_ptr,
    num_reqs,
    tiles_per_request,
    output_stride_token,
    output_stride_head,
    NUM_HEADS: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    V_HEAD_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    SEGMENTS_AT_ONCE: tl.constexpr,
):
    """One program per (row of a tile, head). An empty segment has max -inf and no accumulator; the
    first segment, which may hold a sink alone, always has one."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    tile = row // BLOCK_Q
    request, tile_start = locate_tile(
        tile, tile_request_ptr, tile_start_ptr, num_reqs, tiles_per_request, BLOCK_Q
    )
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    token = tile_start + row % BLOCK_Q
    if token < query_len:
        partial = (row.to(tl.int64) * NUM_HEADS + head) * NUM_SEGMENTS
        segments = tl.arange(0, NUM_SEGMENTS)
        total_max = tl.max(tl.load(partial_max_ptr + partial + segments), 0)
        offset = tl.where(total_max == float("-inf"), 0.0, total_max)
        v_dims = tl.arange(0, V_HEAD_PAD)
        total = 0.0
        acc = tl.zeros([V_HEAD_PAD], tl.float32)
        for start in tl.static_range(0, NUM_SEGMENTS, SEGMENTS_AT_ONCE):
            some = start + tl.arange(0, SEGMENTS_AT_ONCE)
            some_max = tl.load(partial_max_ptr + partial + some)
            some_sum = tl.load(partial_sum_ptr + partial + some)
            weight = tl.exp2(some_max - offset)
            total += tl.sum(weight * some_sum, 0)
            some_acc = tl.load(
                partial_acc_ptr + (partial + some)[:, None] * V_HEAD_SIZE + v_dims[None, :],
                mask=(some_max > float("-inf"))[:, None] & (v_dims < V_HEAD_SIZE)[None, :],
                other=0.0,
            )
            acc += tl.sum(some_acc * weight[:, None], 0)
        total = tl.where(total == 0.0, 1.0, total)  # a row without keys: output 0, LSE -inf
        acc = acc / total
        position = (query_start + token).to(tl.int64)
        tl.store(
            output_ptr + position * output_stride_token + head * output_stride_head + v_dims,
            acc.to(output_ptr.dtype.element_ty),
            mask=v_dims < V_HEAD_SIZE,
        )
        if lse_ptr is not None:
            lse = (total_max + tl.log2(total)) * LN2
            tl.store(lse_ptr + position * NUM_HEADS + head, lse)
