"""What the two AITER backends over paged keys and values share: selection, loading."""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.aiter_library import INSTALL, device_refusal, load_functions, missing_reason
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.declared.base import DeclaredBackend
from attnbench.backends.device import Device
from attnbench.backends.paged_impl import PagedAttentionImpl
from attnbench.workload.types import AttentionShape, AttentionType

M = TypeVar("M")

NO_WINDOW = (-1, -1)


class AiterBackend(PairedCacheBackend, DeclaredBackend):
    """vLLM's predicates and, beyond them, what AITER refuses."""

    install_hint: ClassVar[str] = INSTALL

    @classmethod
    def library_refusal(cls, config: AttentionConfig) -> str | None:
        """Why the kernels refuse `config` on any device; None: they take it."""
        return None

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        """vLLM's reason, else the library's."""
        return (
            super().supports_combination(config, device)
            or device_refusal(config, device)
            or cls.library_refusal(config)
        )

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        return missing_reason(cls.name)


class AiterImpl(PagedAttentionImpl[M]):
    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises BackendUnavailableError when AITER cannot be called."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.functions = load_functions(self.name)
        self.window = (self.sliding_window - 1, 0) if self.sliding_window else NO_WINDOW
