"""Cache operations that backends written in torch share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnbench.backends import paged_ops
from attnbench.backends.paged_ops import write_slots


@pytest.mark.parametrize("way", [paged_ops._skipped, paged_ops._written_back])
def test_negative_slots_are_skipped(
    way: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_ops, "_skipped", way)  # what a CPU takes; the other is for devices
    cache = torch.zeros(3, 4, 1, 2)
    cache[0, 0] = 7.0  # the null block's
    rows = torch.arange(6.0).view(3, 1, 2) + 1
    write_slots(cache, rows, torch.tensor([5, -1, 4]))
    assert cache[1, 1, 0].tolist() == [1.0, 2.0]
    assert cache[1, 0, 0].tolist() == [5.0, 6.0]
    assert cache[0, 0, 0].tolist() == [7.0, 7.0]
    assert cache.count_nonzero() == 6


def test_writing_on_a_device_never_looks_at_the_slots() -> None:
    # A meta tensor has no values: whoever looks at one fails.
    cache = torch.zeros(3, 4, 1, 2, device="meta")
    slots = torch.zeros(3, dtype=torch.int64, device="meta")
    write_slots(cache, torch.zeros(3, 1, 2, device="meta"), slots)
    with pytest.raises(RuntimeError, match="meta"):
        paged_ops._skipped(cache, slots, slots)
