"""What impls over a paged cache of K and V share, whoever's kernel attends: writing, and checks."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch

from attnbench.backends.abstract import is_quantized_kv_cache
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.errors import UsageError
from attnbench.workload.types import AttentionShape, AttentionType

M = TypeVar("M")


class PagedAttentionImpl(AttentionImpl[M]):
    """Writes to the cache by attnbench's own kernel: no library has one that follows a slot mapping
    as vLLM's does. `do_kv_cache_update` must have run before `forward`.

    Attributes:
        name: the backend's, in messages.
        is_quantized: the cache is fp8.
        is_encoder: nothing is cached, K and V come with each call.
    """

    name: ClassVar[str]

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.is_quantized = is_quantized_kv_cache(kv_cache_dtype)
        self.is_encoder = attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)

    def paired(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache as (2, num_blocks, block_size, num_kv_heads, head_size): a view."""
        return kv_cache

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.is_encoder:
            return
        # Here, so that the class, which the selector asks, needs no triton.
        from attnbench.backends.triton_attn_launch import write_kv_launch

        scales = (layer._k_scale, layer._v_scale) if self.is_quantized else (None, None)
        write_kv_launch(key, value, self.paired(kv_cache), slot_mapping, *scales).run()

    def refuse_scales(self, *scales: torch.Tensor | None) -> None:
        """Raises UsageError when the output is to be quantised."""
        if any(scale is not None for scale in scales):
            raise UsageError(f"{self.name} does not quantise its output; call it without scales")
