"""What stands in for a GPU host: compiled extensions, NVML, CUDA properties, no network.

vLLM decides part of what a backend can do by whether its compiled extensions import, and which
platform it runs on by asking NVML. On a machine without the driver both fail without an error and
change the selector's answer; so both are answered here, from the wheel's own list of extensions
and from the compute capability that is asked about.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GPU_NAMES = {
    (7, 0): "Tesla V100-SXM2-16GB",
    (7, 5): "Tesla T4",
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (8, 6): "NVIDIA A10",
    (8, 9): "NVIDIA L4",
    (9, 0): "NVIDIA H100 80GB HBM3",
    (10, 0): "NVIDIA B200",
    (10, 3): "NVIDIA B300",
    (11, 0): "NVIDIA Thor",
    (12, 0): "NVIDIA GeForce RTX 5090",
    (12, 1): "NVIDIA GB10",
}
"""A real device's name for each capability: vLLM only prints it."""

MULTIPROCESSORS = {7: 72, 8: 108, 9: 132, 10: 148, 11: 20, 12: 170}
"""Streaming multiprocessors of a device of each major capability (sizes a workspace)."""


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives a ready module for each name of `modules`, before the import system looks on disk."""

    def __init__(self) -> None:
        self.modules: dict[str, Callable[[], types.ModuleType]] = {}
        self.blocked: set[str] = set()
        self.used: set[str] = set()

    def add(self, name: str, make: Callable[[], types.ModuleType] | None = None) -> None:
        """Let `import name` give `make()`, an empty module if left out."""
        self.modules[name] = make or (lambda: types.ModuleType(name))

    def block(self, name: str) -> None:
        """Let `import name`, and what is below it, fail as if it were not installed."""
        self.blocked.add(name)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in self.blocked or fullname.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        if fullname in self.modules:
            # A path makes it a package, so that its sub-modules are asked for here too.
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.used.add(spec.name)
        return self.modules[spec.name]()

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def any_name(name: str) -> types.ModuleType:
    """A module that has whatever is imported from it, for checks that only import."""
    module = types.ModuleType(name)

    def attribute(wanted: str) -> object:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return object()

    module.__getattr__ = attribute  # type: ignore[method-assign]
    return module


def extension_modules(package_folder: Path, package: str = "vllm") -> tuple[str, ...]:
    """The import names of the compiled extensions that the wheel brings (`*.so` in its RECORD)."""
    names = set()
    for record in package_folder.glob(f"{package}-*.dist-info/RECORD"):
        for line in record.read_text(encoding="utf-8").splitlines():
            file = line.partition(",")[0]
            if file.endswith(".so") and file.startswith(f"{package}/"):
                parts = file.split("/")
                names.add(".".join([*parts[:-1], parts[-1].partition(".")[0]]))
    return tuple(sorted(names))


def fake_nvml(capability: tuple[int, int]) -> types.ModuleType:
    """A `pynvml` that knows one device of this compute capability."""
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_args, **_named: value

    memory = types.SimpleNamespace(total=80 << 30, free=79 << 30, used=1 << 30)
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetHandleByUUID": 0,
        "nvmlDeviceGetIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetName": GPU_NAMES.get(capability, "NVIDIA GPU"),
        "nvmlDeviceGetUUID": "GPU-00000000-0000-0000-0000-000000000000",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetP2PStatus": 0,
        "nvmlSystemGetDriverVersion": "580.00",
    }
    for name, value in answers.items():
        setattr(module, name, answer(value))
    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    module.NVML_P2P_CAPS_INDEX_NVLINK = 2  # type: ignore[attr-defined]
    module.NVML_P2P_STATUS_OK = 0  # type: ignore[attr-defined]
    return module


def pretend_cuda(capability: tuple[int, int]) -> None:
    """Answer torch's questions about the device; tensors asked for on it get no memory."""
    import torch

    total = 80 << 30
    properties = types.SimpleNamespace(
        name=GPU_NAMES.get(capability, "NVIDIA GPU"),
        major=capability[0],
        minor=capability[1],
        total_memory=total,
        multi_processor_count=MULTIPROCESSORS.get(capability[0], 100),
    )
    fakes: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda *_args, **_named: properties,
        "get_device_capability": lambda *_args, **_named: capability,
        "get_device_name": lambda *_args, **_named: properties.name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "mem_get_info": lambda *_args, **_named: (total, total),
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)

    def on_meta(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **named: Any) -> Any:
            if str(named.get("device", "")).startswith("cuda"):
                named["device"] = "meta"
            return original(*args, **named)

        return make

    for name in ("zeros", "empty", "ones", "full", "arange", "tensor"):
        setattr(torch, name, on_meta(getattr(torch, name)))


class NetworkCutOff(OSError):
    """What every connection attempt of the probe ends with."""


def cut_network(attempts: list[str]) -> None:
    """Refuse every connection, and note in `attempts` to where one was tried."""
    import socket

    def refuse(_self: socket.socket, address: Any, *_args: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        attempts.append(str(host))
        raise NetworkCutOff(f"the probe reaches no network ({host})")

    def no_lookup(host: Any, *_args: Any, **_named: Any) -> Any:
        attempts.append(str(host))
        raise NetworkCutOff(f"the probe reaches no network ({host})")

    socket.socket.connect = refuse  # type: ignore[assignment,method-assign]
    socket.getaddrinfo = no_lookup


def install(finder: StubFinder) -> None:
    """Ask `finder` before every other one."""
    sys.meta_path.insert(0, finder)
