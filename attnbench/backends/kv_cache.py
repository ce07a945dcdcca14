"""Paged KV caches: allocation in a backend's own layout, filling, and reading back.

A backend says the logical shape (`get_kv_cache_shape`) and the order in which it lies in memory
(`get_kv_cache_stride_order`); the cache is the logical view over that memory. Which logical
dimension is which is found by asking for the shape twice with one number changed, so that
`(2, blocks, block_size, heads, size)`, `(blocks, 2, ...)` or heads before slots all work.

What a slot holds before a backend writes to it:

- the context: its K and V, divided by the layer's scales in an fp8 cache;
- slots that no request may read and no block table leads to, and slots that the new tokens will be
  written to: NaN. Reading one, or forgetting to write one, ends in a NaN output;
- slots that a block table leads to but a mask must hide (the rest of a last block, and the null
  block that pads the table): an engine keeps something finite there, and a kernel may multiply it
  by a weight of zero. The first slot behind a sequence holds the token that would come next, which
  attracts the queries (see `queries.py`); the rest holds a large number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.batch import AttentionBatch, flat_positions
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.ds_mla import (
    DS_MLA,
    LATENT,
    ROPE,
    ROW_BYTES,
    dequantize_rows,
    quantize_rows,
)
from attnbench.backends.dtypes import movable, torch_dtype
from attnbench.backends.paging import NULL_BLOCK
from attnbench.errors import WorkloadError
from attnbench.workload.types import AttentionShape, AttentionType

#: Stored in slots that a mask must hide; exact in every format, far outside the data.
HIDDEN_POISON = 64.0
_CHUNK_TOKENS = 4096
#: A device wants fewer and larger steps: each is some thirty launches.
_DEVICE_FACTOR = 16


class _Axes(NamedTuple):
    """Logical dimensions of a KV cache; `pair` (key, value) and `head` are None for MLA."""

    pair: int | None
    block: int
    slot: int
    head: int | None
    size: int


def cache_head_size(shape: AttentionShape) -> int:
    """Width of one stored row: where K and V differ, both get the wider one's room."""
    return shape.head_size if shape.is_mla else max(shape.head_size, shape.v_head_size)


def kv_cache_shape(
    backend: type[AttentionBackend], spec: KVCacheSpec, num_blocks: int
) -> tuple[int, ...]:
    """Logical shape of the cache of `num_blocks` blocks."""
    return backend.get_kv_cache_shape(
        num_blocks,
        spec.block_size,
        spec.shape.num_kv_heads,
        cache_head_size(spec.shape),
        spec.kv_cache_dtype,
    )


def allocate_kv_cache(
    backend: type[AttentionBackend],
    spec: KVCacheSpec,
    num_blocks: int,
    device: torch.device | str,
) -> torch.Tensor:
    """An empty cache: logical shape of the backend over memory in its stride order.

    The tensor's dtype is the cache's own (`torch.float8_e4m3fn` for fp8_e4m3).

    Raises:
        WorkloadError: the backend's shape or stride order makes no sense.
    """
    shape = kv_cache_shape(backend, spec, num_blocks)
    _axes(backend, spec)
    try:
        order = backend.get_kv_cache_stride_order(kv_cache_layout=spec.kv_cache_layout)
    except NotImplementedError:
        order = tuple(range(len(shape)))
    if sorted(order) != list(range(len(shape))):
        raise WorkloadError(
            f"{backend.get_name()}: stride order {order} is no permutation of the {len(shape)} "
            f"dimensions of its cache {shape}; mend get_kv_cache_stride_order"
        )
    memory = torch.empty(
        [shape[i] for i in order], dtype=torch_dtype(spec.kv_cache_dtype), device=device
    )
    inverse = [order.index(i) for i in range(len(shape))]
    return memory.permute(inverse)


def key_value_views(
    backend: type[AttentionBackend], spec: KVCacheSpec, kv_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the cache in one form whatever the backend's: `(num_blocks, block_size, ...)`.

    Key cache `(..., num_kv_heads, head_size)`, value cache `(..., num_kv_heads, v_head_size)`;
    MLA: latents `(..., kv_lora_rank)` and rotary keys `(..., 1, qk_rope_head_dim)`.
    """
    axes, shape = _axes(backend, spec), spec.shape
    if axes.pair is None or axes.head is None:
        latent = kv_cache.permute(axes.block, axes.slot, axes.size)
        return latent[..., : shape.kv_lora_rank], latent[..., None, shape.kv_lora_rank :]
    both = kv_cache.permute(axes.pair, axes.block, axes.slot, axes.head, axes.size)
    return both[0][..., : shape.head_size], both[1][..., : shape.v_head_size]


def stored_planes(
    backend: type[AttentionBackend], spec: KVCacheSpec, kv_cache: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What a token's row is written to: `key_value_views`, or the one plane (num_blocks,
    block_size, 656) of an `fp8_ds_mla` cache, whose row has parts of three types."""
    if spec.kv_cache_dtype != DS_MLA:
        return key_value_views(backend, spec, kv_cache)
    axes = _axes(backend, spec)
    return (kv_cache.permute(axes.block, axes.slot, axes.size),)


def fill_context(
    batch: AttentionBatch, kv_cache: torch.Tensor, backend: type[AttentionBackend]
) -> None:
    """Put the context of `batch` into `kv_cache` and poison everything else (see the module).

    Written through the logical view, not through the backend's own code.
    """
    movable(kv_cache).copy_(_constant(kv_cache, float("nan")))
    caches = stored_planes(backend, batch.spec, kv_cache)
    for cache in caches:
        movable(cache)[NULL_BLOCK] = _constant(cache, HIDDEN_POISON)
    if batch.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        return
    block_size = batch.spec.block_size
    seq_lens = [r.seq_len for r in batch.requests]
    behind = [(n, -(-n // block_size) * block_size) for n in seq_lens]
    block, offset = _split(request_slots(batch, *flat_positions(behind, batch.device)), block_size)
    for cache in caches:
        movable(cache)[block, offset] = _constant(cache, HIDDEN_POISON)
    next_ones = [(first, min(first + 1, last)) for first, last in behind]
    _write(batch, caches, *flat_positions(next_ones, batch.device))
    context = [(0, batch.num_computed(request)) for request in range(len(seq_lens))]
    requests, positions = flat_positions(context, batch.device)
    size = _CHUNK_TOKENS * (1 if batch.device.type == "cpu" else _DEVICE_FACTOR)
    for start in range(0, len(requests), size):
        _write(batch, caches, requests[start : start + size], positions[start : start + size])


def fill_fresh_blocks(
    backend: type[AttentionBackend], spec: KVCacheSpec, kv_cache: torch.Tensor, blocks: torch.Tensor
) -> None:
    """Make `blocks` what a block table may lead to before their tokens are written: finite, far
    outside the data."""
    for cache in stored_planes(backend, spec, kv_cache):
        movable(cache)[blocks] = _constant(cache, HIDDEN_POISON)


def write_new_tokens(
    batch: AttentionBatch, kv_cache: torch.Tensor, backend: type[AttentionBackend]
) -> None:
    """What a right `do_kv_cache_update` does, for caches that no backend writes to (tests)."""
    slots = batch.metadata.slot_mapping
    keep = slots >= 0
    planes = stored_planes(backend, batch.spec, kv_cache)
    _store_tokens(batch, planes, batch.key[keep], batch.value[keep], slots[keep])


def write_slots(
    cache: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor, scale: float
) -> None:
    """Store `values / scale` (num_tokens, ...) in their slots; negative slots are skipped."""
    keep = slot_mapping >= 0
    _store(cache, values[keep], slot_mapping[keep], scale)


def _store(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, scale: float) -> None:
    if scale != 1.0:
        values = values.float() / scale
    block, offset = _split(slots, cache.shape[1])
    movable(cache)[block, offset] = movable(values.to(cache.dtype))


def read_slots(cache: torch.Tensor, slots: torch.Tensor, scale: float) -> torch.Tensor:
    """Real values of slots, `stored * scale`, in float64."""
    block, offset = _split(slots, cache.shape[1])
    stored = movable(cache)[block, offset].view(cache.dtype)
    return stored.to(torch.float64) * scale


def request_slots(
    batch: AttentionBatch, request: int | torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Slot of each position of one request, or of one each, by the batch's block table."""
    block_size = batch.spec.block_size
    blocks = batch.metadata.block_table_tensor[request, positions // block_size]
    return blocks.to(torch.int64) * block_size + positions % block_size


def _write(
    batch: AttentionBatch,
    caches: tuple[torch.Tensor, ...],
    requests: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    slots = request_slots(batch, requests, positions)
    ids = batch.tokens.ids(requests, positions)
    key, value = batch.tokens.key_pool.take(ids), batch.tokens.value_pool.take(ids)
    _store_tokens(batch, caches, key, value, slots)


def _store_tokens(
    batch: AttentionBatch,
    planes: tuple[torch.Tensor, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Store K and V (MLA: latents and rotary keys) of tokens in their slots."""
    if batch.spec.kv_cache_dtype == DS_MLA:
        _store(planes[0], quantize_rows(key, value.flatten(1)), slots, 1.0)
        return
    _store(planes[0], key, slots, batch.layer._k_scale_float)
    _store(planes[1], value, slots, batch.layer._v_scale_float)


def read_tokens(
    batch: AttentionBatch, planes: tuple[torch.Tensor, ...], slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (MLA: latents and rotary keys) in slots of `stored_planes`, real values, float64."""
    if batch.spec.kv_cache_dtype == DS_MLA:
        block, offset = _split(slots, planes[0].shape[1])
        both = dequantize_rows(planes[0][block, offset], torch.float64)
        return both[..., : batch.shape.kv_lora_rank], both[..., None, batch.shape.kv_lora_rank :]
    scales = batch.layer._k_scale_float, batch.layer._v_scale_float
    return read_slots(planes[0], slots, scales[0]), read_slots(planes[1], slots, scales[1])


def _split(slots: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // block_size, slots % block_size


def _constant(cache: torch.Tensor, value: float) -> torch.Tensor:
    """`value` as the cache stores it, in a form that can be copied on every device."""
    if cache.dtype is torch.uint8:
        if math.isnan(value):
            return torch.full((1,), 0xFF, dtype=torch.uint8, device=cache.device)  # in all parts
        return quantize_rows(torch.full((1, LATENT), value), torch.full((1, ROPE), value)).to(
            cache.device
        )
    return movable(torch.tensor([value]).to(cache.dtype)).to(cache.device)


def _axes(backend: type[AttentionBackend], spec: KVCacheSpec) -> _Axes:
    """Which logical dimension is which, from how the shape follows its arguments."""
    heads, size = spec.shape.num_kv_heads, cache_head_size(spec.shape)

    def shape(blocks: int, block_size: int, num_heads: int, head_size: int) -> tuple[int, ...]:
        return backend.get_kv_cache_shape(
            blocks, block_size, num_heads, head_size, spec.kv_cache_dtype
        )

    base = shape(5, spec.block_size, heads, size)

    def changed(other: tuple[int, ...]) -> int:
        moved = [i for i, (a, b) in enumerate(zip(base, other, strict=True)) if a != b]
        return moved[0] if len(moved) == 1 else -1

    block = changed(shape(7, spec.block_size, heads, size))
    slot = changed(shape(5, 2 * spec.block_size, heads, size))
    width = changed(shape(5, spec.block_size, heads, 2 * size))
    if spec.kv_cache_dtype == DS_MLA and base[-1] == ROW_BYTES:
        width = len(base) - 1  # the same for every head size
    if spec.shape.is_mla:
        if len(base) == 3 and {block, slot, width} == {0, 1, 2}:
            return _Axes(None, block, slot, None, width)
    elif len(base) == 5:
        head = changed(shape(5, spec.block_size, heads + 1, size))
        rest = set(range(5)) - {block, slot, head, width}
        if len(rest) == 1 and -1 not in (block, slot, head, width) and base[min(rest)] == 2:
            return _Axes(min(rest), block, slot, head, width)
    raise WorkloadError(
        f"{backend.get_name()}: KV cache shape {base} is neither (2, num_blocks, block_size, "
        "num_kv_heads, head_size) in some order nor (num_blocks, block_size, head_size) for MLA; "
        "mend get_kv_cache_shape"
    )
