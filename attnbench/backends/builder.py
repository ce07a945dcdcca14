"""`AttentionMetadataBuilder`: turns the common metadata of a batch into what one kernel needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Generic, TypeVar

import torch

from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.workload.types import AttentionShape

M = TypeVar("M")


class AttentionCGSupport(IntEnum):
    """Which batches may be captured in a CUDA graph (`vllm/v1/attention/backend.py`)."""

    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0

    def covers(self, query_lens: Sequence[int]) -> bool:
        """Whether a batch of requests with these numbers of new tokens may be captured."""
        match self:
            case AttentionCGSupport.ALWAYS:
                return True
            case AttentionCGSupport.UNIFORM_BATCH:
                return len(set(query_lens)) == 1
            case AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE:
                return set(query_lens) == {1}
            case _:
                return False


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """How the KV cache of a layer is laid out: what kernels read of vLLM's `AttentionSpec`."""

    shape: AttentionShape
    dtype: torch.dtype  # of queries and outputs
    kv_cache_dtype: str
    block_size: int
    kv_cache_layout: str = "NHD"


class AttentionMetadataBuilder(ABC, Generic[M]):
    """Built once per layer kind; `build` is called once per step and is timed on its own.

    What `build` returns is the backend's own type; for MLA it has `num_decode_tokens`, the first
    tokens of the batch, to be run in the absorbed form.

    Args:
        spec: layout of the KV cache and the layer's shape.
        layer_names: names of the layers that share the metadata.
        device: where the metadata lives.
        variant: one of `AttentionBackend.get_variants`.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    #: Requests with at most this many query tokens are moved to the front and served by the decode
    #: path; None: the backend does not split the batch.
    reorder_batch_threshold: int | None = None
    supports_update_block_table: ClassVar[bool] = False

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        self.spec = spec
        self.layer_names = tuple(layer_names)
        self.device = device
        self.variant = variant

    @classmethod
    def get_cudagraph_support(cls, spec: KVCacheSpec) -> AttentionCGSupport:
        return cls._cudagraph_support

    @property
    def cudagraph_support(self) -> AttentionCGSupport:
        """What `get_cudagraph_support` says, of this builder's variant."""
        return self.get_cudagraph_support(self.spec)

    @abstractmethod
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> M:
        """Metadata of one step. `fast_build` trades kernel speed for build speed (drafting)."""

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> M:
        """Metadata whose tensors keep their addresses while a graph is captured and replayed.

        Called again for a batch of the same sizes, it fills the same memory anew: what an engine's
        step does before it replays the graph.
        """
        return self.build(0, common_attn_metadata)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> M:
        """Metadata of the `draft_index`-th speculative step."""
        return self.build(0, common_attn_metadata, fast_build=True)

    def update_block_table(
        self, metadata: M, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> M:
        """`metadata` for another KV-cache group: same lengths, other blocks."""
        raise NotImplementedError

    def use_cascade_attention(
        self,
        common_prefix_len: int,
        query_lens: Sequence[int],
        num_query_heads: int,
        num_kv_heads: int,
        use_alibi: bool,
        use_sliding_window: bool,
        use_local_attention: bool,
        num_sms: int,
        dcp_world_size: int,
    ) -> bool:
        """Whether a shared prefix of this length is worth a pass of its own."""
        return False
