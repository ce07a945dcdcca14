"""Reproducible token data of any size: a small pool of random rows, reused with other signs.

A batch of 256 requests of 8k tokens has two thousand million numbers in its KV cache. Drawing them
all would take longer than measuring, keeping a dense copy beside the cache would double the memory,
and a device's own generator would give other data on other devices. So a row is a pure function of
its token id: `pool[id % rows] * signs[id // rows]`. No two ids share a row, ids less than `rows`
apart are independent, and rows of the same remainder are uncorrelated (their signs are).

The rows are the same in every workload, and are drawn once per process: drawing and rounding them
takes longer than most kernels take to be timed. The signs, and so the data, are the workload's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

#: Prime, so that it is in step with no block size, window or sequence length.
_MAX_ROWS = 8191
_MAX_ELEMENTS = 1 << 24


def seeded_generator(*parts: str) -> torch.Generator:
    """A host generator that depends on `parts` only, the same on every machine."""
    digest = hashlib.sha256("\x00".join(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounds to values that are exact both in the cache (as `value / scale`) and in the dtype."""

    cache_dtype: torch.dtype
    dtype: torch.dtype
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ((x / self.scale).to(self.cache_dtype).float() * self.scale).to(self.dtype)


class TokenPool:
    """Rows of shape `features` for token ids `0 .. num_ids - 1`, standard normal before rounding.

    Args:
        name: of the rows: pools of two names are independent.
        num_ids: how many ids may be asked for.
        features: shape of one row, e.g. `(num_kv_heads, head_size)`.
        generator: where the signs come from; on the host, so that every device gets the same.
        round_to: rounds float32 values to what the formats involved can hold, whatever their
            signs; hashable.
    """

    def __init__(
        self,
        name: str,
        num_ids: int,
        features: tuple[int, ...],
        generator: torch.Generator,
        round_to: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._rows = _draw_rows(name, features, round_to, device)
        self.num_rows = len(self._rows)
        num_signs = max(1, math.ceil(num_ids / self.num_rows))
        signs = torch.randint(0, 2, (num_signs, *features), generator=generator) * 2 - 1
        self._signs = signs.to(device, self._rows.dtype)

    def take(self, ids: torch.Tensor, heads: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of `ids`: `(*ids.shape, *features)`.

        With `heads` (broadcastable against `ids`) only that head of each row: the first feature
        dimension is indexed away.
        """
        row, wrap = ids % self.num_rows, ids // self.num_rows
        if heads is None:
            return self._rows[row] * self._signs[wrap]
        return self._rows[row, heads] * self._signs[wrap, heads]


@lru_cache(maxsize=8)
def _draw_rows(
    name: str,
    features: tuple[int, ...],
    round_to: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    affordable = max(64, _MAX_ELEMENTS // math.prod(features)) - 1
    size = (min(_MAX_ROWS, affordable), *features)
    return round_to(torch.randn(size, generator=seeded_generator("rows", name))).to(device)


@dataclass(kw_only=True)
class BatchTokens:
    """Which token of the pools is where. Requests keep their data when they are reordered."""

    key_pool: TokenPool
    value_pool: TokenPool
    num_shared: int
    device: torch.device
    first_own_id: torch.Tensor
    """(num_reqs,) in batch order: id of each request's first token that is not shared."""

    def ids(self, request: int | torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token ids of positions of one request, or of one each (the two are broadcast).

        Positions below `num_shared` are everybody's.
        """
        own = positions - self.num_shared + self.first_own_id[request]
        return torch.where(positions < self.num_shared, positions, own)
