"""Fake libraries by name, and a CPU write into the cache where the real one is a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from attnbench.backends import registry, triton_mla_launch
from attnbench.backends.mla_prefill import load_prefill
from attnbench.backends.paged_ops import write_slots
from tests.backends.flash_attn.fake_library import Call
from tests.backends.mla import fake_library

Install = Callable[[str], list[Call]]


def forget() -> None:
    load_prefill.cache_clear()
    registry.reload_entry_points()


def write_on_the_cpu(
    kv_c_normed: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
) -> SimpleNamespace:
    """Stands in for `write_latent_launch`."""

    def run() -> None:
        rows = torch.cat([kv_c_normed, k_pe.flatten(1)], dim=-1)
        write_slots(kv_cache, rows, slot_mapping, 1.0 if k_scale is None else float(k_scale))

    return SimpleNamespace(run=run)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a recorded library importable; `vllm-0.22.1 flash_attn`: the one for prefills."""
    forget()
    monkeypatch.setattr(triton_mla_launch, "write_latent_launch", write_on_the_cpu)

    def put(record: str) -> list[Call]:
        name, _, part = record.partition(" ")
        if part == "flash_attn":
            return fake_library.install_flash_attn(monkeypatch, name)
        return fake_library.install(monkeypatch, record)

    yield put
    forget()
