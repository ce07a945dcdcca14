"""The two KV-cache shapes most families share, as bases to derive a backend from."""

from __future__ import annotations

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.ds_mla import DS_MLA, ROW_BYTES


class PairedCacheBackend(AttentionBackend):
    """K and V as two planes: `(2, num_blocks, block_size, num_kv_heads, head_size)`."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        order = (0, 1, 2, 3, 4) if kv_cache_layout == "NHD" else (0, 1, 3, 2, 4)
        if not include_num_layers_dimension:
            return order
        # Blocks outermost: one block of all layers is one contiguous piece to transfer.
        return (2, 0, 1, *(dim + 1 for dim in order[2:]))


class LatentCacheBackend(AttentionBackend):
    """MLA: one latent a token, `(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim)`;
    bytes in place of numbers where the cache is `fp8_ds_mla`.

    It has one head: both layouts are the same memory.
    """

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        if cache_dtype_str == DS_MLA:
            return (num_blocks, block_size, ROW_BYTES)
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)
