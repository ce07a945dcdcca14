"""A fake vLLM of a recorded version, importable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnbench.backends import registry, vllm_bridge
from attnbench.backends.vllm_bridge_engine import load_vllm, parameters_of
from tests.backends.vllm import fake_vllm
from tests.backends.vllm.fake_state import State

Install = Callable[[str], State]


def forget() -> None:
    load_vllm.cache_clear()
    parameters_of.cache_clear()
    vllm_bridge.vllm_backend.cache_clear()
    vllm_bridge._made_builder.cache_clear()
    vllm_bridge._made_impl.cache_clear()
    registry.reload_entry_points()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Makes the fake vLLM of a version importable."""
    forget()
    yield lambda version: fake_vllm.install(monkeypatch, tmp_path, version)
    forget()
