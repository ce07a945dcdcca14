"""CUTLASS_MLA: vLLM's CUTLASS latent decode for compute capability 10.x, by its own extension.

One new token a request; the kernel computes 128 heads whatever the layer has. Queries of fewer
heads are padded and the output is copied out of the padding, both in the time of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import AttentionCGSupport, KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import CutlassMLA
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import LibraryMLABackend, LibraryMLAImpl
from attnbench.backends.mla_builder import (
    DecodeBatch,
    LibraryMLABuilder,
    LibraryMLAMetadata,
    QueryLenSupport,
)
from attnbench.backends.mla_libraries import MLALibrary

NAME = "CUTLASS_MLA"
MAX_HEADS = 128
#: The library chooses; vLLM's default.
AUTO_SPLITS = -1
MIN_WORKSPACE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CutlassMLADecode:
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    workspace: torch.Tensor


class CutlassMLAMetadataBuilder(LibraryMLABuilder[CutlassMLADecode]):
    backend: ClassVar[str] = NAME
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    query_len_support: QueryLenSupport = QueryLenSupport.SINGLE_ONLY
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self._workspace = torch.empty(0, dtype=torch.uint8, device=device)

    def build_decode(
        self, batch: DecodeBatch, fast_build: bool, for_graph: bool
    ) -> CutlassMLADecode:
        # The kernel takes rows of the page table to follow each other, and splits a context as if
        # every request filled its row.
        block_table = batch.block_table.contiguous()
        needed = self.functions["sm100_cutlass_mla_get_workspace_size"](
            block_table.shape[1] * self.spec.block_size,
            batch.num_decodes,
            _multiprocessors(self.device),
            AUTO_SPLITS,
        )
        if len(self._workspace) < max(needed, MIN_WORKSPACE_BYTES):
            # Not resized in place: metadata in use keeps the old one.
            self._workspace = self._workspace.new_empty(max(needed, MIN_WORKSPACE_BYTES))
        return CutlassMLADecode(
            seq_lens=batch.seq_lens, block_table=block_table, workspace=self._workspace
        )


class CutlassMLAImpl(LibraryMLAImpl[CutlassMLADecode]):
    backend: ClassVar[str] = NAME

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[CutlassMLADecode],
        output: torch.Tensor,
    ) -> torch.Tensor:
        decode = self.decode_of(attn_metadata)
        num_tokens, num_heads, width = q.shape
        is_padded = num_heads < MAX_HEADS
        written = output
        if is_padded:
            padded = q.new_zeros((num_tokens, MAX_HEADS, width))
            padded[:, :num_heads] = q
            q = padded
            written = output.new_empty((num_tokens, MAX_HEADS, self.kv_lora_rank))
        lse = torch.empty((num_tokens, MAX_HEADS), dtype=torch.float32, device=q.device)
        self.functions["sm100_cutlass_mla_decode"](
            written,
            lse,
            q[..., : self.kv_lora_rank],
            q[..., self.kv_lora_rank :],
            kv_cache,
            decode.seq_lens,
            decode.block_table,
            decode.workspace,
            self.scale,
            AUTO_SPLITS,
        )
        if is_padded:
            output.copy_(written[:, :num_heads])
        return lse[:, :num_heads]


class CutlassMLABackend(LibraryMLABackend, CutlassMLA):
    """Variant: SM100."""

    impl_cls = CutlassMLAImpl
    builder_cls = CutlassMLAMetadataBuilder

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        if config.num_heads > MAX_HEADS:
            return f"{NAME} takes at most {MAX_HEADS} query heads: {config.num_heads}"
        if config.kv_cache_dtype.startswith("fp8"):
            return (
                f"{NAME} takes no scale for an fp8 KV cache, and attnbench's has one; use kv=auto"
            )
        return None


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
