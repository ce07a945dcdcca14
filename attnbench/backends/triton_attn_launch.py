"""Launches of the attention, merge and cache-write kernels, and their tile shapes."""

from __future__ import annotations

import torch

from attnbench.backends.device import Device
from attnbench.backends.triton_kernels.attention import attention_kernel
from attnbench.backends.triton_kernels.cache import write_kv_kernel
from attnbench.backends.triton_kernels.merge import merge_segments_kernel
from attnbench.backends.triton_launch import (
    Launch,
    TileGroup,
    TileShape,
    has_tensor_cores,
    has_warp_group_products,
    next_power_of_two,
    shared_memory_limit,
)

#: One tile of the interpreter takes about 10 ms whatever its size.
INTERPRETER_TILE = TileShape(block_m=64, tile_n=128, num_warps=4, num_stages=1)


def attention_tile_shape(
    device: Device,
    head_size: int,
    v_head_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    rows: int,
    is_short: bool,
) -> TileShape:
    """The tile shape for a device: the largest whose compiled kernel neither spills registers nor
    overruns shared memory (`triton_aot.py` measures both).

    Args:
        rows: tokens times heads of a KV head of the longest request.
        is_short: few rows a request: the keys' bandwidth decides, not the tensor cores.
    """
    if device.kind == "cpu":
        return INTERPRETER_TILE
    pad = max(next_power_of_two(head_size), next_power_of_two(v_head_size))
    if not has_tensor_cores(device):
        block_m = 16 if is_short or pad > 128 else 32
        return TileShape(block_m, 32 if pad <= 128 else 16, 4 if is_short else 8, 1)
    row_bytes = pad * dtype.itemsize
    limit = shared_memory_limit(device)
    tile_n = 64 if row_bytes <= 256 else 32
    if is_short:
        block_m = min(next_power_of_two(rows), 64 if row_bytes <= 512 else 16)
    else:
        block_m = 128 if row_bytes <= 256 else 64 if row_bytes <= 512 else 32
        # Without warp-group products, keys converted from fp8 stay in registers.
        if cache_dtype.itemsize == 1 and not has_warp_group_products(device):
            tile_n = 32
    # Shared memory: the query tile, and keys and values once for each stage in flight.
    stages = 3 if limit >= 160 * 1024 else 2 if limit > 64 * 1024 else 1
    while stages > 1 and row_bytes * (block_m + 2 * tile_n * stages) > limit:
        stages -= 1
    while tile_n > 16 and row_bytes * (block_m + 2 * tile_n * stages) > limit:
        tile_n //= 2
    num_warps = 8 if block_m == 128 or block_m * pad > 64 * 128 else 4
    return TileShape(block_m, tile_n, num_warps, stages)


def attention_launches(
    group: TileGroup,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    causal: bool,
    block_table: torch.Tensor | None = None,
    key_start_loc: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    lse: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches of one tile group: the attention kernel, and the merge of its segments.

    Args:
        query: (num_tokens, num_heads, head_size); last dimension contiguous, as of all tensors.
        key, value: (num_blocks, block_size, num_kv_heads, size) with a `block_table`, or dense
            (num_keys, num_kv_heads, size) with `key_start_loc`.
        output: (num_tokens, num_heads, v_head_size), written in place.
        seq_lens: (num_reqs,) keys of each request.
        lse: (num_tokens, num_heads) float32, written in place, or None.
    """
    num_heads, head_size = query.shape[-2:]
    num_kv_heads, v_head_size = value.shape[-2:]
    heads_per_group = num_heads // num_kv_heads
    head_tiles = num_kv_heads * -(-heads_per_group // group.heads_per_tile)
    paged = block_table is not None
    attention = Launch(
        attention_kernel,
        (group.num_tiles, head_tiles, group.num_segments),
        {
            "output_ptr": output,
            "lse_ptr": lse,
            **group.partial_arguments(),
            "query_ptr": query,
            "key_ptr": key,
            "value_ptr": value,
            "block_table_ptr": block_table,
            "key_start_loc_ptr": key_start_loc,
            "query_start_loc_ptr": query_start_loc,
            "seq_lens_ptr": seq_lens,
            **group.location_arguments(),
            "k_scale_ptr": k_scale,
            "v_scale_ptr": v_scale,
            "alibi_slopes_ptr": alibi_slopes,
            "sinks_ptr": sinks,
            "window": window or None,
            "scale": scale,
            "soft_cap": soft_cap or None,
            "output_stride_token": output.stride(0),
            "output_stride_head": output.stride(1),
            "query_stride_token": query.stride(0),
            "query_stride_head": query.stride(1),
            "key_stride_block": key.stride(0) if paged else 0,
            "key_stride_head": key.stride(-2),
            "value_stride_block": value.stride(0) if paged else 0,
            "value_stride_head": value.stride(-2),
            "block_table_stride": block_table.stride(0) if block_table is not None else 0,
            "KEY_STRIDE_TOKEN": key.stride(-3),
            "VALUE_STRIDE_TOKEN": value.stride(-3),
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEADS_PER_TILE": group.heads_per_tile,
            "HEAD_SIZE": head_size,
            "V_HEAD_SIZE": v_head_size,
            "HEAD_PAD": next_power_of_two(head_size),
            "V_HEAD_PAD": next_power_of_two(v_head_size),
            "BLOCK_SIZE": key.shape[1] if paged else 1,
            "BLOCK_M": group.shape.block_m,
            "BLOCK_Q": group.block_q,
            "TILE_N": group.shape.tile_n,
            "NUM_SEGMENTS": group.num_segments,
            "CAUSAL": causal,
        },
        group.shape.num_warps,
        group.shape.pipeline_stages(paged),
    )
    return [attention, *merge_launches(group, output, lse, query_start_loc)]


def merge_launches(
    group: TileGroup,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    query_start_loc: torch.Tensor,
) -> list[Launch]:
    """The launch that merges the segments of `group`; none when contexts are not split."""
    if group.num_segments == 1:
        return []
    num_heads, v_head_size = output.shape[-2:]
    v_head_pad = next_power_of_two(v_head_size)
    return [
        Launch(
            merge_segments_kernel,
            (group.num_tiles * group.block_q, num_heads, 1),
            {
                "output_ptr": output,
                "lse_ptr": lse,
                **group.partial_arguments(),
                "query_start_loc_ptr": query_start_loc,
                **group.location_arguments(),
                "output_stride_token": output.stride(0),
                "output_stride_head": output.stride(1),
                "NUM_HEADS": num_heads,
                "V_HEAD_SIZE": v_head_size,
                "V_HEAD_PAD": v_head_pad,
                "BLOCK_Q": group.block_q,
                "NUM_SEGMENTS": group.num_segments,
                "SEGMENTS_AT_ONCE": min(group.num_segments, 8),
            },
            num_warps=4 if v_head_pad >= 128 else 2,
        )
    ]


def write_kv_launch(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> Launch:
    """The launch that writes new keys and values to their slots.

    Args:
        key: (num_tokens, num_kv_heads, head_size).
        value: (num_tokens, num_kv_heads, v_head_size).
        kv_cache: (2, num_blocks, block_size, num_kv_heads, the wider of both), any strides.
        slot_mapping: (num_slots,), at most num_tokens.
        k_scale, v_scale: (1,) float32 where the cache is fp8, else None.
    """
    key_cache, value_cache = kv_cache[0], kv_cache[1]
    num_kv_heads, head_size = key.shape[-2:]
    v_head_size = value.shape[-1]
    heads_per_tile = next_power_of_two(min(num_kv_heads, 16), at_least=1)
    return Launch(
        write_kv_kernel,
        (slot_mapping.shape[0], -(-num_kv_heads // heads_per_tile), 1),
        {
            "key_ptr": key,
            "value_ptr": value,
            "key_cache_ptr": key_cache,
            "value_cache_ptr": value_cache,
            "slot_mapping_ptr": slot_mapping,
            "k_scale_ptr": k_scale,
            "v_scale_ptr": v_scale,
            "key_stride_token": key.stride(0),
            "key_stride_head": key.stride(1),
            "value_stride_token": value.stride(0),
            "value_stride_head": value.stride(1),
            "key_cache_stride_block": key_cache.stride(0),
            "key_cache_stride_token": key_cache.stride(1),
            "key_cache_stride_head": key_cache.stride(2),
            "value_cache_stride_block": value_cache.stride(0),
            "value_cache_stride_token": value_cache.stride(1),
            "value_cache_stride_head": value_cache.stride(2),
            "NUM_KV_HEADS": num_kv_heads,
            "HEADS_PER_TILE": heads_per_tile,
            "HEAD_SIZE": head_size,
            "V_HEAD_SIZE": v_head_size,
            "HEAD_PAD": next_power_of_two(max(head_size, v_head_size)),
            "BLOCK_SIZE": kv_cache.shape[2],
            "QUANT_MAX": quant_max(kv_cache.dtype),
        },
    )


def quant_max(dtype: torch.dtype) -> float:
    """The largest value an fp8 cache stores; 0.0 for a cache that is not quantised."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0
