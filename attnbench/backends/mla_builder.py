"""Metadata of the latent-attention backends through libraries: vLLM's split of a step, and a plan
of both parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

import torch

from attnbench.backends.abstract import is_quantized_kv_cache
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.device import device_of
from attnbench.backends.graph_buffers import GraphBuffers
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.mla_libraries import load_functions, split_variant
from attnbench.backends.mla_prefill import (
    PrefillChunk,
    host_seq_lens,
    load_prefill,
    plan_chunks,
)
from attnbench.backends.mla_prefill_library import default_prefill
from attnbench.errors import BackendUnavailableError

D = TypeVar("D")


class QueryLenSupport(Enum):
    """Which decodes one call takes (`vllm/model_executor/layers/attention/mla_attention.py`)."""

    SINGLE_ONLY = "one new token a request"
    UNIFORM = "equally many new tokens a request"
    VARLEN = "any"


def count_decodes(query_lens: Sequence[int], threshold: int, support: QueryLenSupport) -> int:
    """How many requests, from the first on, run in the absorbed form: vLLM's rule.

    (`v1/attention/backends/utils.py: split_decodes_and_prefills`.) A uniform kernel takes those as
    long as the first; another length ends the decodes, however short it is.
    """
    if support is QueryLenSupport.SINGLE_ONLY:
        threshold = 1
    if query_lens[0] > threshold:
        return 0
    uniform = support is not QueryLenSupport.VARLEN
    for count, query_len in enumerate(query_lens):
        if query_len > threshold or (uniform and query_len != query_lens[0]):
            return count
    return len(query_lens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """The requests of one step that run in the absorbed form.

    seq_lens (num_decodes,), block_table (num_decodes, n) and query_start_loc (num_decodes + 1,) are
    int32 on the device; the `_cpu` ones are the same on the host.
    """

    num_decodes: int
    num_tokens: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @property
    def query_len(self) -> int:
        """New tokens of each request, where the kernel wants them uniform."""
        return self.num_tokens // self.num_decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryMLAMetadata(Generic[D]):
    """One step's metadata; the first `num_decodes` requests run in the absorbed form.

    `decode` is what the backend's own kernel needs, None without decodes.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    slot_mapping: torch.Tensor
    decode: D | None
    prefill: tuple[PrefillChunk, ...] = field(default=())


class LibraryMLABuilder(AttentionMetadataBuilder[LibraryMLAMetadata[D]]):
    """Splits the batch as vLLM does, and plans both parts."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    backend: ClassVar[str]
    query_len_support: QueryLenSupport = QueryLenSupport.UNIFORM

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        """Raises UsageError without a variant, BackendUnavailableError without its library."""
        super().__init__(spec, layer_names, device, variant)
        self.library, prefill = split_variant(self.backend, variant)
        self.functions: dict[str, Callable[..., Any]] = load_functions(self.backend, self.library)
        decodes = self.decodes_of(self.library.variant)
        self.reorder_batch_threshold, self.query_len_support = decodes
        widths = (spec.shape.qk_head_dim, spec.shape.v_head_size)
        self.prefill_variant = prefill or default_prefill(device_of(device), *widths)
        self.is_quantized = is_quantized_kv_cache(spec.kv_cache_dtype)
        self.graph_buffers = GraphBuffers()

    @classmethod
    def decodes_of(cls, decode: str) -> tuple[int, QueryLenSupport]:
        """Most new tokens of a decode of this library, and which of those one call takes."""
        return cls.reorder_batch_threshold or 1, cls.query_len_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LibraryMLAMetadata[D]:
        """`common_prefix_len` changes nothing: each request reads the shared pages itself.

        Raises: BackendUnavailableError when there are prefills and no library for them.
        """
        return self._build(common_attn_metadata, fast_build, False)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> LibraryMLAMetadata[D]:
        return self._build(common_attn_metadata, False, True)

    def _build(
        self, common: CommonAttentionMetadata, fast_build: bool, for_graph: bool
    ) -> LibraryMLAMetadata[D]:
        query_lens: list[int] = common.query_start_loc_cpu.diff().tolist()
        threshold = self.reorder_batch_threshold or 1
        num_decodes = count_decodes(query_lens, threshold, self.query_len_support)
        num_prefills = common.num_reqs - num_decodes
        if num_prefills:
            self._require_prefill(num_prefills)
        decode = None
        if num_decodes:
            seq_lens_cpu = host_seq_lens(common)[:num_decodes]
            batch = DecodeBatch(
                num_decodes=num_decodes,
                num_tokens=sum(query_lens[:num_decodes]),
                query_start_loc=common.query_start_loc[: num_decodes + 1],
                query_start_loc_cpu=common.query_start_loc_cpu[: num_decodes + 1],
                seq_lens=common.seq_lens[:num_decodes],
                seq_lens_cpu=seq_lens_cpu,
                block_table=common.block_table_tensor[:num_decodes],
                max_query_len=max(query_lens[:num_decodes]),
                max_seq_len=int(seq_lens_cpu.max()),
            )
            decode = self.build_decode(batch, fast_build, for_graph)
        return LibraryMLAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=sum(query_lens[:num_decodes]),
            num_prefills=num_prefills,
            slot_mapping=common.slot_mapping,
            decode=decode,
            prefill=plan_chunks(common, num_decodes, self.spec.block_size),
        )

    def _require_prefill(self, num_prefills: int) -> None:
        try:
            load_prefill(self.prefill_variant)
        except BackendUnavailableError as error:
            raise BackendUnavailableError(
                f"{self.backend} decodes only: {num_prefills} requests of this batch are prefills, "
                f"which run through FLASH_ATTN:{self.prefill_variant}; {error}"
            ) from error

    @abstractmethod
    def build_decode(self, batch: DecodeBatch, fast_build: bool, for_graph: bool) -> D:
        """What the absorbed form needs. `for_graph`: in memory that stays, to be captured."""
