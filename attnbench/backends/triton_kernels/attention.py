"""Variable-length attention over a paged KV cache, or over dense keys and values.

Prefill, decode and mixed batches run through this one kernel: the host chooses the tile sizes and
how many segments a context is split into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbench.backends.triton_kernels.rows import key_tile_range, locate_tile
from attnbench.backends.triton_kernels.softmax import fp16_factors, rescale

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_tile(
    acc,
    row_max,
    row_sum,
    query,
    key_tile,
    key_end,
    row_position,
    score_scale,
    soft_cap_log2,
    slope_log2,
    window,
    key_ptr,
    value_ptr,
    block_row_ptr,
    key_stride_block,
    value_stride_block,
    KEY_STRIDE_TOKEN: tl.constexpr,
    VALUE_STRIDE_TOKEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    V_HEAD_PAD: tl.constexpr,
    TILE_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of `TILE_N` keys. `MASKED`: some of its keys are not visible to some row."""
    keys = key_tile * TILE_N + tl.arange(0, TILE_N)
    dims = tl.arange(0, HEAD_PAD)
    v_dims = tl.arange(0, V_HEAD_PAD)
    here = keys < key_end
    if block_row_ptr is None:
        key_rows = keys.to(tl.int64) * KEY_STRIDE_TOKEN
        value_rows = keys.to(tl.int64) * VALUE_STRIDE_TOKEN
    elif BLOCK_SIZE % TILE_N == 0:  # a tile lies in one block: one address, constant offsets
        block = tl.load(block_row_ptr + key_tile * TILE_N // BLOCK_SIZE).to(tl.int64)
        slot = key_tile * TILE_N % BLOCK_SIZE
        key_ptr += block * key_stride_block + slot * KEY_STRIDE_TOKEN
        value_ptr += block * value_stride_block + slot * VALUE_STRIDE_TOKEN
        key_rows = tl.arange(0, TILE_N) * KEY_STRIDE_TOKEN
        value_rows = tl.arange(0, TILE_N) * VALUE_STRIDE_TOKEN
    else:
        if MASKED:
            blocks = tl.load(block_row_ptr + keys // BLOCK_SIZE, mask=here, other=0).to(tl.int64)
        else:
            blocks = tl.load(block_row_ptr + keys // BLOCK_SIZE).to(tl.int64)
        slots = keys % BLOCK_SIZE
        key_rows = blocks * key_stride_block + slots * KEY_STRIDE_TOKEN
        value_rows = blocks * value_stride_block + slots * VALUE_STRIDE_TOKEN

    # Slots past the end of a request hold anything, NaN included: they are never loaded.
    key_at = key_ptr + key_rows[None, :] + dims[:, None]
    value_at = value_ptr + value_rows[:, None] + v_dims[None, :]
    if MASKED:
        key = tl.load(key_at, mask=here[None, :] & (dims[:, None] < HEAD_SIZE), other=0.0)
    elif HEAD_SIZE == HEAD_PAD:
        key = tl.load(key_at)
    else:
        key = tl.load(key_at, mask=dims[:, None] < HEAD_SIZE, other=0.0)
    scores = tl.dot(query, key.to(query.dtype), input_precision="ieee")
    late_scale = score_scale
    if soft_cap_log2 is not None or slope_log2 is not None:
        scores = scores * score_scale[:, None]
        late_scale = None
    if soft_cap_log2 is not None:
        # cap * tanh(x / cap); score_scale already carries 2 * log2(e) / cap.
        scores = soft_cap_log2 * (2.0 / (1.0 + tl.exp2(-scores)) - 1.0)
    if slope_log2 is not None:
        distance = tl.abs(keys[None, :] - row_position[:, None]).to(tl.float32)
        scores -= slope_log2[:, None] * distance
    if MASKED:
        visible = here[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= row_position[:, None])
        if window is not None:
            visible = visible & (keys[None, :] > row_position[:, None] - window)
            if not CAUSAL:
                visible = visible & (keys[None, :] < row_position[:, None] + window)
        scores = tl.where(visible, scores, float("-inf"))

    probs, row_max, row_sum, shrink = rescale(scores, late_scale, row_max, row_sum, MASKED)

    if MASKED:
        value = tl.load(value_at, mask=here[:, None] & (v_dims[None, :] < V_HEAD_SIZE), other=0.0)
    elif V_HEAD_SIZE == V_HEAD_PAD:
        value = tl.load(value_at)
    else:
        value = tl.load(value_at, mask=v_dims[None, :] < V_HEAD_SIZE, other=0.0)
    acc = acc * shrink[:, None]
    acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc, input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def attention_kernel(
    output_ptr,  # (num_tokens, num_heads, v_head_size)
    lse_ptr,  # (num_tokens, num_heads) float32, or None
    partial_acc_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS, v_head_size) float32, or None
    partial_max_ptr,  # (num_tiles * BLOCK_Q, num_heads, NUM_SEGMENTS) float32, or None
    partial_sum_ptr,
    query_ptr,  # (num_tokens, num_heads, head_size)
    key_ptr,  # paged: (num_blocks, block_size, num_kv_heads, head_size); dense: (tokens, ...)
    value_ptr,
    block_table_ptr,  # (num_reqs, max_num_blocks) int32, or None when keys are dense
    key_start_loc_ptr,  # (num_reqs + 1,) int32 first dense key of each request, or None when paged
    query_start_loc_ptr,  # (num_reqs + 1,) int32
    seq_lens_ptr,  # (num_reqs,) int32, keys of each request
    tile_request_ptr,  # (num_tiles,) int32, or None: all requests have as many tiles
    tile_start_ptr,
    k_scale_ptr,  # (1,) float32, or None
    v_scale_ptr,
    alibi_slopes_ptr,  # (num_heads,) float32, or None
    sinks_ptr,  # (num_heads,), or None
    window,  # tokens a query sees, itself included, or None
    scale,
    soft_cap,  # or None
    num_reqs,
    tiles_per_request,
    output_stride_token,
    output_stride_head,
    query_stride_token,
    query_stride_head,
    key_stride_block,
    key_stride_head,
    value_stride_block,
    value_stride_head,
    block_table_stride,
    KEY_STRIDE_TOKEN: tl.constexpr,  # known, so that the rows of a block are constant offsets
    VALUE_STRIDE_TOKEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    V_HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_N: tl.constexpr,
    NUM_SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS_PER_TILE - 1) // HEADS_PER_TILE

    tile = tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_TILES
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
    row_group = (tl.program_id(1) % HEAD_TILES) * HEADS_PER_TILE + rows % HEADS_PER_TILE
    row_head = kv_head * GROUP + row_group
    row_here = (row_slot < BLOCK_Q) & (row_token < query_len) & (row_group < GROUP)
    row_position = context_len + row_token
    dims = tl.arange(0, HEAD_PAD)
    v_dims = tl.arange(0, V_HEAD_PAD)

    query = tl.load(
        query_ptr
        + (query_start + row_token).to(tl.int64)[:, None] * query_stride_token
        + row_head[:, None] * query_stride_head
        + dims[None, :],
        mask=row_here[:, None] & (dims[None, :] < HEAD_SIZE),
        other=0.0,
    )

    score_scale = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    # Both fp8 formats are exact in fp16 and convert to it in one instruction for two values; to
    # bf16 they take several, more than a decode step has.
    if key_ptr.dtype.element_ty.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        wide = query.to(tl.float32)
        factor, inverse = fp16_factors(tl.max(tl.abs(wide), 1))
        query = (wide * factor[:, None]).to(tl.float16)
        score_scale = score_scale * inverse
    if k_scale_ptr is not None:
        score_scale = score_scale * tl.load(k_scale_ptr)
    if soft_cap is None:
        score_scale = score_scale * LOG2E
        soft_cap_log2 = None
    else:
        score_scale = score_scale * (2.0 * LOG2E / soft_cap)
        soft_cap_log2 = soft_cap * LOG2E
    if alibi_slopes_ptr is None:
        slope_log2 = None
    else:
        slope_log2 = tl.load(alibi_slopes_ptr + row_head, mask=row_here, other=0.0) * LOG2E

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # one more logit, counted once: in the first segment
        sink = tl.load(sinks_ptr + row_head, mask=row_here, other=0.0).to(tl.float32) * LOG2E
        row_max = tl.where(segment == 0, sink, row_max)
        row_sum += tl.where(segment == 0, 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, V_HEAD_PAD], tl.float32)

    key_ptr += kv_head * key_stride_head
    value_ptr += kv_head * value_stride_head
    if block_table_ptr is None:
        key_start = tl.load(key_start_loc_ptr + request).to(tl.int64)
        key_ptr += key_start * KEY_STRIDE_TOKEN
        value_ptr += key_start * VALUE_STRIDE_TOKEN
        block_row_ptr = None
    else:
        block_row_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride

    # A tile past the end of its request (padding of a captured batch) reads no keys.
    keys_here = tl.where(tile_start < query_len, seq_len, 0)
    first, full_first, full_end, end, key_end = key_tile_range(
        tile_start, context_len, keys_here, window, segment, NUM_SEGMENTS, CAUSAL, BLOCK_Q, TILE_N
    )
    if window is not None:
        for key_tile in range(first, full_first):
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, query, key_tile, key_end, row_position, score_scale,
                soft_cap_log2, slope_log2, window, key_ptr, value_ptr, block_row_ptr,
                key_stride_block, value_stride_block, KEY_STRIDE_TOKEN, VALUE_STRIDE_TOKEN,
                BLOCK_SIZE, HEAD_SIZE, V_HEAD_SIZE, HEAD_PAD, V_HEAD_PAD, TILE_N, CAUSAL, True,
            )  # fmt: skip
    for key_tile in range(full_first, full_end):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, query, key_tile, key_end, row_position, score_scale,
            soft_cap_log2, slope_log2, window, key_ptr, value_ptr, block_row_ptr,
            key_stride_block, value_stride_block, KEY_STRIDE_TOKEN, VALUE_STRIDE_TOKEN,
            BLOCK_SIZE, HEAD_SIZE, V_HEAD_SIZE, HEAD_PAD, V_HEAD_PAD, TILE_N, CAUSAL, False,
        )  # fmt: skip
    for key_tile in range(full_end, end):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, query, key_tile, key_end, row_position, score_scale,
            soft_cap_log2, slope_log2, window, key_ptr, value_ptr, block_row_ptr,
            key_stride_block, value_stride_block, KEY_STRIDE_TOKEN, VALUE_STRIDE_TOKEN,
            BLOCK_SIZE, HEAD_SIZE, V_HEAD_SIZE, HEAD_PAD, V_HEAD_PAD, TILE_N, CAUSAL, True,
        )  # fmt: skip

    if v_scale_ptr is not None:
        acc = acc * tl.load(v_scale_ptr)
    v_here = row_here[:, None] & (v_dims[None, :] < V_HEAD_SIZE)
    if NUM_SEGMENTS == 1:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a row without keys: output 0, LSE -inf
        acc = acc / row_sum[:, None]
        token = (query_start + row_token).to(tl.int64)
        output_at = (
            output_ptr
            + token[:, None] * output_stride_token
            + row_head[:, None] * output_stride_head
            + v_dims[None, :]
        )
        tl.store(output_at, acc.to(output_ptr.dtype.element_ty), mask=v_here)
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
                partial_acc_ptr + partial[:, None] * V_HEAD_SIZE + v_dims[None, :], acc, mask=v_here
            )
