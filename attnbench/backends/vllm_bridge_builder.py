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
        self.num_blocks = 0
        self._table: torch.Tensor | None = None
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

    def _fit(self, common: CommonAttentionMetadata) -> None:
        """Buffers for this batch, and the number of blocks, which an engine knows from its start.

        Looked for again only when another block table comes: the device is waited for.
        """
        limits = self.limits.fitting(common)
        if limits != self.limits:
            self.limits = limits
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
