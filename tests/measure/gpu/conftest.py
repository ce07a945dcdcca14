"""CPU_ATTN stands in for kernels of a GPU here, in graphs too; a fake NVML for the driver's."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pynvml
import pytest

from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.cpu_attn_metadata import CPUAttentionMetadataBuilder
from attnbench.measure.gpu import nvml
from tests.measure.gpu.fake_nvml import FakeNvml, install


@pytest.fixture(autouse=True)
def cpu_attn_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    always = AttentionCGSupport.ALWAYS
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", always)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """NVML with one device, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    yield install()
    nvml._find_device.cache_clear()
    nvml._start.cache_clear()
