"""Backends for `attnbench verify`: one that is right, and some that are wrong in one way each.

Installed as a package of its own by the fixture `suspects`, so that workers find them too.
"""

from __future__ import annotations

import os
import time
from typing import Any

from attnbench.backends.cpu_attn import CPUAttentionBackend, CPUAttentionImpl


def backend(name: str, **more: Any) -> Any:
    impl = type(f"{name}Impl", (CPUAttentionImpl,), {"calls": 0, **more})
    members = {
        "get_name": staticmethod(lambda: name),
        "get_impl_cls": staticmethod(lambda: impl),
        "__module__": __name__,
    }
    return type(name, (CPUAttentionBackend,), members)


def after(harm: Any) -> Any:
    """A forward that is right, and then calls `harm(impl, output)`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output = CPUAttentionImpl.forward(self, *args, **kwargs)
        harm(self, output)
        return output

    return forward


def write_once(self: Any, *args: Any) -> None:
    """Writes the tokens of the call, and none of those that are generated after it."""
    if not hasattr(self, "has_written"):
        self.has_written = True
        CPUAttentionImpl.do_kv_cache_update(self, *args)


def spoil_many(impl: Any, output: Any) -> None:
    if output.shape[0] >= 3 and output.shape[1] >= 2:
        output[2, 1] *= 1.5


def die_on_many(impl: Any, output: Any) -> None:
    if output.shape[0] >= 2:
        os._exit(7)


def nan_later(impl: Any, output: Any) -> None:
    if impl.calls == 3:
        output[0, 0, 0] = float("nan")


def refuse_to_work(impl: Any, output: Any) -> None:
    raise RuntimeError("no kernel image is available")


Right = backend("RIGHT")
Forgetful = backend("FORGETFUL", do_kv_cache_update=write_once)
Spoiling = backend("SPOILING", forward=after(spoil_many))
Dying = backend("DYING", forward=after(die_on_many))
Hanging = backend("HANGING", forward=after(lambda impl, output: time.sleep(600)))
NanLater = backend("NAN_LATER", forward=after(nan_later))
Raising = backend("RAISING", forward=after(refuse_to_work))

NAMES = {
    "RIGHT": "Right",
    "FORGETFUL": "Forgetful",
    "SPOILING": "Spoiling",
    "DYING": "Dying",
    "HANGING": "Hanging",
    "NAN_LATER": "NanLater",
    "RAISING": "Raising",
}
