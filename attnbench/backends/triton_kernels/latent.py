"""MLA in its absorbed form: every head reads the same latent row, as key and as value.

key = latent (LORA_RANK) beside the rotary key (ROPE_DIM); value = latent. One load serves both
products. Queries of several new tokens (speculative decoding) are causal within their request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.backends.triton_kernels.rows import key_tile_range, locate_tile
from attnbench.backends.triton_kernels.softmax import fp16_factors, rescale

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_latent_tile(
    acc,
    row_max,
    row_sum,
    query_latent,
    query_rope,
    key_tile,
    key_end,
    row_position,
    score_scale,
    cache_ptr,
    block_row_ptr,
    cache_stride_block,
    CACHE_STRIDE_TOKEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LORA_RANK: tl.constexpr,
    LORA_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of `TILE_N` latents. `MASKED`: some are not visible to some row."""
    keys = key_tile * TILE_N + tl.arange(0, TILE_N)
    lora = tl.arange(0, LORA_PAD)
    rope = tl.arange(0, ROPE_PAD)
    here = keys < key_end
    if BLOCK_SIZE % TILE_N == 0:  # a tile lies in one block: one address, constant offsets
        block = tl.load(block_row_ptr + key_tile * TILE_N // BLOCK_SIZE).to(tl.int64)
        cache_ptr += (
            block * cache_stride_block + key_tile * TILE_N % BLOCK_SIZE * CACHE_STRIDE_TOKEN
        )
        rows = tl.arange(0, TILE_N) * CACHE_STRIDE_TOKEN
    else:
        if MASKED:
            blocks = tl.load(block_row_ptr + keys // BLOCK_SIZE, mask=here, other=0).to(tl.int64)
        else:
            blocks = tl.load(block_row_ptr + keys // BLOCK_SIZE).to(tl.int64)
        rows = blocks * cache_stride_block + (keys % BLOCK_SIZE) * CACHE_STRIDE_TOKEN

    latent_at = cache_ptr + rows[:, None] + lora[None, :]
    rope_at = cache_ptr + LORA_RANK + rows[None, :] + rope[:, None]
    if MASKED:
        latent = tl.load(latent_at, mask=here[:, None] & (lora[None, :] < LORA_RANK), other=0.0)
        key_rope = tl.load(rope_at, mask=here[None, :] & (rope[:, None] < ROPE_DIM), other=0.0)
    else:
        if LORA_RANK == LORA_PAD:
            latent = tl.load(latent_at)
        else:
            latent = tl.load(latent_at, mask=lora[None, :] < LORA_RANK, other=0.0)
        if ROPE_DIM == ROPE_PAD:
            key_rope = tl.load(rope_at)
        else:
            key_rope = tl.load(rope_at, mask=rope[:, None] < ROPE_DIM, other=0.0)
    latent = latent.to(query_latent.dtype)
    scores = tl.dot(query_rope, key_rope.to(query_rope.dtype), input_precision="ieee")
    scores = tl.dot(query_latent, tl.trans(latent), scores, input_precision="ieee")
    if MASKED:
        visible = here[None, :] & (keys[None, :] <= row_position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    probs, row_max, row_sum, shrink = rescale(scores, score_scale, row_max, row_sum, MASKED)
    acc = acc * shrink[:, None]
    acc = tl.dot(probs.to(latent.dtype), latent, acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def latent_attention_kernel(
    output_ptr,  # (num_tokens, num_heads, kv_lora_rank)
    lse_ptr,  # (num_tokens, num_heads) float32, or None
    partial_acc_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS, kv_lora_rank), or None
    partial_max_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS) float32, or None
    partial_sum_ptr,
    query_ptr,  # (num_tokens, num_heads, kv_lora_rank + rope)
    cache_ptr,  # (num_blocks, block_size, kv_lora_rank + rope)
    block_table_ptr,  # (num_reqs, max_num_blocks) int32
    query_start_loc_ptr,  # (num_reqs + 1,) int32
    seq_lens_ptr,  # (num_reqs,) int32
    tile_request_ptr,  # (num_tiles,) int32, or None: all requests have as many tiles
    tile_start_ptr,
    k_scale_ptr,  # (1,) float32, or None
    scale,
    num_reqs,
    tiles_per_request,
    output_stride_token,
    output_stride_head,
    query_stride_token,
    query_stride_head,
    cache_stride_block,
    block_table_stride,
    CACHE_STRIDE_TOKEN: tl.constexpr,  # known, so that the rows of a block are constant offsets
    NUM_HEADS: tl.constexpr,
    HEADS_PER_TILE: tl.constexpr,
    LORA_RANK: tl.constexpr,
    LORA_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
):
    tile = tl.program_id(0)
    segment = tl.program_id(2)
    request, tile_start = locate_tile(
        tile, tile_request_ptr, tile_start_ptr, num_reqs, tiles_per_request, BLOCK_Q
    )
    query_start = tl.load(query_start_loc_ptr + request)
    query_len = tl.load(query_start_loc_ptr + request + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + request)
    context_len = seq_len - query_len

    rows = tl.arange(0, BLOCK_M)
    row_slot = rows // HEADS_PER_TILE
    row_token = tile_start + row_slot
    row_head = tl.program_id(1) * HEADS_PER_TILE + rows % HEADS_PER_TILE
    row_here = (row_slot < BLOCK_Q) & (row_token < query_len) & (row_head < NUM_HEADS)
    row_position = context_len + row_token
    lora = tl.arange(0, LORA_PAD)
    rope = tl.arange(0, ROPE_PAD)

    query_at = query_ptr + (
        (query_start + row_token).to(tl.int64) * query_stride_token + row_head * query_stride_head
    )
    query_latent = tl.load(
        query_at[:, None] + lora[None, :],
        mask=row_here[:, None] & (lora[None, :] < LORA_RANK),
        other=0.0,
    )
    query_rope = tl.load(
        query_at[:, None] + LORA_RANK + rope[None, :],
        mask=row_here[:, None] & (rope[None, :] < ROPE_DIM),
        other=0.0,
    )
    score_scale = tl.full([BLOCK_M], 1.0, tl.float32) * (scale * LOG2E)
    # As in attention.py; both parts of a row by the same factor.
    if cache_ptr.dtype.element_ty.primitive_bitwidth == 8 and query_latent.dtype == tl.bfloat16:
        wide, wide_rope = query_latent.to(tl.float32), query_rope.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), 1), tl.max(tl.abs(wide_rope), 1))
        factor, inverse = fp16_factors(largest)
        query_latent = (wide * factor[:, None]).to(tl.float16)
        query_rope = (wide_rope * factor[:, None]).to(tl.float16)
        score_scale = score_scale * inverse
    if k_scale_ptr is not None:
        score_scale = score_scale * tl.load(k_scale_ptr)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, LORA_PAD], tl.float32)
    block_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride

    # A tile past the end of its request (padding of a captured batch) reads no keys.
    keys_here = tl.where(tile_start < query_len, seq_len, 0)
    first, _, full_end, end, key_end = key_tile_range(
        tile_start, context_len, keys_here, None, segment, NUM_SEGMENTS, True, BLOCK_Q, TILE_N
    )
    for key_tile in range(first, full_end):
        acc, row_max, row_sum = attend_latent_tile(
            acc, row_max, row_sum, query_latent, query_rope, key_tile, key_end, row_position,
            score_scale, cache_ptr, block_row_ptr, cache_stride_block, CACHE_STRIDE_TOKEN,
            BLOCK_SIZE, LORA_RANK, LORA_PAD, ROPE_DIM, ROPE_PAD, TILE_N, False,
        )  # fmt: skip
    for key_tile in range(full_end, end):
        acc, row_max, row_sum = attend_latent_tile(
            acc, row_max, row_sum, query_latent, query_rope, key_tile, key_end, row_position,
            score_scale, cache_ptr, block_row_ptr, cache_stride_block, CACHE_STRIDE_TOKEN,
            BLOCK_SIZE, LORA_RANK, LORA_PAD, ROPE_DIM, ROPE_PAD, TILE_N, True,
        )  # fmt: skip

    if k_scale_ptr is not None:
        acc = acc * tl.load(k_scale_ptr)
    acc_here = row_here[:, None] & (lora[None, :] < LORA_RANK)
    if NUM_SEGMENTS == 1:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row without keys: output 0, LSE -inf
        acc = acc / row_sum[:, None]
        token = (query_start + row_token).to(tl.int64)
        output_at = (
            output_ptr
            + token[:, None] * output_stride_token
            + row_head[:, None] * output_stride_head
            + lora[None, :]
        )
        tl.store(output_at, acc.to(output_ptr.dtype.element_ty), mask=acc_here)
        if lse_ptr is not None:
            lse = (row_max + tl.log2(row_sum)) * LN2
            tl.store(lse_ptr + token * NUM_HEADS + row_head, lse, mask=row_here)
    else:
        partial = ((tile * BLOCK_Q + row_slot).to(tl.int64) * NUM_HEADS + row_head) * NUM_SEGMENTS
        partial = partial + segment
        tl.store(partial_max_ptr + partial, row_max, mask=row_here)
        tl.store(partial_sum_ptr + partial, row_sum, mask=row_here)
        if (first < end) | (segment == 0):  # the merge does not read empty segments
            tl.store(
                partial_acc_ptr + partial[:, None] * LORA_RANK + lora[None, :], acc, mask=acc_here
            )
