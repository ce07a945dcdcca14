"""How our Triton kernels are launched: tile shapes, tile groups, and each launch as a value.

A `Launch` holds everything a kernel is called with. Running it and compiling it ahead of time
(`triton_aot.py`) read the same value, so the two cannot drift apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from attnbench.backends.device import Device, cuda_device
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.triton_kernels.cache import write_kv_kernel

#: Most segments a context is split into.
MAX_SEGMENTS = 64
#: A segment of fewer keys, or two tiles where that is less, costs more to merge than it saves.
MIN_KEYS_PER_SEGMENT = 64
#: Programs that keep one multiprocessor busy while loads are in flight.
PROGRAMS_PER_SM = 2
#: Multiprocessors assumed under the interpreter: few, so that contexts are split there too.
INTERPRETED_SMS = 4

# Shared memory one program may use, in bytes: CUDA C++ Programming Guide, technical
# specifications per compute capability (1 KiB of each block is the driver's); gfx942: 64 KiB of
# LDS a work-group, CDNA3 ISA.
_SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448}
_SHARED_LIMITS |= {100: 232448, 103: 232448, 110: 232448, 120: 101376, 121: 101376}


def shared_memory_limit(device: Device) -> int:
    """Bytes of shared memory one program may use; an unlisted device: 48 KiB, which all have."""
    if device.capability is not None:
        return _SHARED_LIMITS.get(device.capability.major * 10 + device.capability.minor, 49152)
    return 163840 if device.arch.startswith("gfx95") else 65536


def has_tensor_cores(device: Device) -> bool:
    """Whether Triton uses them: below compute capability 8.0 it multiplies in fp32 registers."""
    return device.capability is None or device.capability >= (8, 0)


def has_warp_group_products(device: Device) -> bool:
    """Whether `tl.dot` reads both operands from shared memory (wgmma, tcgen05)."""
    return device.capability is not None and device.capability.major in (9, 10)


def is_hopper(device: Device) -> bool:
    """Whether products are wgmma, with accumulators in registers."""
    return device.capability is not None and device.capability.major == 9


def is_interpreted() -> bool:
    """Whether the kernels were decorated under `TRITON_INTERPRET=1`."""
    return not isinstance(write_kv_kernel, triton.runtime.JITFunction)


def kernel_patterns_of(*kernels: Any) -> tuple[str, ...]:
    """For `AttentionBackend.kernel_patterns`: a compiled kernel has its function's name."""
    return tuple(rf"^{kernel.__name__}\b" for kernel in kernels)


@functools.lru_cache
def launch_device(device: torch.device) -> Device:
    """The device a launch is tuned for."""
    if device.type != "cuda":
        return Device("cpu")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("rocm", properties.gcnArchName.split(":")[0])
    return cuda_device(properties.major, properties.minor)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of `device`."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows of queries and keys one program works on, and how it is compiled."""

    block_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    """Key tiles in work at once: one computed, the others being loaded; 1: no pipeline."""

    def pipeline_stages(self, paged: bool) -> int:
        """Triton's `num_stages`. Through a block table a load waits for a load: Triton spreads its
        stages over both, so that each further tile in flight takes two."""
        return 2 * self.num_stages - 1 if paged else self.num_stages


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch. `arguments` holds every parameter, constexprs included."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Launch it (nothing to do for an empty grid)."""
        if 0 not in self.grid:
            self.kernel[self.grid](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGroup:
    """The query tiles of one launch, and the scratch its segments need.

    A tile is `block_q` tokens of one request times `heads_per_tile` query heads of one KV head.
    """

    shape: TileShape
    heads_per_tile: int
    block_q: int
    num_tiles: int
    num_reqs: int
    tiles_per_request: int
    """Tiles of each request; read only where there is no map."""
    tile_map: torch.Tensor | None
    """(2, num_tiles) int32: request, first token; None when all requests have as many tiles."""
    num_segments: int
    partial_acc: torch.Tensor | None = None
    """(num_tiles * block_q, num_heads, num_segments, v_head_size) float32."""
    partial_stats: torch.Tensor | None = None
    """(2, num_tiles * block_q, num_heads, num_segments) float32: max, denominator."""

    def location_arguments(self) -> dict[str, Any]:
        """Kernel parameters that say which request and token a tile is."""
        tile_map = self.tile_map
        return {
            "tile_request_ptr": None if tile_map is None else tile_map[0],
            "tile_start_ptr": None if tile_map is None else tile_map[1],
            "num_reqs": self.num_reqs,
            "tiles_per_request": self.tiles_per_request,
        }

    def partial_arguments(self) -> dict[str, Any]:
        """Kernel parameters of the scratch for segments."""
        stats = self.partial_stats
        return {
            "partial_acc_ptr": self.partial_acc,
            "partial_max_ptr": None if stats is None else stats[0],
            "partial_sum_ptr": None if stats is None else stats[1],
        }


def next_power_of_two(n: int, at_least: int = 16) -> int:
    """The smallest power of two that is `n` or more (tl.dot wants 16)."""
    return max(at_least, 1 << (n - 1).bit_length())


def choose_num_segments(num_programs: int, num_keys: int, tile_n: int, num_sms: int) -> int:
    """How many segments the longest context is split into: enough to fill the device, a power of
    two so that few variants of the merge kernel exist."""
    if num_programs == 0:
        return 1
    wanted = (num_sms * PROGRAMS_PER_SM) // num_programs
    least_keys = max(tile_n, min(2 * tile_n, MIN_KEYS_PER_SEGMENT))
    segments = min(wanted, -(-num_keys // tile_n) * tile_n // least_keys, MAX_SEGMENTS)
    return 1 << (max(segments, 1).bit_length() - 1)


def build_tile_group(
    requests: npt.NDArray[np.int64],
    query_lens: npt.NDArray[np.int64],
    seq_lens: npt.NDArray[np.int64],
    *,
    num_heads: int,
    num_kv_heads: int,
    v_head_size: int,
    window: int,
    shape: TileShape,
    num_sms: int,
    device: torch.device,
    may_split: bool = True,
) -> TileGroup:
    """Tiles of `requests` (ascending indices into the batch), longest first.

    Args:
        query_lens, seq_lens: of these requests, in the same order.
        window: tokens a query sees; 0: all.
        num_sms: multiprocessors to fill.
        may_split: contexts may be split into segments.
    """
    group = num_heads // num_kv_heads
    heads_per_tile = min(group, shape.block_m)
    block_q = shape.block_m // heads_per_tile
    tiles = -(-query_lens // block_q)
    num_tiles = int(tiles.sum())
    tile_map = None
    first_requests = bool(requests[-1] == len(requests) - 1)  # the kernels count from request 0
    if not (first_requests and bool((tiles == tiles[0]).all())):
        first_tile = np.repeat(np.cumsum(tiles) - tiles, tiles)
        start = (np.arange(num_tiles) - first_tile) * block_q
        context = np.repeat(seq_lens - query_lens, tiles)
        order = np.argsort(-(context + start), kind="stable")
        both = np.stack([np.repeat(requests, tiles)[order], start[order]]).astype(np.int32)
        tile_map = torch.from_numpy(both).to(device, non_blocking=True)
    num_segments = 1
    if may_split:
        longest = int(seq_lens.max(initial=0))
        if window:
            longest = min(longest, window + block_q)
        head_tiles = num_kv_heads * -(-group // heads_per_tile)
        num_segments = choose_num_segments(num_tiles * head_tiles, longest, shape.tile_n, num_sms)
    partial_acc = partial_stats = None
    if num_segments > 1:
        rows = (num_tiles * block_q, num_heads, num_segments)
        partial_acc = torch.empty((*rows, v_head_size), dtype=torch.float32, device=device)
        partial_stats = torch.empty((2, *rows), dtype=torch.float32, device=device)
    return TileGroup(
        shape=shape,
        heads_per_tile=heads_per_tile,
        block_q=block_q,
        num_tiles=num_tiles,
        num_reqs=len(requests),
        tiles_per_request=int(tiles[0]),
        tile_map=tile_map,
        num_segments=num_segments,
        partial_acc=partial_acc,
        partial_stats=partial_stats,
    )


def host_lengths(
    metadata: CommonAttentionMetadata,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(new tokens, keys) of each request, on the host.

    Where the host does not know the keys it takes the longest request's for all: they order tiles
    and size segments, nothing else.
    """
    starts = metadata.query_start_loc_cpu.numpy().astype(np.int64)
    query_lens = starts[1:] - starts[:-1]
    known = metadata.encoder_seq_lens_cpu
    if known is None:
        known = metadata.seq_lens_cpu
    if known is None:
        return query_lens, np.full_like(query_lens, metadata.max_seq_len)
    return query_lens, known.numpy().astype(np.int64)


def plan_tile_groups(
    query_lens: npt.NDArray[np.int64],
    seq_lens: npt.NDArray[np.int64],
    *,
    num_heads: int,
    num_kv_heads: int,
    v_head_size: int,
    window: int,
    max_short_query_len: int,
    choose_shape: Callable[[int, bool], TileShape],
    num_sms: int,
    device: torch.device,
) -> tuple[TileGroup, ...]:
    """At most two groups: requests with few new tokens (small tiles, split contexts), and the rest.

    Args:
        max_short_query_len: most new tokens of a request of the first group.
        choose_shape: (rows of the longest request, whether it is the first group) -> tile shape.
    """
    groups = []
    for short in (True, False):
        requests = np.flatnonzero((query_lens <= max_short_query_len) == short)
        if len(requests):
            rows = max(int(query_lens[requests].max()), 1) * (num_heads // num_kv_heads)
            groups.append(
                build_tile_group(
                    requests,
                    query_lens[requests],
                    seq_lens[requests],
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    v_head_size=v_head_size,
                    window=window,
                    shape=choose_shape(rows, short),
                    num_sms=num_sms,
                    device=device,
                    may_split=short,
                )
            )
    return tuple(groups)
