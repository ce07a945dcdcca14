"""Rows of a query tile: `BLOCK_Q` tokens of one request times `HEADS_PER_TILE` heads that read the
same keys. Packing heads beside tokens is what gives a decode step with one token a tile to fill."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_tile(
    tile, tile_request_ptr, tile_start_ptr, num_reqs, tiles_per_request, BLOCK_Q: tl.constexpr
):
    """(request, first token of the tile within the request's new tokens).

    Without a map all requests have the same number of tiles, and the last tiles of all requests
    come first: under a causal mask they are the longest.
    """
    if tile_request_ptr is None:
        request = tile % num_reqs
        tile_start = (tiles_per_request - 1 - tile // num_reqs) * BLOCK_Q
    else:
        request = tl.load(tile_request_ptr + tile)
        tile_start = tl.load(tile_start_ptr + tile)
    return request, tile_start


@triton.jit
def key_tile_range(
    tile_start,
    context_len,
    seq_len,
    window,
    segment,
    NUM_SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """(first, full_first, full_end, end, key_end) of the key tiles a query tile reads in `segment`.

    Tiles in [full_first, full_end) are visible to every row as a whole and need no mask.
    Positions: key n is token n of the request; the tile's first query is token
    `context_len + tile_start`. A window reaches back only under a causal mask, else both ways.
    """
    first_position = context_len + tile_start
    if CAUSAL:
        key_end = tl.minimum(seq_len, first_position + BLOCK_Q)
        full_end = tl.minimum(seq_len, first_position + 1) // TILE_N
    else:
        key_end = seq_len
        full_end = seq_len // TILE_N
        if window is not None:
            key_end = tl.minimum(seq_len, first_position + BLOCK_Q - 1 + window)
            full_end = tl.minimum(seq_len, first_position + window) // TILE_N
    end = tl.cdiv(key_end, TILE_N)
    if window is None:
        first = 0
        full_first = 0
    else:
        first = tl.maximum(first_position - window + 1, 0) // TILE_N
        full_first = tl.cdiv(tl.maximum(first_position + BLOCK_Q - window, 0), TILE_N)
    if NUM_SEGMENTS > 1:
        tiles_per_segment = tl.cdiv(tl.maximum(end - first, 0), NUM_SEGMENTS)
        first = first + segment * tiles_per_segment
        end = tl.minimum(first + tiles_per_segment, end)
    full_first = tl.minimum(tl.maximum(full_first, first), end)
    full_end = tl.minimum(tl.maximum(full_end, full_first), end)
    return first, full_first, full_end, end, key_end
