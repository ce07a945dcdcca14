"""Fake libraries by name, and a CPU write into the cache where the real one is a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from attnbench.backends import registry, triton_attn_launch
from attnbench.backends.flash_attn_kernels import _num_splits, load_kernels
from attnbench.backends.paged_ops import write_slots
from tests.backends.flash_attn import fake_library

Install = Callable[..., list[fake_library.Call]]


def forget() -> None:
    load_kernels.cache_clear()
    _num_splits.cache_clear()
    registry.reload_entry_points()


def write_on_the_cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> SimpleNamespace:
    """Stands in for `write_kv_launch`."""

    def run() -> None:
        for plane, rows, scale in ((0, key, k_scale), (1, value, v_scale)):
            number = 1.0 if scale is None else float(scale)
            write_slots(kv_cache[plane], rows, slot_mapping, number)

    return SimpleNamespace(run=run)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a recorded library importable, on Hopper or the major capability given."""
    forget()
    monkeypatch.setattr(triton_attn_launch, "write_kv_launch", write_on_the_cpu)
    yield lambda record, major=9: fake_library.install(monkeypatch, record, major)
    forget()
