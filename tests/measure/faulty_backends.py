"""Backends that break the process they run in, each in one way, on top of one that works.

Installed by the fixture `faulty`; a file beside this module is how one process tells the next.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch

from attnbench.backends.cpu_attn import CPUAttentionBackend, CPUAttentionImpl
from attnbench.backends.cpu_attn_metadata import CPUAttentionMetadataBuilder
from attnbench.backends.device import Device

FOLDER = Path(__file__).parent

#: What a CUDA error leaves behind: every later call of the process fails.
sticky: list[str] = []


def backend(
    name: str, before: Any = None, after: Any = None, works: bool = True, **more: Any
) -> Any:
    """A backend whose forward calls `before()`, then works, then calls `after(output, calls)`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        type(self).calls += 1
        if sticky:
            raise RuntimeError(sticky[0])
        if before is not None:
            before()
        output = CPUAttentionImpl.forward(self, *args, **kwargs) if works else None
        if after is not None:
            after(output, type(self).calls)
        return output

    impl = type(f"{name}Impl", (CPUAttentionImpl,), {"forward": forward, "calls": 0})
    members = {
        "get_name": staticmethod(lambda: name),
        "get_impl_cls": staticmethod(lambda: impl),
        "__module__": __name__,
        **more,
    }
    return type(name, (CPUAttentionBackend,), members)


def loop() -> None:
    while True:
        pass


def illegal_access() -> None:
    sticky.append("CUDA error: an illegal memory access was encountered")
    raise RuntimeError(sticky[0])


def silent_damage() -> None:
    """As above, but the call that does it gives no sign; only a health check can tell."""
    sticky.append("CUDA error: unspecified launch failure")
    raise ValueError("something else")


def host_oom() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30),) * 2)
    bytearray(1 << 33)


def device_oom() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")


def leave_a_child() -> None:
    """Die while a child of ours still holds the pipe to the parent open."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    (FOLDER / "child").write_text(str(child))
    os._exit(3)


def once(name: str) -> bool:
    """True in the first process that asks, False in every later one."""
    try:
        (FOLDER / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die_once() -> None:
    if once("died"):
        os._exit(7)


def break_the_device() -> None:
    (FOLDER / "device_is_lost").touch()
    os._exit(9)


def poison_health(device: Device) -> None:
    """Health check of the tests: a sticky error of this process, or a device that is lost."""
    with (FOLDER / "health_checks").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if (FOLDER / "device_is_lost").exists():
        raise RuntimeError("CUDA error: device is lost")
    if sticky:
        raise RuntimeError(sticky[0])


class _FailingBuilder(CPUAttentionMetadataBuilder):
    def build(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("cannot plan this batch")


def not_made() -> None:
    raise NotImplementedError("this combination is not made")


Fine = backend("FINE")
Looping = backend("LOOPING", loop)
Exiting = backend("EXITING", lambda: os._exit(0))
Segfaulting = backend("SEGFAULTING", lambda: ctypes.string_at(0))
LeavingAChild = backend("LEAVING_A_CHILD", leave_a_child)
Illegal = backend("ILLEGAL", illegal_access)
Damaging = backend("DAMAGING", silent_damage)
HostOom = backend("HOST_OOM", host_oom)
DeviceOom = backend("DEVICE_OOM", device_oom)
Nan = backend("NAN", after=lambda output, calls: output.fill_(float("nan")))
Unwritten = backend("UNWRITTEN", works=False)
LaterWrong = backend("LATER_WRONG", after=lambda o, calls: o.add_(0.5) if calls > 1 else o)
BadBuild = backend("BAD_BUILD", get_builder_cls=staticmethod(lambda: _FailingBuilder))
NotMade = backend("NOT_MADE", not_made)
DyingOnce = backend("DYING_ONCE", die_once)
DeviceKiller = backend("DEVICE_KILLER", break_the_device)


def log_call() -> None:
    with (FOLDER / "calls").open("a") as log:
        log.write(f"{os.getpid()}\n")


class Compiled(backend("COMPILED", log_call)):  # type: ignore[misc]
    """One kernel for each dtype and head size, which leaves a line in `calls`."""

    @classmethod
    def compilation_key(cls, workload: Any, variant: str, device: Device) -> str:
        return f"{workload.dtype} {workload.shape.head_size}"


class CompiledWrong(backend("COMPILED_WRONG", lambda: os._exit(5))):  # type: ignore[misc]
    """Its kernel brings the compiling process down."""

    @classmethod
    def compilation_key(cls, workload: Any, variant: str, device: Device) -> str:
        return "one"


NAMES = {
    "FINE": "Fine",
    "LOOPING": "Looping",
    "EXITING": "Exiting",
    "SEGFAULTING": "Segfaulting",
    "LEAVING_A_CHILD": "LeavingAChild",
    "ILLEGAL": "Illegal",
    "DAMAGING": "Damaging",
    "HOST_OOM": "HostOom",
    "DEVICE_OOM": "DeviceOom",
    "NAN": "Nan",
    "UNWRITTEN": "Unwritten",
    "LATER_WRONG": "LaterWrong",
    "BAD_BUILD": "BadBuild",
    "NOT_MADE": "NotMade",
    "DYING_ONCE": "DyingOnce",
    "DEVICE_KILLER": "DeviceKiller",
    "COMPILED": "Compiled",
    "COMPILED_WRONG": "CompiledWrong",
}
