"""The metadata builder of `VLLM:NAME`: vLLM's own, made for buffers that hold the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.vllm_bridge_engine import (
    LAYER_NAME,
    Limits,
    common_metadata,
    load_vllm,
    make_config,
    make_layer,
)
from attnbench.workload.types import AttentionType


@dataclass(slots=True)
class VllmMetadata:
    """vLLM's metadata of one step, and what its builder was told of the cache."""

    theirs: Any
    num_blocks: int
    layout: str

    @property
    def num_decode_tokens(self) -> int:
        """MLA: first tokens of the batch, run in the absorbed form."""
        tokens: int = self.theirs.num_decode_tokens
        return tokens


def _attn_type_of(common: CommonAttentionMetadata) -> AttentionType:
    """The kind of layer a batch is of: vLLM's builders are made for one, ours learn it here."""
    if common.causal:
        return AttentionType.DECODER
    if common.encoder_seq_lens is not None:
        return AttentionType.ENCODER_DECODER
    return AttentionType.ENCODER_ONLY


class VllmMetadataBuilder(AttentionMetadataBuilder[VllmMetadata]):
    """vLLM's builder of one backend, made for buffers that hold the batch."""

    vllm_name: ClassVar[str] = ""

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        """Raises BackendUnavailableError."""
        super().__init__(spec, layer_names, device, variant)
        self.library = load_vllm()
        self.their_class = self.library.backend(self.vllm_name)
        self.limits = Limits()
        self.attn_type = AttentionType.DECODER
        self.num_blocks = 0
        self._table: torch.Tensor | None = None
        self._captured: tuple[CommonAttentionMetadata, VllmMetadata] | None = None
        self._make()

    def _make(self) -> None:
        spec = self.spec
        self.config = make_config(
            self.library,
            spec.shape,
            spec.dtype,
            spec.kv_cache_dtype,
            spec.block_size,
            self.limits,
            spec.kv_cache_layout,
        )
        sinks = torch.zeros(spec.shape.num_heads) if spec.shape.has_sink else None
        slopes = torch.zeros(spec.shape.num_heads) if spec.shape.use_alibi else None
        # Builders read their layers: the window, the scale, whether there are sinks.
        layer = make_layer(
            self.library,
            self.their_class,
            self.config,
            self.device,
            self.attn_type,
            alibi_slopes=slopes,
            sinks=sinks,
        )
        with self.library.current_config(self.config):
            self.their_spec = self.library.api.spec(
                self.their_class, layer, self.config, spec.block_size
            )
            self.theirs = self.their_class.get_builder_cls()(
                self.their_spec, [LAYER_NAME], self.config, self.device
            )

    @property
    def cudagraph_support(self) -> AttentionCGSupport:
        """What vLLM's builder class says of this configuration."""
        with self.library.current_config(self.config):
            support = type(self.theirs).get_cudagraph_support(self.config, self.their_spec)
        return AttentionCGSupport[support.name]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> VllmMetadata:
        self._fit(common_attn_metadata)
        common = common_metadata(self.library, common_attn_metadata)
        made = self.theirs.build(common_prefix_len, common, fast_build=fast_build)
        return VllmMetadata(made, self.num_blocks, self.spec.kv_cache_layout)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> VllmMetadata:
        """As vLLM: metadata for its longest context, which the graph is captured with and keeps,
        then its `build` of this batch, which fills what the graph reads.

        Of the same batch again, whose tensors may hold other numbers: the second step alone.
        """
        self._fit(common_attn_metadata)
        if self._captured is None or self._captured[0] is not common_attn_metadata:
            self._captured = (common_attn_metadata, self._capture(common_attn_metadata))
        self.theirs.build(0, common_metadata(self.library, common_attn_metadata))
        return self._captured[1]

    def _capture(self, common: CommonAttentionMetadata) -> VllmMetadata:
        # Some of their builders write to the engine's tensors, which the next step fills again.
        tensors = (common.seq_lens, common.query_start_loc, common.query_start_loc_cpu)
        kept = [tensor.clone() for tensor in tensors]
        longest = common.replace(max_seq_len=self.limits.max_model_len)
        made = self.theirs.build_for_cudagraph_capture(common_metadata(self.library, longest))
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
        return VllmMetadata(made, self.num_blocks, self.spec.kv_cache_layout)

    def _fit(self, common: CommonAttentionMetadata) -> None:
        """A builder for this kind of attention with buffers for this batch, and the number of
        blocks, which an engine knows from its start.

        Looked for again only when another block table comes: the device is waited for.
        """
        limits, attn_type = self.limits.fitting(common), _attn_type_of(common)
        if (limits, attn_type) != (self.limits, self.attn_type):
            self.limits, self.attn_type = limits, attn_type
            self._captured = None
            self._make()
        table = common.block_table_tensor
        if table is not self._table:
            self._table = table
            self.num_blocks = 1 + int(table.max()) if table.numel() else 1
        self.config.cache_config.num_gpu_blocks = self.num_blocks

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
        """vLLM's own answer; no from 0.30 on, which has no cascade."""
        ask = getattr(self.theirs, "use_cascade_attention", None)
        if ask is None:
            return False
        import numpy as np

        return bool(
            ask(
                common_prefix_len,
                np.asarray(query_lens, dtype=np.int32),
                num_query_heads,
                num_kv_heads,
                use_alibi,
                use_sliding_window,
                use_local_attention,
                num_sms,
                dcp_world_size,
            )
        )
