"""The fake library by name; on the CPU plain torch writes the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from attnbench.backends import flashinfer_calls, registry, triton_attn_launch
from tests.backends.flash_attn.conftest import write_on_the_cpu
from tests.backends.flashinfer import fake_library

Install = Callable[[str], list[fake_library.Call]]
CURRENT = "flashinfer-0.6.11.post2"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a recorded library importable."""
    registry.reload_entry_points()
    monkeypatch.setattr(triton_attn_launch, "write_kv_launch", write_on_the_cpu)
    flashinfer_calls.workspace.cache_clear()
    monkeypatch.setattr(flashinfer_calls, "WORKSPACE_BYTES", 1 << 24)
    yield lambda record: fake_library.install(monkeypatch, record)
    flashinfer_calls.workspace.cache_clear()
    registry.reload_entry_points()
