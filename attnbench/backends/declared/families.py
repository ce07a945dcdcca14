"""Every family of vLLM 0.22.1 that is declared, by its name there."""

from __future__ import annotations

from functools import cache

from attnbench.backends.declared import vllm_0_22_1, vllm_namesakes
from attnbench.backends.declared.base import DeclaredBackend


@cache
def families() -> dict[str, type[DeclaredBackend]]:
    """In the order of the files."""
    found = [
        value
        for module in (vllm_0_22_1, vllm_namesakes)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, DeclaredBackend)
        and value.__dict__.get("name")
        and value.__module__ == module.__name__
    ]
    return {cls.name: cls for cls in found}
