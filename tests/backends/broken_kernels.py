"""A small right kernel over the paged cache, and broken ones.

`Kernel` computes in the workload's own dtype (products in float32, weights and output rounded);
each broken one overrides the one step it gets wrong.
"""

from __future__ import annotations

import torch

from attnbench.backends.batch import AttentionBatch
from attnbench.backends.dtypes import is_fp8
from attnbench.backends.kv_cache import (
    allocate_kv_cache,
    fill_context,
    key_value_views,
    write_slots,
)
from attnbench.backends.paged_reference import absorb_query
from attnbench.workload import AttentionType
from tests.backends.layouts import layout_of


class Kernel:
    """A right kernel: writes the new tokens, then reads each request's blocks."""

    def __init__(self, batch: AttentionBatch) -> None:
        self.batch = batch
        backend = layout_of(batch.workload)
        self.cache = allocate_kv_cache(backend, batch.spec, batch.num_blocks, "cpu")
        fill_context(batch, self.cache, backend)
        self.views = key_value_views(backend, batch.spec, self.cache)
        self.block_size = batch.spec.block_size
        self.k_scale = batch.layer._k_scale_float
        self.v_scale = batch.layer._v_scale_float

    def slot_mapping(self) -> torch.Tensor:
        return self.batch.metadata.slot_mapping

    def block_table(self) -> torch.Tensor:
        return self.batch.metadata.block_table_tensor.long()

    def num_keys(self, request: int) -> int:
        return self.batch.requests[request].seq_len

    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        """Which keys are seen, from query position minus key position."""
        window = self.batch.shape.sliding_window or 1 << 30
        if self.batch.attn_type is AttentionType.DECODER:
            return (distance >= 0) & (distance < window)
        return distance.abs() < window

    def source(self, request: int) -> int:
        """Whose keys a request reads."""
        return request

    def run(self, output: torch.Tensor) -> None:
        self.lse = torch.full(output.shape[:2], torch.nan)
        write_slots(self.views[0], self.batch.key, self.slot_mapping(), self.k_scale)
        write_slots(self.views[1], self.batch.value, self.slot_mapping(), self.v_scale)
        for request in range(len(self.batch.requests)):
            start, end = self.batch.query_range(request)
            output[start:end] = self.attend(request, self.batch.query[start:end].float())
            self.lse[start:end] = self.lse_of_last

    def attend(self, request: int, query: torch.Tensor) -> torch.Tensor:
        shape, dtype = self.batch.shape, self.batch.spec.dtype
        group = shape.num_heads // shape.num_kv_heads
        source = self.source(request)
        positions = torch.arange(self.num_keys(source))
        blocks = self.block_table()[source][positions // self.block_size]
        key, value = (
            view[blocks, positions % self.block_size].float() * scale
            for view, scale in zip(self.views, (self.k_scale, self.v_scale), strict=True)
        )
        if shape.is_mla:
            query = absorb_query(self.batch, query.double()).to(dtype).float()
            key, value = torch.cat([key, value[:, 0]], dim=-1)[:, None], key[:, None]
        seq_len = self.batch.requests[request].seq_len
        own = torch.arange(seq_len - len(query), seq_len)
        hidden = ~self.visible(own[:, None] - positions[None, :])
        logits = torch.einsum("thd,khd->thk", query, key.repeat_interleave(group, 1))
        logits = (logits * shape.scale).masked_fill(hidden[:, None], float("-inf"))
        highest = logits.amax(-1, keepdim=True)
        weights = torch.exp(logits - highest)
        total = weights.sum(-1, keepdim=True)
        self.lse_of_last = (total.log() + highest)[..., 0]
        value = value.repeat_interleave(group, 1)
        output = torch.einsum("thk,khd->thd", weights.to(dtype).float(), value) / total
        if shape.is_mla:
            up = self.batch.layer.W_UV.float()
            output = torch.einsum("thl,hlv->thv", output.to(dtype).float(), up)
        return output


class RoundsTheScaledQuery(Kernel):
    """Right as well, and as coarse as kernels are: an fp8 cache meets an fp8 query."""

    def attend(self, request: int, query: torch.Tensor) -> torch.Tensor:
        scale = self.batch.shape.scale
        query = (query * scale).to(self.batch.spec.dtype).float()
        if is_fp8(self.views[0].dtype) and not self.batch.shape.is_mla:
            step = query.abs().max() / 448  # the largest number of e4m3
            query = (query / step).to(torch.float8_e4m3fn).float() * step
        return super().attend(request, query / scale)


class IgnoresTheBlockTable(Kernel):
    def block_table(self) -> torch.Tensor:
        table = super().block_table()
        return torch.arange(table.numel()).view(table.shape) % self.batch.num_blocks


class IgnoresTheBlockTableOfOne(Kernel):
    """Right for the first request, then takes the next blocks in order."""

    def block_table(self) -> torch.Tensor:
        table = super().block_table()
        table[1:, 1:] = table[1:, :1] + torch.arange(1, table.shape[1])
        return table.clamp_max(self.batch.num_blocks - 1)


class SeesOneTooMany(Kernel):
    """Also sees the next token; for a decode the slot behind the end of its sequence."""

    def num_keys(self, request: int) -> int:
        limit = self.block_table().shape[1] * self.block_size
        return min(self.batch.requests[request].seq_len + 1, limit)

    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        return super().visible(distance) | (distance == -1)


class SeesOneTooFew(Kernel):
    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        return super().visible(distance) & (distance != 0) | (distance == distance.max())


class CausalFromTheTopLeft(Kernel):
    """Aligns the mask with the first key, not the last (flash-attention before 2.1)."""

    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        return super().visible(distance - distance.min() - distance.shape[1] + 1)


class WindowTooWide(Kernel):
    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        return super().visible(distance) | (distance == self.batch.shape.sliding_window)


class WindowTooNarrow(Kernel):
    def visible(self, distance: torch.Tensor) -> torch.Tensor:
        return super().visible(distance) & (distance != self.batch.shape.sliding_window - 1)


class WritesToTheWrongSlot(Kernel):
    def slot_mapping(self) -> torch.Tensor:
        slots = super().slot_mapping().clone()
        slots[-1] += 1 if slots[-1] % self.block_size == 0 else -1
        return slots


class WritesNothing(Kernel):
    def slot_mapping(self) -> torch.Tensor:
        return torch.full_like(super().slot_mapping(), -1)


class IgnoresKScale(Kernel):
    def attend(self, request: int, query: torch.Tensor) -> torch.Tensor:
        return super().attend(request, query / self.batch.layer._k_scale_float)


class IgnoresVScale(Kernel):
    def attend(self, request: int, query: torch.Tensor) -> torch.Tensor:
        return super().attend(request, query) / self.batch.layer._v_scale_float


class SwapsTwoRequests(Kernel):
    def source(self, request: int) -> int:
        return {0: 1, 1: 0}.get(request, request)


class ForgetsTheLastBlock(Kernel):
    """Works on whole blocks only."""

    def num_keys(self, request: int) -> int:
        seq_len = self.batch.requests[request].seq_len
        return max(1, seq_len // self.block_size * self.block_size)


class ForgetsTheLastHead(Kernel):
    def run(self, output: torch.Tensor) -> None:
        last = output[:, -1].clone()
        super().run(output)
        output[:, -1] = last


class IsOneTokenStale(Kernel):
    """Returns the previous step's output for one request."""

    def run(self, output: torch.Tensor) -> None:
        super().run(output)
        output[-1] = self.attend(0, self.batch.query[:1].float())[0]


class DoesNothing(Kernel):
    def run(self, output: torch.Tensor) -> None:
        return
