"""FLEX_ATTENTION: compiled `flex_attention` straight over the paged cache.

The cache is seen as one long row of physical slots; which slots a query sees is a mask over
physical slots, and a block mask made from the block table says which pages are read at all. So no
page is copied, and pages may lie anywhere. Both are made in `build`, once per step.

Compiled with `dynamic=True, fullgraph=True`. torch gives up compiling one piece of code after 8
recompilations and then runs an unfused path, right but tens of times slower: here that is an
exception, never a time. What cannot be dynamic (data type, head size, page size, features) has a
compiled function of its own, so that a long sweep does not use up one limit.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import AttentionMetadataBuilder
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.device import Device
from attnbench.backends.dtypes import dtype_name
from attnbench.backends.flex_blocks import block_lists, visible_pages
from attnbench.backends.host_compiler import compiler_works
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_ops import write_slots
from attnbench.workload.types import AttentionType, WorkloadFields

#: Query rows of one block of the mask; a batch of single-token decodes has one row per block on
#: the CPU, where a block of several requests would compute all their keys for each of them.
_QUERY_BLOCK = 32
#: The smallest tile `tl.dot` takes.
_MIN_GPU_TILE = 16
_MIN_CAPACITY = 1 << 12


class FlexAttentionBackend(PairedCacheBackend):
    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = ("auto", "fp32", "fp16", "bf16")

    @staticmethod
    def get_name() -> str:
        return "FLEX_ATTENTION"

    @staticmethod
    def get_impl_cls() -> type[FlexAttentionImpl]:
        return FlexAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlexAttentionMetadataBuilder]:
        return FlexAttentionMetadataBuilder

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if device.kind != "cpu" or compiler_works(compiler):
            return None
        return (
            f"torch.compile needs a C++ compiler on the CPU and {compiler!r} does not work; "
            "install one (apt-get install g++) or name it in CXX"
        )

    @classmethod
    def compilation_key(cls, workload: WorkloadFields, variant: str, device: Device) -> str:
        requests = workload.batch_spec.requests
        blocks = sum(-(-request.seq_len // workload.block_size) for request in requests)
        rows = sum(request.query_len for request in requests)
        lookups = len(requests) * (blocks + max(5, blocks // 16))
        is_decode = max(request.query_len for request in requests) == 1
        kind = (workload.dtype, workload.shape, workload.block_size, workload.attn_type, is_decode)
        return f"{kind} {_capacity(max(rows + 1, lookups))}"

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        return tuple(range(6 if include_num_layers_dimension else 5))

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        """Slots must have one stride: only NHD is a row of slots."""
        return "NHD"

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in ("cpu", "cuda", "rocm")

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        if config.kv_cache_dtype not in ("auto", dtype_name(config.dtype)):
            return "the KV cache must have the query's dtype"
        if device.kind != "cpu" and config.block_size is not None and config.block_size % 16:
            # A page is one tile of tl.dot there, which takes 16 at least.
            return "block_size must be a multiple of 16 on this device"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexAttentionMetadata:
    """block_mask: over (num_tokens, physical slots of the first `num_blocks` blocks).

    slots: what the mask and the score functions look positions up in.
    """

    block_mask: BlockMask
    slots: SlotTable
    num_blocks: int
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTable:
    """From query rows and physical slots to positions, for the mask and the score functions.

    All are (capacity,) int32 and static: torch's CPU template (2.13) makes C++ that does not
    compile when a captured tensor has a symbolic size (it replaces `ks3` inside `ks31`), so the
    capacity is one of a few powers of two and part of what is compiled for. Numbers captured as
    text are constants for the compiler; captured as numbers they would be symbolic too.

    limit, position: of a query row: keys of its request, its position.
    row_start: of a query row: where its request's part of `logical_block` begins.
    logical_block: at `row_start + physical block`: its place in the request, -1 if not its own.
    """

    limit: torch.Tensor
    position: torch.Tensor
    row_start: torch.Tensor
    logical_block: torch.Tensor
    block_size: int

    @classmethod
    def make(
        cls,
        limit: torch.Tensor,
        position: torch.Tensor,
        row_start: torch.Tensor,
        logical_block: torch.Tensor,
        block_size: int,
        device: torch.device,
    ) -> SlotTable:
        capacity = _capacity(max(len(limit) + 1, len(logical_block)))

        def static(x: torch.Tensor) -> torch.Tensor:
            table = torch.zeros(capacity, dtype=torch.int32)
            table[: len(x)] = x
            return _static(table.to(device))

        return cls(
            limit=static(limit),
            position=static(position),
            row_start=static(row_start),
            logical_block=static(logical_block),
            block_size=block_size,
        )

    def mask_mod(self, causal: bool, window: int) -> Callable[..., torch.Tensor]:
        """flex_attention's `mask_mod`: whether query row `q` sees slot `kv`."""
        limit, position, row_start = self.limit, self.position, self.row_start
        logical_block, size_text, window_text = (
            self.logical_block,
            str(self.block_size),
            str(window),
        )

        def visible(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
        ) -> torch.Tensor:
            size, reach = int(size_text), int(window_text)
            block = logical_block[row_start[q] + kv // size]
            key = block * size + kv % size
            seen = (block >= 0) & (key < limit[q])
            distance = position[q] - key
            if causal:
                seen = seen & (distance >= 0)
            if reach:
                seen = seen & (distance < reach) & (distance > -reach)
            return seen

        return visible

    def score_mod(
        self, soft_cap: float, slopes: torch.Tensor | None
    ) -> Callable[..., torch.Tensor] | None:
        """flex_attention's `score_mod`: soft cap, then ALiBi."""
        if not soft_cap and slopes is None:
            return None
        position, row_start, logical_block = self.position, self.row_start, self.logical_block
        size_text, cap_text = str(self.block_size), str(soft_cap)

        def modified(
            score: torch.Tensor,
            b: torch.Tensor,
            h: torch.Tensor,
            q: torch.Tensor,
            kv: torch.Tensor,
        ) -> torch.Tensor:
            size, cap = int(size_text), float(cap_text)
            if cap:
                score = cap * torch.tanh(score / cap)
            if slopes is not None:
                key = logical_block[row_start[q] + kv // size] * size + kv % size
                score = score - slopes[h] * (position[q] - key).abs()
            return score

        return modified


def _capacity(needed: int) -> int:
    """The smallest size of a slot table that is compiled for and holds `needed` entries."""
    capacity = _MIN_CAPACITY
    while capacity < needed:
        capacity *= 16
    return capacity


def _static(x: torch.Tensor) -> torch.Tensor:
    """`x`, marked so that `dynamic=True` leaves its sizes alone."""
    torch._dynamo.mark_static(x)
    return x


class FlexAttentionMetadataBuilder(AttentionMetadataBuilder[FlexAttentionMetadata]):
    """Makes the block mask. Its size is (query blocks) x (physical blocks of the cache)."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlexAttentionMetadata:
        """`common_prefix_len` changes nothing: shared pages are read per query block anyway."""
        common, block_size = common_attn_metadata, self.spec.block_size
        window = self.spec.shape.sliding_window
        starts = common.query_start_loc_cpu[:-1].long()
        query_lens = common.query_start_loc_cpu.diff().long()
        cpu_lens = common.seq_lens_cpu
        seq_lens = (cpu_lens if cpu_lens is not None else common.seq_lens.cpu()).long()
        table = common.block_table_tensor.cpu().long()
        request = torch.repeat_interleave(torch.arange(common.num_reqs), query_lens)
        row = torch.arange(common.num_actual_tokens)
        position = row - (starts + query_lens - seq_lens)[request]
        # Blocks behind the last one anybody owns are no business of this step.
        owned = torch.arange(table.shape[1]) < -(-seq_lens // block_size)[:, None]
        num_blocks = max(2, int(table[owned].max()) + 1)
        logical = torch.full((common.num_reqs, num_blocks), -1)
        owner, column = owned.nonzero(as_tuple=True)
        logical[owner, table[owner, column]] = column
        slots = SlotTable.make(
            seq_lens[request],
            position,
            request * num_blocks,
            logical.flatten(),
            block_size,
            self.device,
        )
        query_block = self._query_block(common.max_query_len)
        pages = visible_pages(
            starts, query_lens, seq_lens, query_block, block_size, common.causal, window
        )
        partial, full = block_lists(pages, table, -(-len(row) // query_block), num_blocks)
        block_mask = BlockMask.from_kv_blocks(
            self._dynamic(partial[0]),
            self._dynamic(partial[1]),
            self._dynamic(full[0]),
            self._dynamic(full[1]),
            BLOCK_SIZE=(query_block, block_size),
            mask_mod=slots.mask_mod(common.causal, window),
            seq_lengths=(max(2, len(row)), num_blocks * block_size),
            compute_q_blocks=False,
        )
        return FlexAttentionMetadata(
            block_mask=block_mask, slots=slots, num_blocks=num_blocks, causal=common.causal
        )

    def _query_block(self, max_query_len: int) -> int:
        if max_query_len > 1:
            return _QUERY_BLOCK
        return 1 if self.device.type == "cpu" else _MIN_GPU_TILE

    def _dynamic(self, x: torch.Tensor) -> torch.Tensor:
        """(1, 1, query blocks, ...) on the device; 2 at least: a size of 1 is never dynamic."""
        if len(x) == 1:
            x = torch.cat([x, torch.zeros_like(x)])
        return x.to(self.device, torch.int32)[None, None]


class FlexAttentionImpl(AttentionImpl[FlexAttentionMetadata]):
    """One compiled function per (data type, sizes, features), shared by all layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.v_head_size = self.shape.v_head_size
        if self.alibi_slopes is not None:
            self.alibi_slopes = _static(self.alibi_slopes.clone())

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        write_slots(kv_cache[0], key, slot_mapping)
        write_slots(kv_cache[1], value, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlexAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raises torch's `FailOnRecompileLimitHit` rather than run without compiling."""
        meta = attn_metadata
        rows = query if len(query) > 1 else query.repeat(2, 1, 1)
        # Detached: torch would also guard on the sizes of the tensor a view was made of.
        keys, values = (
            kv_cache[i, : meta.num_blocks].flatten(0, 1)[..., :size].transpose(0, 1)[None].detach()
            for i, size in ((0, self.head_size), (1, self.v_head_size))
        )
        run = _compiled(
            query.device.type,
            query.dtype,
            self.shape,
            meta.block_mask.BLOCK_SIZE,
            meta.causal,
            len(meta.slots.limit),
        )
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
            out = run(
                rows.transpose(0, 1)[None],
                keys,
                values,
                meta.slots.score_mod(self.logits_soft_cap, self.alibi_slopes),
                meta.block_mask,
                self.scale,
            )
        output.copy_(out[0, :, : len(query)].transpose(0, 1))
        return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None,
    block_mask: BlockMask,
    scale: float,
) -> torch.Tensor:
    options: Any = None
    if query.device.type != "cpu":
        options = {
            "FORCE_USE_FLEX_ATTENTION": True,
            "BLOCK_M": _MIN_GPU_TILE,
            "BLOCK_N": _MIN_GPU_TILE,
        }
    result = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=options,
    )
    assert isinstance(result, torch.Tensor)
    return result


@cache
def _compiled(*key: Any) -> Callable[..., torch.Tensor]:
    """The compiled function for one set of values that cannot be dynamic.

    torch counts recompilations per code object, so each function gets a copy of the code.
    """
    code = _attend.__code__.replace(co_name=f"flex_{_compiled.cache_info().currsize}")
    function = types.FunctionType(code, _attend.__globals__, code.co_name)
    compiled: Callable[..., torch.Tensor] = torch.compile(function, dynamic=True, fullgraph=True)
    return compiled
