"""CPU_ATTN stands in for kernels of a GPU here, in graphs too."""

from __future__ import annotations

import pytest

from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.cpu_attn_metadata import CPUAttentionMetadataBuilder


@pytest.fixture(autouse=True)
def cpu_attn_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    always = AttentionCGSupport.ALWAYS
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", always)
