"""Points by the fake timer, and a package of misbehaving backends, installed as a vendor's is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from attnbench.backends import registry
from attnbench.backends.device import Device
from attnbench.measure.environment import read_environment
from attnbench.measure.options import MeasureOptions
from attnbench.measure.point import PointContext
from attnbench.measure.timers import FakeTimer
from attnbench.measure.truth import TruthCache

MODULE = '''
"""Backends that fail in one way each, on top of one that works."""
import os
import time

import torch

from attnbench.backends.cpu_attn import CPUAttentionBackend, CPUAttentionImpl
from attnbench.backends.torch_mla import TorchMLABackend, TorchMLAImpl


def backend(name, forward):
    impl = type(name + "Impl", (CPUAttentionImpl,), {"forward": forward, "calls": 0})
    return type(
        name,
        (CPUAttentionBackend,),
        {
            "get_name": staticmethod(lambda: name),
            "get_impl_cls": staticmethod(lambda: impl),
            "__module__": __name__,
        },
    )


def right(self, *args, **kwargs):
    return CPUAttentionImpl.forward(self, *args, **kwargs)


def wrong(self, *args, **kwargs):
    return right(self, *args, **kwargs).add_(0.5)


def later_wrong(self, *args, **kwargs):
    type(self).calls += 1
    output = right(self, *args, **kwargs)
    return output.add_(0.5) if type(self).calls > 3 else output


def silent(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest):
    return output


class LSEImpl(TorchMLAImpl):
    calls = 0

    def forward_mqa(self, *args):
        type(self).calls += 1
        lse = super().forward_mqa(*args)
        return lse + 0.5 if type(self).calls > 3 else lse


class LSELaterWrong(TorchMLABackend):
    get_name = staticmethod(lambda: "LSE_LATER_WRONG")
    get_impl_cls = staticmethod(lambda: LSEImpl)


def raising(self, *args, **kwargs):
    raise RuntimeError("no kernel image is available\\nsecond line")


def hungry(self, *args, **kwargs):
    return torch.empty(1 << 60, dtype=torch.uint8)


def aborting(self, *args, **kwargs):
    os.abort()


def hanging(self, *args, **kwargs):
    time.sleep(600)


Right = backend("RIGHT", right)
Wrong = backend("WRONG", wrong)
LaterWrong = backend("LATER_WRONG", later_wrong)
Silent = backend("SILENT", silent)
Raising = backend("RAISING", raising)
Hungry = backend("HUNGRY", hungry)
Aborting = backend("ABORTING", aborting)
Hanging = backend("HANGING", hanging)
'''

NAMES = {
    "RIGHT": "Right",
    "WRONG": "Wrong",
    "LATER_WRONG": "LaterWrong",
    "LSE_LATER_WRONG": "LSELaterWrong",
    "SILENT": "Silent",
    "RAISING": "Raising",
    "HUNGRY": "Hungry",
    "ABORTING": "Aborting",
    "HANGING": "Hanging",
}


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers the backends in `NAMES`, in this process and in every process it starts."""
    yield from installed("misbehaving", MODULE, NAMES, tmp_path / "site", monkeypatch)


def installed(
    package: str, source: str, names: Mapping[str, str], site: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Installs backends (registered name -> class of `source`) while the generator is held."""
    module = f"{package}_backends"
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(source, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "\n".join(f"{name} = {module}:{cls}" for name, cls in names.items())
    (info / "entry_points.txt").write_text(f"[attnbench.backends]\n{lines}\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    registry.reload_entry_points()
    yield
    sys.modules.pop(module, None)
    monkeypatch.undo()
    registry.reload_entry_points()


@pytest.fixture(scope="module")
def context() -> PointContext:
    """Points on the CPU by the fake timer."""
    cpu = Device("cpu")
    return PointContext(
        run_id="20261121T000000Z-000000",
        replicate=0,
        device=cpu,
        environment=read_environment(cpu),
        options=MeasureOptions(timer="fake"),
        timer=FakeTimer(),
        timer_floor_s=0.0,
        host_floor_s=0.0,
        truths=TruthCache(),
    )
