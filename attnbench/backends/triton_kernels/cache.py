"""Writes new keys and values, or latents, to their slots of a paged cache, quantising to fp8."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_cache_dtype(x, scale_ptr, cache_ptr, QUANT_MAX: tl.constexpr):
    """`x` as the cache stores it: where quantised, divided by its scale and clamped."""
    if QUANT_MAX > 0:
        x = x.to(tl.float32) / tl.load(scale_ptr)
        x = tl.minimum(tl.maximum(x, -QUANT_MAX), QUANT_MAX)
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def write_kv_kernel(
    key_ptr,  # (num_tokens, num_kv_heads, head_size)
    value_ptr,  # (num_tokens, num_kv_heads, v_head_size)
    key_cache_ptr,  # (num_blocks, block_size, num_kv_heads, head_size)
    value_cache_ptr,
    slot_mapping_ptr,  # (num_tokens,) int64; negative: padding, skipped
    k_scale_ptr,  # (1,) float32, or None
    v_scale_ptr,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    key_cache_stride_block,
    key_cache_stride_token,
    key_cache_stride_head,
    value_cache_stride_block,
    value_cache_stride_token,
    value_cache_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_TILE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANT_MAX: tl.constexpr,
):
    """One program per (token, tile of heads)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        heads = tl.program_id(1) * HEADS_PER_TILE + tl.arange(0, HEADS_PER_TILE)[:, None]
        dims = tl.arange(0, HEAD_PAD)[None, :]
        key_here = (heads < NUM_KV_HEADS) & (dims < HEAD_SIZE)
        value_here = (heads < NUM_KV_HEADS) & (dims < V_HEAD_SIZE)
        key_at = key_ptr + token * key_stride_token + heads * key_stride_head + dims
        value_at = value_ptr + token * value_stride_token + heads * value_stride_head + dims
        key = tl.load(key_at, mask=key_here)
        value = tl.load(value_at, mask=value_here)
        key_slot = key_cache_ptr + block * key_cache_stride_block + offset * key_cache_stride_token
        value_slot = (
            value_cache_ptr + block * value_cache_stride_block + offset * value_cache_stride_token
        )
        tl.store(
            key_slot + heads * key_cache_stride_head + dims,
            to_cache_dtype(key, k_scale_ptr, key_cache_ptr, QUANT_MAX),
            mask=key_here,
        )
        tl.store(
            value_slot + heads * value_cache_stride_head + dims,
            to_cache_dtype(value, v_scale_ptr, value_cache_ptr, QUANT_MAX),
            mask=value_here,
        )


@triton.jit
def write_latent_kernel(
    latent_ptr,  # (num_tokens, kv_lora_rank)
    rope_ptr,  # (num_tokens, rope)
    cache_ptr,  # (num_blocks, block_size, kv_lora_rank + rope)
    slot_mapping_ptr,  # (num_tokens,) int64; negative: padding, skipped
    k_scale_ptr,  # (1,) float32, or None
    latent_stride_token,
    rope_stride_token,
    cache_stride_block,
    cache_stride_token,
    LORA_RANK: tl.constexpr,
    LORA_PAD: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUANT_MAX: tl.constexpr,
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if slot >= 0:
        row = cache_ptr + (slot // BLOCK_SIZE) * cache_stride_block
        row += (slot % BLOCK_SIZE) * cache_stride_token
        lora = tl.arange(0, LORA_PAD)
        rope = tl.arange(0, ROPE_PAD)
        latent = tl.load(latent_ptr + token * latent_stride_token + lora, mask=lora < LORA_RANK)
        key_rope = tl.load(rope_ptr + token * rope_stride_token + rope, mask=rope < ROPE_DIM)
        tl.store(
            row + lora,
            to_cache_dtype(latent, k_scale_ptr, cache_ptr, QUANT_MAX),
            mask=lora < LORA_RANK,
        )
        tl.store(
            row + LORA_RANK + rope,
            to_cache_dtype(key_rope, k_scale_ptr, cache_ptr, QUANT_MAX),
            mask=rope < ROPE_DIM,
        )
