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
from functools import cache
from typing import Any, ClassVar

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.device import Device
from attnbench.backends.dtypes import dtype_name
from attnbench.backends.flex_blocks import kernel_tile, query_block_rows
from attnbench.backends.flex_metadata import (
    FlexAttentionMetadata,
    FlexAttentionMetadataBuilder,
    marked_static,
    slot_capacity,
)
from attnbench.backends.host_compiler import compiler_works
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.backends.paged_ops import write_slots
from attnbench.workload.types import AttentionType, WorkloadFields

#: The kernel of torch's Triton template, as inductor names it; not yet seen on hardware.
_TEMPLATE = r"^triton_tem_fused_"
#: Neither after too many recompilations nor after an error of the compiler runs torch uncompiled.
_NO_FALLBACK = {"fail_on_recompile_limit_hit": True, "suppress_errors": False}


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
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return (_TEMPLATE,) if device.kind in ("cuda", "rocm") else ()

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            return (
                "torch.compile is switched off, and flex_attention would run unfused; unset "
                "TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE"
            )
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
        longest = max(request.query_len for request in requests)
        query_block = query_block_rows(longest, "cpu" if device.kind == "cpu" else "cuda")
        shape = (workload.dtype, workload.shape, workload.block_size)
        kind = (*shape, workload.attn_type, query_block)
        return f"{kind} {slot_capacity(max(rows + 1, lookups))}"

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


class FlexAttentionImpl(AttentionImpl[FlexAttentionMetadata]):
    """One compiled function per (data type, sizes, features), shared by all layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.v_head_size = self.shape.v_head_size
        if self.alibi_slopes is not None:
            self.alibi_slopes = marked_static(self.alibi_slopes.clone())

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
        with torch._dynamo.config.patch(_NO_FALLBACK), torch.no_grad():
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
        rows, keys = kernel_tile(block_mask.BLOCK_SIZE, query.shape[-1], query.element_size())
        # Not the decoding kernel, which wants a batch of one query block a request.
        options = {"BACKEND": "TRITON", "BLOCK_M": rows, "BLOCK_N": keys}
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
