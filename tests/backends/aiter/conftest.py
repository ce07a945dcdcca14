"""AITER by record, and a CPU write into the cache where the real one is a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from attnbench.backends import registry, triton_attn_launch, triton_mla_launch
from attnbench.backends.aiter_library import load_functions
from tests.backends.aiter import fake_library
from tests.backends.flash_attn.conftest import write_on_the_cpu
from tests.backends.flash_attn.fake_library import Call
from tests.backends.mla.conftest import write_on_the_cpu as write_latents_on_the_cpu

Install = Callable[..., list[Call]]


def forget() -> None:
    load_functions.cache_clear()
    registry.reload_entry_points()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a recorded AITER importable: `install(record, leave_out="", lacking="")`."""
    forget()
    monkeypatch.setattr(triton_attn_launch, "write_kv_launch", write_on_the_cpu)
    monkeypatch.setattr(triton_mla_launch, "write_latent_launch", write_latents_on_the_cpu)

    def put(record: str, **changes: str) -> list[Call]:
        calls = fake_library.install(monkeypatch, record, **changes)
        forget()
        return calls

    yield put
    forget()
