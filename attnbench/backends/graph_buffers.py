"""Memory that a captured graph reads: filled anew by each build, at the address of the first."""

from __future__ import annotations

import torch


class GraphBuffers:
    """Tensors of one builder, by name and size: a graph is captured for one size of batch."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def keep(self, name: str, made: torch.Tensor) -> torch.Tensor:
        """`made`, in the memory that `name` had when it was of this size before."""
        key = (name, made.shape)
        if key not in self._kept:
            self._kept[key] = made
        elif self._kept[key] is not made:
            self._kept[key].copy_(made)
        return self._kept[key]
