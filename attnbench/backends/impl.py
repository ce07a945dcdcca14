"""`AttentionImpl` and `MLAAttentionImpl`: run a kernel over a paged KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from attnbench.workload.types import AttentionShape, AttentionType

M = TypeVar("M")


class AttentionLayer(Protocol):
    """What an impl may read from the layer that calls it: scales of a quantised KV cache.

    A stored value times its scale is the real value: `key = stored_key * _k_scale`.
    """

    _q_scale: torch.Tensor
    _k_scale: torch.Tensor
    _v_scale: torch.Tensor
    _prob_scale: torch.Tensor
    _q_scale_float: float
    _k_scale_float: float
    _v_scale_float: float


class MLALayer(AttentionLayer, Protocol):
    """An MLA layer also carries the two halves of `kv_b_proj`.

    `W_UK`: (num_heads, qk_nope_head_dim, kv_lora_rank),
    `W_UV`: (num_heads, kv_lora_rank, v_head_dim).
    """

    W_UK: torch.Tensor
    W_UV: torch.Tensor


class AttentionImplBase(ABC, Generic[M]):
    """What both kinds of impl share. Flags are vLLM 0.22.1's (`vllm/v1/attention/backend.py`)."""

    #: LSE of each (token, head) can be returned for decode: needed by context parallelism.
    can_return_lse_for_decode: ClassVar[bool] = False
    supports_pcp: ClassVar[bool] = False
    supports_mtp_with_cp_non_trivial_interleave_size: ClassVar[bool] = False
    #: The kernel takes a quantised query.
    supports_quant_query_input: ClassVar[bool] = False

    # Context-parallel placement; one rank unless an engine says otherwise.
    need_to_return_lse_for_decode: bool = False
    dcp_world_size: int = 1
    dcp_rank: int = 0
    pcp_world_size: int = 1
    pcp_rank: int = 0
    total_cp_world_size: int = 1
    total_cp_rank: int = 0

    def fused_output_quant_supported(self, quant_key: str) -> bool:
        """Whether `output_scale` may be given, for outputs of quantisation `quant_key`."""
        return False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called once after weights are loaded, before the first forward."""
        return


class AttentionImpl(AttentionImplBase[M]):
    """Runs ordinary (non-MLA) attention of one layer.

    Args:
        shape: heads, sizes and features of the layer.
        kv_cache_dtype: `auto`, or a name of `supported_kv_cache_dtypes`.
        attn_type: one of the four kinds.
        alibi_slopes: (num_heads,) float32, or None.
        sinks: (num_heads,) extra logit of each head, or None.
        variant: one of `AttentionBackend.get_variants`.
    """

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        self.shape = shape
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads
        self.head_size = shape.head_size
        self.scale = shape.scale
        self.sliding_window = shape.sliding_window
        self.logits_soft_cap = shape.logits_soft_cap
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.alibi_slopes = alibi_slopes
        self.sinks = sinks
        self.variant = variant

    @abstractmethod
    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys and values to their slots (negative slots are padding, skipped)."""

    @abstractmethod
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens over everything in the cache.

        Args:
            query: (num_tokens, num_heads, head_size).
            key: (num_tokens, num_kv_heads, head_size), already in the cache unless
                `forward_includes_kv_cache_update`.
            value: (num_tokens, num_kv_heads, v_head_size).
            kv_cache: logical shape of `AttentionBackend.get_kv_cache_shape`.
            output: (num_tokens, num_heads, v_head_size), written in place and returned.
        """

    def parts(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M,
    ) -> Mapping[str, Callable[[], Any]]:
        """Parts of `forward` worth showing apart: metric name -> callable that does only it."""
        return {}


class MLAAttentionImpl(AttentionImplBase[M]):
    """Runs multi-head latent attention of one layer; arguments as for `AttentionImpl`.

    Decode requests come first in the batch (`reorder_batch_threshold`): they run in the absorbed
    form (`forward_mqa`), the rest in the expanded form (`forward_mha`), as in vLLM.
    """

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        self.shape = shape
        self.num_heads = shape.num_heads
        self.head_size = shape.head_size
        self.scale = shape.scale
        self.kv_lora_rank = shape.kv_lora_rank
        self.qk_nope_head_dim = shape.qk_nope_head_dim
        self.qk_rope_head_dim = shape.qk_rope_head_dim
        self.v_head_dim = shape.v_head_size
        self.kv_cache_dtype = kv_cache_dtype
        self.variant = variant

    @abstractmethod
    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new latents (num_tokens, kv_lora_rank) and rotary keys (num_tokens, 1, rope)."""

    @abstractmethod
    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M,
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        """Absorbed form, decode requests only.

        Args:
            q: (num_decode_tokens, num_heads, kv_lora_rank + qk_rope_head_dim), `q_nope @ W_UK`
                beside the rotary part.
            output: (num_decode_tokens, num_heads, kv_lora_rank), written in place.

        Returns: LSE (num_decode_tokens, num_heads) in float32, or None.
        """

    @abstractmethod
    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: M,
        output: torch.Tensor,
    ) -> None:
        """Expanded form, prefill requests only; includes the up-projection of the context.

        Args:
            q: (num_prefill_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim).
            output: (num_prefill_tokens, num_heads, v_head_dim), written in place.
        """
