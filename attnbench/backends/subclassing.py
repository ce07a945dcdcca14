"""Backends made of another by replacing some of its members: vLLM's two helpers."""

from __future__ import annotations

from typing import Any

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.builder import AttentionMetadataBuilder


def subclass_attention_backend(
    name_prefix: str,
    attention_backend_cls: type[AttentionBackend],
    builder_cls: type[AttentionMetadataBuilder[Any]],
) -> type[AttentionBackend]:
    """A subclass of `attention_backend_cls` that uses another metadata builder (vLLM's helper)."""
    return subclass_attention_backend_with_overrides(
        name_prefix, attention_backend_cls, {"get_builder_cls": staticmethod(lambda: builder_cls)}
    )


def subclass_attention_backend_with_overrides(
    name_prefix: str,
    attention_backend_cls: type[AttentionBackend],
    overrides: dict[str, Any],
) -> type[AttentionBackend]:
    """A subclass of `attention_backend_cls` with some members replaced (vLLM's helper)."""
    name = name_prefix + attention_backend_cls.__name__
    return type(name, (attention_backend_cls,), dict(overrides))
