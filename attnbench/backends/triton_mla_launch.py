"""Launches of the latent attention and latent-write kernels, and their tile shape."""

from __future__ import annotations

import torch

from attnbench.backends.device import Device
from attnbench.backends.triton_attn_launch import INTERPRETER_TILE, merge_launches, quant_max
from attnbench.backends.triton_kernels.cache import write_latent_kernel
from attnbench.backends.triton_kernels.latent import latent_attention_kernel
from attnbench.backends.triton_launch import (
    Launch,
    TileGroup,
    TileShape,
    has_tensor_cores,
    has_warp_group_products,
    is_hopper,
    next_power_of_two,
    shared_memory_limit,
)


def latent_tile_shape(
    device: Device, dtype: torch.dtype, cache_dtype: torch.dtype, rows: int
) -> TileShape:
    """The tile shape of the absorbed form: as many rows as registers hold, since every row more is
    another use of the same latents. Sized for a rank of 512 (`triton_aot.py` measures it).

    Args:
        rows: new tokens times heads of the longest request.
    """
    if device.kind == "cpu":
        return INTERPRETER_TILE
    if not has_tensor_cores(device) or dtype.itemsize > 2:
        return TileShape(16, 16, 8, 1)
    limit = shared_memory_limit(device)
    if limit <= 64 * 1024:
        return TileShape(16, 32, 4, 1)
    if rows <= 16:  # bandwidth decides: a second tile on its way, where two programs fit
        return TileShape(16, 32, 8, 3 if limit > 200 * 1024 else 2)
    if limit < 160 * 1024:
        return TileShape(16, 32, 8, 2)
    if device.kind == "rocm" and cache_dtype.itemsize == 1:  # 32 rows spill on CDNA 4
        return TileShape(16, 32, 4, 1)
    if rows <= 32 or cache_dtype.itemsize == 1:  # latents converted from fp8 stay in registers
        return TileShape(32, 32, 8, 2)
    # A warp-group product reads the queries' tile again for each tile of keys: at 128 bytes a clock
    # that bounds a step of 16 keys at 35 % of the matrix rate, and one of 64 at 80 %.
    # Of those that spill nothing: 16 keys on Hopper, 32 on datacenter Blackwell.
    tile_n = 32 if has_warp_group_products(device) and not is_hopper(device) else 16
    return TileShape(64, tile_n, 8, 2)


def latent_launches(
    group: TileGroup,
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> list[Launch]:
    """The launches of one tile group: the latent kernel, and the merge of its segments.

    Args:
        query: (num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim).
        kv_cache: (num_blocks, block_size, kv_lora_rank + qk_rope_head_dim).
        output: (num_tokens, num_heads, kv_lora_rank), written in place.
        lse: (num_tokens, num_heads) float32, written in place, or None.
    """
    num_heads, lora_rank = output.shape[-2:]
    rope_dim = query.shape[-1] - lora_rank
    latent = Launch(
        latent_attention_kernel,
        (group.num_tiles, -(-num_heads // group.heads_per_tile), group.num_segments),
        {
            "output_ptr": output,
            "lse_ptr": lse,
            **group.partial_arguments(),
            "query_ptr": query,
            "cache_ptr": kv_cache,
            "block_table_ptr": block_table,
            "query_start_loc_ptr": query_start_loc,
            "seq_lens_ptr": seq_lens,
            **group.location_arguments(),
            "k_scale_ptr": k_scale,
            "scale": scale,
            "output_stride_token": output.stride(0),
            "output_stride_head": output.stride(1),
            "query_stride_token": query.stride(0),
            "query_stride_head": query.stride(1),
            "cache_stride_block": kv_cache.stride(0),
            "block_table_stride": block_table.stride(0),
            "CACHE_STRIDE_TOKEN": kv_cache.stride(1),
            "NUM_HEADS": num_heads,
            "HEADS_PER_TILE": group.heads_per_tile,
            "LORA_RANK": lora_rank,
            "LORA_PAD": next_power_of_two(lora_rank),
            "ROPE_DIM": rope_dim,
            "ROPE_PAD": next_power_of_two(rope_dim),
            "BLOCK_SIZE": kv_cache.shape[1],
            "BLOCK_M": group.shape.block_m,
            "BLOCK_Q": group.block_q,
            "TILE_N": group.shape.tile_n,
            "NUM_SEGMENTS": group.num_segments,
        },
        group.shape.num_warps,
        group.shape.pipeline_stages(paged=True),
    )
    return [latent, *merge_launches(group, output, lse, query_start_loc)]


def write_latent_launch(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
) -> Launch:
    """The launch that writes new latents (num_tokens, kv_lora_rank) and rotary keys
    (num_tokens, 1, rope) to their slots; `k_scale` (1,) float32 where the cache is fp8."""
    lora_rank, rope_dim = kv_c_normed.shape[-1], k_pe.shape[-1]
    return Launch(
        write_latent_kernel,
        (slot_mapping.shape[0], 1, 1),
        {
            "latent_ptr": kv_c_normed,
            "rope_ptr": k_pe,
            "cache_ptr": kv_cache,
            "slot_mapping_ptr": slot_mapping,
            "k_scale_ptr": k_scale,
            "latent_stride_token": kv_c_normed.stride(0),
            "rope_stride_token": k_pe.stride(0),
            "cache_stride_block": kv_cache.stride(0),
            "cache_stride_token": kv_cache.stride(1),
            "LORA_RANK": lora_rank,
            "LORA_PAD": next_power_of_two(lora_rank),
            "ROPE_DIM": rope_dim,
            "ROPE_PAD": next_power_of_two(rope_dim),
            "BLOCK_SIZE": kv_cache.shape[1],
            "QUANT_MAX": quant_max(kv_cache.dtype),
        },
        num_warps=2,
    )
