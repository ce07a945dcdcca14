"""How CPU_ATTN divides a batch: what is split over keys, and what goes request by request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.split_kv import SplitPlan, plan_splits

#: Requests with at most this many query tokens take the split-KV way.
MAX_DECODE_QUERY_LEN = 8
#: K (or V) bytes of one tile and thread: half an L2 cache.
_SPLIT_TILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """One request of the prefill way: rows of the query, number of keys, its blocks."""

    tokens: slice
    query_len: int
    seq_len: int
    block_table: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CPUAttentionMetadata:
    causal: bool
    decodes: tuple[SplitPlan, ...]
    prefills: tuple[PrefillRequest, ...]


class CPUAttentionMetadataBuilder(AttentionMetadataBuilder[CPUAttentionMetadata]):
    """Splits the batch by query length; the order of the requests does not matter."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """`common_prefix_len` changes nothing: each request reads the shared pages itself."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        seq_lens = common.seq_lens_cpu if common.seq_lens_cpu is not None else common.seq_lens
        table = common.block_table_tensor
        decodes: dict[int, list[int]] = {}
        prefills = []
        # Encoder attention reads K and V as they are given: there are no pages to split over.
        paged = (
            common.causal
            or common.encoder_seq_lens is not None
            or bool((common.slot_mapping >= 0).any())
        )
        for request, seq_len in enumerate(seq_lens.tolist()):
            start, end = starts[request], starts[request + 1]
            if paged and end - start <= MAX_DECODE_QUERY_LEN:
                decodes.setdefault(end - start, []).append(request)
                continue
            prefills.append(
                PrefillRequest(
                    tokens=slice(start, end),
                    query_len=end - start,
                    seq_len=seq_len,
                    block_table=table[request].long(),
                )
            )
        plans = []
        for query_len, requests in decodes.items():
            rows = torch.tensor(requests)
            first_rows = torch.tensor([starts[r] for r in requests])
            plans.append(
                plan_splits(
                    first_rows[:, None] + torch.arange(query_len),
                    seq_lens[rows],
                    table[rows],
                    self.spec.block_size,
                    common.causal,
                    self.spec.shape.sliding_window,
                    self._tile_pages(),
                    with_distance=self.spec.shape.use_alibi,
                )
            )
        return CPUAttentionMetadata(
            causal=common.causal, decodes=tuple(plans), prefills=tuple(prefills)
        )

    def _tile_pages(self) -> int:
        shape = self.spec.shape
        width = max(shape.head_size, shape.v_head_size)
        page = self.spec.block_size * shape.num_kv_heads * width * self.spec.dtype.itemsize
        return max(1, _SPLIT_TILE_BYTES * torch.get_num_threads() // page)
