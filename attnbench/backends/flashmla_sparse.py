"""FLASHMLA_SPARSE: DeepSeek-V3.2's sparse latent attention, by FlashMLA's kernels.

All requests run in the absorbed form. What runs is vLLM 0.22.1's choice
(`mla/flashmla_sparse.py`):

- a bf16 cache: one call of the prefill kernel, for decodes too;
- an `fp8_ds_mla` cache and fewer than 32 heads: one call of the fp8 decode kernel, all tokens as
  one request of that many new ones;
- with 32 heads or more: the fp8 decode kernel for the decodes; the contexts of the others are
  upconverted to bf16 in a workspace, requests together up to 128 Ki tokens, and go through the
  prefill kernel.

Both kernels take 64 or 128 heads (the prefill kernel on compute capability 10.x is given 128, as
vLLM does): fewer are padded, in the time, and the output is copied. So is making cache slots of
the indexer's positions, one small kernel a call, with columns of -1 up to a multiple of 128, which
the kernels want. The schedule of the decode kernel is made by its first call after `build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import FlashMLASparse
from attnbench.backends.ds_mla import DS_MLA
from attnbench.backends.impl import MLALayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.mla_backend import LibraryMLABackend, LibraryMLAImpl
from attnbench.backends.mla_builder import (
    DecodeBatch,
    LibraryMLABuilder,
    LibraryMLAMetadata,
    QueryLenSupport,
    count_decodes,
)
from attnbench.backends.mla_libraries import MLALibrary
from attnbench.backends.mla_prefill import host_seq_lens
from attnbench.errors import UsageError

NAME = "FLASHMLA_SPARSE"
MAX_HEADS = 128
#: The prefill kernel reads two blocks of 64 positions at a time.
TOPK_MULTIPLE = 128
#: Below it vLLM runs prefills through the fp8 decode kernel (`MIN_HEADS_FOR_BF16_PREFILL`).
MIN_HEADS_TO_UPCONVERT = 32
#: Tokens upconverted at once; a longer request is alone.
WORKSPACE_TOKENS = 128 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpconvertedChunk:
    """Prefills that share the workspace: their tokens, and the cache slot of each of its rows."""

    tokens: slice
    slots: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseDecode:
    """All tokens of a step.

    slots: (num_tokens, width) int32, filled by each call from `topk_indices`.
    workspace_start: (num_tokens,) int32, where a token's request starts in the workspace, -1 where
        it reads the cache; None: all read the cache.
    fp8_batch: (requests, new tokens each) of the fp8 decode kernel's call; (0, 0): none.
    """

    request_of_token: torch.Tensor
    block_table: torch.Tensor
    topk_indices: torch.Tensor
    slots: torch.Tensor
    schedule: Any = None
    fp8_batch: tuple[int, int] = (0, 0)
    workspace_start: torch.Tensor | None = None
    workspace: torch.Tensor | None = None
    chunks: tuple[UpconvertedChunk, ...] = ()


class FlashMLASparseMetadataBuilder(LibraryMLABuilder[SparseDecode]):
    backend: ClassVar[str] = NAME
    #: vLLM's is one more than the tokens drafted; only an fp8 cache makes a difference.
    reorder_batch_threshold: int | None = 16

    def _build(
        self, common: CommonAttentionMetadata, fast_build: bool, for_graph: bool
    ) -> LibraryMLAMetadata[SparseDecode]:
        indices = common.topk_indices_buffer
        if indices is None:
            raise UsageError(
                f"{NAME} needs the positions each query attends to; write topk=, e.g. "
                "topk=2048:random, or take a dense backend"
            )
        query_lens: list[int] = common.query_start_loc_cpu.diff().tolist()
        made: dict[str, torch.Tensor] = {
            "request_of_token": _repeat(range(len(query_lens)), query_lens),
            "slots": torch.empty((len(indices), _padded_width(indices)), dtype=torch.int32),
        }
        fp8_batch: tuple[int, int] = (0, 0)
        chunks: list[range] = []
        if self.spec.kv_cache_dtype == DS_MLA:
            fp8_batch, chunks = self._plan_fp8(common, query_lens)
        if chunks:
            made["workspace_start"], rows = _place(common, query_lens, chunks)
            made["workspace"] = torch.empty((rows, self.spec.shape.head_size), dtype=torch.bfloat16)
        kept = {name: self._move(name, tensor, for_graph) for name, tensor in made.items()}
        starts = list(accumulate(query_lens, initial=0))
        decode = SparseDecode(
            block_table=common.block_table_tensor,
            topk_indices=indices,
            schedule=self.functions["get_mla_metadata"]()[0] if fp8_batch[0] else None,
            fp8_batch=fp8_batch,
            chunks=tuple(
                UpconvertedChunk(
                    tokens=slice(starts[chunk.start], starts[chunk.stop]),
                    slots=self._move(f"chunk {i}", self._slots(common, chunk), for_graph),
                )
                for i, chunk in enumerate(chunks)
            ),
            **kept,
        )
        return LibraryMLAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=common.num_reqs,
            num_decode_tokens=common.num_actual_tokens,
            num_prefills=0,
            slot_mapping=common.slot_mapping,
            decode=decode,
        )

    def build_decode(self, batch: DecodeBatch, fast_build: bool, for_graph: bool) -> SparseDecode:
        raise AssertionError("a sparse batch is not split: `_build` makes it whole")

    def _move(self, name: str, tensor: torch.Tensor, for_graph: bool) -> torch.Tensor:
        there = tensor.to(self.device, non_blocking=True)
        return self.graph_buffers.keep(name, there) if for_graph else there

    def _plan_fp8(
        self, common: CommonAttentionMetadata, query_lens: Sequence[int]
    ) -> tuple[tuple[int, int], list[range]]:
        """The fp8 kernel's (requests, new tokens each), and the requests upconverted together."""
        if self.spec.shape.num_heads < MIN_HEADS_TO_UPCONVERT:
            return (1, common.num_actual_tokens), []
        threshold = self.reorder_batch_threshold or 1
        num_decodes = count_decodes(query_lens, threshold, QueryLenSupport.UNIFORM)
        seq_lens: list[int] = host_seq_lens(common).tolist()
        chunks: list[range] = []
        first = num_decodes
        while first < len(seq_lens):
            last, total = first + 1, seq_lens[first]
            while last < len(seq_lens) and total + seq_lens[last] <= WORKSPACE_TOKENS:
                total += seq_lens[last]
                last += 1
            chunks.append(range(first, last))
            first = last
        return (num_decodes, query_lens[0] if num_decodes else 0), chunks

    def _slots(self, common: CommonAttentionMetadata, requests: range) -> torch.Tensor:
        """(rows,) int32: cache slot of every token of `requests`, one request after the other."""
        lengths: list[int] = host_seq_lens(common).tolist()[requests.start : requests.stop]
        request = _repeat(requests, lengths).to(self.device)
        position = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        size = self.spec.block_size
        blocks = common.block_table_tensor[request.long(), position // size]
        return (blocks * size + position % size).to(torch.int32)


def _repeat(values: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    return torch.repeat_interleave(
        torch.tensor(values, dtype=torch.int32), torch.tensor(counts, dtype=torch.int64)
    )


def _padded_width(indices: torch.Tensor) -> int:
    return -(-indices.shape[1] // TOPK_MULTIPLE) * TOPK_MULTIPLE


def _place(
    common: CommonAttentionMetadata, query_lens: Sequence[int], chunks: Sequence[range]
) -> tuple[torch.Tensor, int]:
    """`SparseDecode.workspace_start`, and the rows of the longest chunk."""
    seq_lens: list[int] = host_seq_lens(common).tolist()
    starts, most = [-1] * len(query_lens), 0
    for chunk in chunks:
        row = 0
        for request in chunk:
            starts[request] = row
            row += seq_lens[request]
        most = max(most, row)
    return _repeat(starts, query_lens), most


class FlashMLASparseImpl(LibraryMLAImpl[SparseDecode]):
    backend: ClassVar[str] = NAME

    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.kv_cache_dtype != DS_MLA:
            super().do_kv_cache_update(layer, kv_c_normed, k_pe, kv_cache, slot_mapping)
            return
        # Here, so that the class, which the selector asks, needs no triton.
        from attnbench.backends import triton_sparse_launch

        triton_sparse_launch.write_ds_mla_launch(kv_c_normed, k_pe, kv_cache, slot_mapping).run()

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[SparseDecode],
        output: torch.Tensor,
    ) -> torch.Tensor:
        from attnbench.backends import triton_sparse_launch

        step = self.decode_of(attn_metadata)
        triton_sparse_launch.topk_slots_launch(
            step.slots,
            step.topk_indices,
            step.request_of_token,
            step.block_table,
            kv_cache.shape[1],
            step.workspace_start,
        ).run()
        if self.kv_cache_dtype != DS_MLA:
            return self._prefill_kernel(q, kv_cache.flatten(0, 1), step.slots, output)
        parts = []
        num_tokens = step.fp8_batch[0] * step.fp8_batch[1]
        if num_tokens:
            decodes = slice(0, num_tokens)
            parts.append(self._fp8_kernel(q[decodes], kv_cache, step, output[decodes]))
        for chunk in step.chunks:
            assert step.workspace is not None
            rows = step.workspace[: len(chunk.slots)]
            triton_sparse_launch.read_ds_mla_launch(rows, kv_cache, chunk.slots).run()
            part = chunk.tokens
            parts.append(self._prefill_kernel(q[part], rows, step.slots[part], output[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prefill_kernel(
        self, q: torch.Tensor, latents: torch.Tensor, slots: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Attention of q (tokens, heads, 576) to rows `slots` (tokens, width) of `latents`
        (rows, 576); the LSE (tokens, heads)."""
        heads = self._padded_heads(on_blackwell=_is_blackwell(q.device))
        out, _, lse = self.functions["flash_mla_sparse_fwd"](
            q=_with_heads(q, heads),
            kv=latents.unsqueeze(1),
            indices=slots.unsqueeze(1),
            sm_scale=self.scale,
            d_v=self.kv_lora_rank,
            **self._out("flash_mla_sparse_fwd", output, heads),
        )
        return self._finish(out, lse, output)

    def _fp8_kernel(
        self, q: torch.Tensor, kv_cache: torch.Tensor, step: SparseDecode, output: torch.Tensor
    ) -> torch.Tensor:
        heads = self._padded_heads(on_blackwell=False)
        batch, tokens = step.fp8_batch
        out, lse = self.functions["flash_mla_with_kvcache"](
            q=_with_heads(q, heads).view(batch, tokens, heads, -1),
            k_cache=kv_cache.unsqueeze(-2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=self.kv_lora_rank,
            tile_scheduler_metadata=step.schedule,
            softmax_scale=self.scale,
            is_fp8_kvcache=True,
            indices=step.slots[: batch * tokens].view(batch, tokens, -1),
            **self._out(
                "flash_mla_with_kvcache", output.view(batch, tokens, *output.shape[1:]), heads
            ),
        )
        by_token = lse.transpose(1, 2).reshape(-1, heads)
        return self._finish(out.view(-1, heads, self.kv_lora_rank), by_token, output)

    def _padded_heads(self, on_blackwell: bool) -> int:
        return 64 if self.num_heads <= 64 and not on_blackwell else MAX_HEADS

    def _out(self, function: str, output: torch.Tensor, heads: int) -> dict[str, torch.Tensor]:
        """The argument that makes the library write `output`, where it has one and heads fit."""
        takes_it = "out" in self.library.functions[function] and heads == self.num_heads
        return {"out": output} if takes_it else {}

    def _finish(self, out: torch.Tensor, lse: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if out.data_ptr() != output.data_ptr():
            output.copy_(out[:, : self.num_heads])
        return lse[:, : self.num_heads]


def _with_heads(q: torch.Tensor, heads: int) -> torch.Tensor:
    """`q` (tokens, heads, width) with as many heads; what those behind hold does not matter."""
    if q.shape[1] == heads:
        return q
    padded = q.new_empty((q.shape[0], heads, q.shape[2]))
    padded[:, : q.shape[1]] = q
    return padded


def _is_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


class FlashMLASparseBackend(LibraryMLABackend, FlashMLASparse):
    """Variants: VLLM (the build in its wheel) and UPSTREAM."""

    impl_cls = FlashMLASparseImpl
    builder_cls = FlashMLASparseMetadataBuilder

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        if config.num_heads > MAX_HEADS:
            return f"{NAME} takes at most {MAX_HEADS} query heads: {config.num_heads}"
        return None
