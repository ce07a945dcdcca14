"""FlashInfer's calls: pages as its wrappers want them, planning, and running what was planned.

A wrapper keeps one plan. So each belongs to the metadata it was planned for and is planned anew
only when that metadata is gone: two batches of one builder never share one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.backends.flashinfer_calls import PlannedCascade, PlannedWrapper, workspace
from attnbench.backends.flashinfer_library import CUDA_CORES, FP8_QUERY_KERNELS
from attnbench.backends.metadata import CommonAttentionMetadata


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive requests of a batch, and the first token of the first one."""

    first: int
    last: int
    first_token: int = 0


@dataclass(frozen=True, slots=True)
class Pages:
    """Which pages each request reads: int32, on the host but for `indices`.

    indptr: (num_reqs + 1,) where a request's pages begin in `indices`.
    last_page_len: (num_reqs,) tokens in the last page.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    def of(self, span: Span) -> Pages:
        indptr = self.indptr[span.first : span.last + 1]
        first, last = int(indptr[0]), int(indptr[-1])
        return Pages(
            indptr - first, self.indices[first:last], self.last_page_len[span.first : span.last]
        )


def page_table(common: CommonAttentionMetadata, block_size: int, first_page: int = 0) -> Pages:
    """The pages of a batch from `first_page` of each request on.

    Waits for the device only where the host does not know `seq_lens`.
    """
    known = common.seq_lens_cpu
    seq_lens = common.seq_lens.cpu() if known is None else known
    counts = (seq_lens + block_size - 1) // block_size - first_page
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=indptr[1:])
    total = int(indptr[-1])
    table = common.block_table_tensor
    device = table.device
    on_device = (common.seq_lens + block_size - 1) // block_size - first_page
    ends = torch.cumsum(on_device, 0)
    requests = torch.repeat_interleave(
        torch.arange(len(counts), device=device), on_device, output_size=total
    )
    begins = (ends - on_device)[requests]
    columns = torch.arange(total, device=device) - begins + first_page
    last_page_len = ((seq_lens - 1) % block_size + 1).to(torch.int32)
    return Pages(indptr, table[requests, columns], last_page_len)


class Leases:
    """Wrappers, each free again when the metadata it was planned for is gone."""

    def __init__(self) -> None:
        self._lent: list[tuple[Any, weakref.ref[Any]]] = []

    def take(self) -> Any:
        """One that nobody holds; None: all are held."""
        for place, (wrapper, holder) in enumerate(self._lent):
            if holder() is None:
                del self._lent[place]
                return wrapper
        return None

    def lend(self, wrapper: Any, holder: object) -> None:
        self._lent.append((wrapper, weakref.ref(holder)))


class WrapperPlanner:
    """Plans the wrappers of one layer kind.

    Args:
        spec: layout of the cache and the layer's shape.
        names: what `load_names` found.
        device: where workspace and page tables live.
    """

    def __init__(self, spec: KVCacheSpec, names: dict[str, Any], device: torch.device) -> None:
        shape = spec.shape
        self.spec = spec
        self.names = names
        self.device = device
        self.is_quantized = is_fp8(torch_dtype(spec.kv_cache_dtype))
        self._leases: dict[str, Leases] = {}
        self._for_graphs: dict[tuple[object, ...], Any] = {}
        self._common: dict[str, Any] = {
            "num_qo_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "page_size": spec.block_size,
            "sm_scale": shape.scale,
            "window_left": shape.sliding_window - 1 if shape.sliding_window else -1,
            "logits_soft_cap": shape.logits_soft_cap,
            "kv_data_type": torch_dtype(spec.kv_cache_dtype),
        }

    @property
    def workspace(self) -> torch.Tensor:
        """Partial results of split contexts; all wrappers of a stream may share it."""
        return workspace(self.device, "wrappers")

    def decode(self, kernels: str, pages: Pages, max_pages: int, for_graph: bool) -> PlannedWrapper:
        """Requests of one new token each."""

        def make() -> Any:
            buffers = self._buffers(pages, max_pages, "paged_kv_{}_buffer") if for_graph else {}
            return self.names["BatchDecodeWithPagedKVCacheWrapper"](
                self.workspace,
                kv_layout=self.spec.kv_cache_layout,
                use_cuda_graph=for_graph,
                use_tensor_cores=kernels != CUDA_CORES,
                backend="fa2" if kernels == CUDA_CORES else kernels,
                **buffers,
            )

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                indptr=pages.indptr,
                indices=pages.indices,
                last_page_len=pages.last_page_len,
                head_dim=self.spec.shape.head_size,
                **self._dtypes(kernels),
                **self._common,
            )

        key = ("decode", kernels, len(pages.last_page_len), max_pages) if for_graph else ()
        return self._planned("decode", kernels, make, plan, key)

    def prefill(
        self,
        kernels: str,
        query_start_loc: torch.Tensor,
        pages: Pages,
        max_pages: int,
        for_graph: bool,
    ) -> PlannedWrapper:
        """Requests of any number of new tokens; `query_start_loc` on the host, from 0 on."""

        def make() -> Any:
            buffers: dict[str, torch.Tensor] = {}
            if for_graph:
                buffers = self._buffers(pages, max_pages, "paged_kv_{}_buf")
                buffers["qo_indptr_buf"] = torch.empty_like(buffers["paged_kv_indptr_buf"])
            return self.names["BatchPrefillWithPagedKVCacheWrapper"](
                self.workspace,
                kv_layout=self.spec.kv_cache_layout,
                use_cuda_graph=for_graph,
                backend=kernels,
                **buffers,
            )

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                qo_indptr=query_start_loc,
                paged_kv_indptr=pages.indptr,
                paged_kv_indices=pages.indices,
                paged_kv_last_page_len=pages.last_page_len,
                head_dim_qk=self.spec.shape.head_size,
                causal=True,
                **self._dtypes(kernels),
                **self._common,
            )

        # Such a wrapper takes no more tokens than in its first plan.
        rows = (len(pages.last_page_len), int(query_start_loc[-1]), max_pages)
        return self._planned(
            "prefill", kernels, make, plan, ("prefill", *rows) if for_graph else ()
        )

    def cascade(
        self, common: CommonAttentionMetadata, prefix_len: int, pages: Pages
    ) -> PlannedCascade:
        """All requests; `pages` begin behind the shared prefix, which is whole pages."""
        page_size = self.spec.block_size
        shared = prefix_len // page_size
        leases = self._leases.setdefault("cascade", Leases())
        wrapper = leases.take() or self.names["MultiLevelCascadeAttentionWrapper"](
            2, self.workspace, kv_layout=self.spec.kv_cache_layout
        )

        def int32(*numbers: int) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32)

        wrapper.plan(
            qo_indptr_arr=[int32(0, common.num_actual_tokens), common.query_start_loc_cpu],
            paged_kv_indptr_arr=[int32(0, shared), pages.indptr],
            paged_kv_indices_arr=[common.block_table_tensor[0, :shared], pages.indices],
            paged_kv_last_page_len=[int32(page_size), pages.last_page_len],
            head_dim=self.spec.shape.head_size,
            causal=True,
            q_data_type=self.spec.dtype,
            **self._common,
        )
        planned = PlannedCascade(wrapper)
        leases.lend(wrapper, planned)
        return planned

    def _planned(
        self,
        phase: str,
        kernels: str,
        make: Callable[[], Any],
        plan: Callable[[Any], None],
        graph_key: tuple[object, ...],
    ) -> PlannedWrapper:
        """The wrapper of a captured graph is planned anew in place; any other belongs to one."""
        leases = None
        if graph_key:
            if graph_key not in self._for_graphs:
                self._for_graphs[graph_key] = make()
            wrapper = self._for_graphs[graph_key]
        else:
            leases = self._leases.setdefault(phase, Leases())
            wrapper = leases.take() or make()
        plan(wrapper)
        planned = PlannedWrapper(wrapper, self._takes_fp8(kernels), self.is_quantized)
        if leases is not None:
            leases.lend(wrapper, planned)
        return planned

    def _takes_fp8(self, kernels: str) -> bool:
        return self.is_quantized and kernels in FP8_QUERY_KERNELS

    def _dtypes(self, kernels: str) -> dict[str, torch.dtype]:
        query = torch.float8_e4m3fn if self._takes_fp8(kernels) else self.spec.dtype
        return {"q_data_type": query, "o_data_type": self.spec.dtype}

    def _buffers(self, pages: Pages, max_pages: int, name: str) -> dict[str, torch.Tensor]:
        """Page tables that a captured graph reads, for as many pages as the batch can have."""
        num_reqs = len(pages.last_page_len)
        sizes = {"indptr": num_reqs + 1, "indices": max_pages, "last_page_len": num_reqs}
        return {
            name.format(part): torch.zeros(size, dtype=torch.int32, device=self.device)
            for part, size in sizes.items()
        }
