"""Facts of the host that change answers: each is assumed, said, and tried the other way.

A fact is tried the other way inside the same process, so the answer itself tells which cells hang
on it and what they would become.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .observe import environment
from .stubs import StubFinder, any_name

CUBINS = "flashinfer-cubin"
COMPILER = "nvcc"
CUTE = "nvidia-cutlass-dsl"
MODULES = {CUTE: "vllm.vllm_flash_attn.cute.interface"}
"""Facts whose package is seen through one module of vLLM that imports it. Every other name is the
import name of an optional package (`tokenspeed_mla`)."""


class Facts:
    """The facts as they are assumed, and as they are while one of them is turned round."""

    def __init__(self, finder: StubFinder, assumed: dict[str, bool], tools: Path) -> None:
        self._finder = finder
        self._tools = tools
        self.assumed = assumed
        for name, holds in assumed.items():
            self._set(name, holds)

    @contextmanager
    def turned_round(self, name: str) -> Iterator[None]:
        """The other way inside the block. The caller clears vLLM's caches."""
        self._set(name, not self.assumed[name])
        try:
            yield
        finally:
            self._set(name, self.assumed[name])

    def _set(self, name: str, holds: bool) -> None:
        if name == CUBINS:
            environment({"VLLM_HAS_FLASHINFER_CUBIN": "1" if holds else "0"})
        elif name == COMPILER:
            for program in ("nvcc", "ninja"):
                tool = self._tools / "bin" / program
                if holds:
                    tool.parent.mkdir(parents=True, exist_ok=True)
                    tool.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
                    tool.chmod(0o755)
                else:
                    tool.unlink(missing_ok=True)
        else:
            self._set_module(MODULES.get(name, name), holds)

    def _set_module(self, module: str, holds: bool) -> None:
        for loaded in [one for one in sys.modules if one == module or one.startswith(f"{module}.")]:
            del sys.modules[loaded]
        self._finder.modules.pop(module, None)
        self._finder.blocked.discard(module)
        if holds:
            self._finder.add(module, lambda: any_name(module))
        else:
            self._finder.block(module)
