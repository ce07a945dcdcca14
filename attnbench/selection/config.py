"""From a workload or a layer to the value a selector is asked with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.dtypes import torch_dtype
from attnbench.workload.types import AttentionShape, AttentionType

if TYPE_CHECKING:
    from attnbench.workload import Workload

_DEFAULT_BLOCK_SIZE = 16
_DEFAULT_LAYOUT = "NHD"


def config_of(workload: Workload, *, leave_free: bool = False) -> AttentionConfig:
    """What a backend must accept to run `workload`.

    Args:
        leave_free: leave a block size and a cache layout that are at their defaults to the backend,
            as an engine does whose user named none; to run the workload they are exactly what it
            says.
    """
    block_size: int | None = workload.block_size
    layout: str | None = workload.kv_cache_layout
    if leave_free:
        block_size = None if block_size == _DEFAULT_BLOCK_SIZE else block_size
        layout = None if layout == _DEFAULT_LAYOUT else layout
    # A cache of the queries' own type is what `auto` means.
    same = workload.kv_cache_dtype == workload.dtype
    return config_for(
        workload.shape,
        torch_dtype(workload.dtype),
        "auto" if same else workload.kv_cache_dtype,
        block_size,
        layout,
        workload.attn_type,
        use_sparse=workload.is_sparse,
    )


def config_for(
    shape: AttentionShape,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    block_size: int | None,
    kv_cache_layout: str | None,
    attn_type: AttentionType,
    use_sparse: bool = False,
) -> AttentionConfig:
    """What a backend must accept to serve a layer of this shape."""
    return AttentionConfig(
        head_size=shape.head_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        use_mla=shape.is_mla,
        has_sink=shape.has_sink,
        use_sparse=use_sparse,
        attn_type=attn_type,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        v_head_size=shape.v_head_size,
        has_sliding_window=shape.sliding_window > 0,
        has_logits_soft_cap=shape.logits_soft_cap > 0,
        use_alibi=shape.use_alibi,
        kv_cache_layout=kv_cache_layout,
        kv_lora_rank=shape.kv_lora_rank,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
    )
