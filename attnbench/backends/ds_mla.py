"""`fp8_ds_mla`: DeepSeek-V3.2's cache format, 656 bytes a token, written and read with torch.

A token is 512 e4m3 values (the latent), four fp32 scales of 128 values each, and 64 bf16 values
(the rotary key, not quantised); FlashMLA's `flash_mla_interface.py` documents it. A stored value
times its scale is the value; a writer makes the scale from the largest of its 128 values, which
becomes 448, e4m3's largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbench.backends.paged_ops import write_slots
from attnbench.workload.text import DS_MLA as DS_MLA

LATENT, ROPE, TILE = 512, 64, 128
NUM_TILES = LATENT // TILE
#: Bytes before the scales, before the rotary key, and of a whole token.
SCALES_AT, ROPE_AT, ROW_BYTES = LATENT, LATENT + 4 * NUM_TILES, LATENT + 4 * NUM_TILES + 2 * ROPE
LARGEST = torch.finfo(torch.float8_e4m3fn).max
#: Of a tile of zeros; the smallest normal fp32.
MIN_SCALE = torch.finfo(torch.float32).tiny


def quantize_rows(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Tokens as stored, (num_tokens, 656) uint8.

    Args:
        latent: (num_tokens, 512).
        rope: (num_tokens, 64).
    """
    tiles = latent.float().view(-1, NUM_TILES, TILE)
    scales = (tiles.abs().amax(-1) / LARGEST).clamp_min(MIN_SCALE)
    codes = (tiles / scales[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return torch.cat(
        [
            codes.view(-1, LATENT).view(torch.uint8),
            scales.view(torch.uint8),
            rope.to(torch.bfloat16).contiguous().view(torch.uint8),
        ],
        dim=1,
    )


def dequantize_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Latent and rotary key beside each other, (..., 576) in `dtype`, of rows (..., 656) uint8."""
    codes, scales, rope = torch.split(rows, [LATENT, 4 * NUM_TILES, 2 * ROPE], dim=-1)
    tiles = _tiles(codes.contiguous().view(torch.float8_e4m3fn).float())
    latent = (tiles * scales.contiguous().view(torch.float32)[..., None]).flatten(-2)
    return torch.cat([latent.to(dtype), rope.contiguous().view(torch.bfloat16).to(dtype)], dim=-1)


def _tiles(latent: torch.Tensor) -> torch.Tensor:
    return latent.view(*latent.shape[:-1], NUM_TILES, TILE)


def write_rows(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write latents (num_tokens, 512) and rotary keys (num_tokens, 1, 64) to their slots of a cache
    (num_blocks, block_size, 656); negative slots are skipped."""
    write_slots(kv_cache, quantize_rows(kv_c_normed, k_pe.flatten(1)), slot_mapping)


@dataclass(frozen=True, slots=True)
class TileRounding:
    """Rounds latents to what the cache holds exactly, whichever right writer quantises them.

    The largest value of a tile becomes 448 times a power of two, so that the scale, made from it,
    is that power, and every value is an e4m3 number times it: exact in `dtype` too (bf16 has more
    digits). Tiles that start with a positive number are halved: their scales differ from those
    of their neighbours, and one that is taken for another shows.
    """

    dtype: torch.dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tiles = _tiles(x.float())
        tiles = torch.where(tiles[..., :1] > 0, tiles / 2, tiles)
        size = tiles.abs()
        top = size.amax(-1, keepdim=True).clamp_min(2.0**-100)
        scale = torch.exp2((top / LARGEST).log2().ceil())
        rounded = (tiles / scale).to(torch.float8_e4m3fn).float()
        first = size.argmax(-1, keepdim=True)
        largest = torch.where(tiles.gather(-1, first) < 0, -LARGEST, LARGEST)
        return (rounded.scatter(-1, first, largest) * scale).flatten(-2).to(self.dtype)
