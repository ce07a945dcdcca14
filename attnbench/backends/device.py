"""The device a backend is asked about. A value, so that a device that is not here can be named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from attnbench.errors import DeviceError

if TYPE_CHECKING:
    import torch


class DeviceCapability(NamedTuple):
    """CUDA compute capability, compared as a tuple (`vllm/platforms/interface.py`)."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device, present or only named.

    `kind` is the platform's name (`cpu`, `cuda`, `rocm`, or a plug-in's); `arch` is the rest of the
    device text (`sm90`, `gfx942`, `""`).
    """

    kind: str
    arch: str = ""
    capability: DeviceCapability | None = None

    def __str__(self) -> str:
        return self.arch or self.kind

    @property
    def torch_device(self) -> str:
        """The device string torch uses: ROCm builds of torch call their devices `cuda`."""
        return {"rocm": "cuda"}.get(self.kind, self.kind)


_SM = re.compile(r"^(?:cuda:)?sm_?(\d{2,3})a?$")
_CAPABILITY = re.compile(r"^(\d{1,2})\.(\d)$")
_GFX = re.compile(r"^(?:rocm:)?(gfx[0-9a-f]{3,4})$")


def parse_device(text: str) -> Device | None:
    """Read `cpu`, `sm90`, `9.0`, `gfx942`; None if it is none of these (a plug-in may know it)."""
    word = text.strip().lower()
    if word == "cpu":
        return Device("cpu")
    if match := _SM.match(word):
        return cuda_device(int(match[1][:-1]), int(match[1][-1]))
    if match := _CAPABILITY.match(word):
        return cuda_device(int(match[1]), int(match[2]))
    if match := _GFX.match(word):
        return Device("rocm", match[1])
    return None


def cuda_device(major: int, minor: int) -> Device:
    """The CUDA device of compute capability `major.minor`."""
    if not (5 <= major <= 20 and 0 <= minor <= 9):
        raise DeviceError(
            f"sm{major}{minor}: compute capability {major}.{minor} is not one NVIDIA ships; "
            "write e.g. --device sm90"
        )
    return Device("cuda", f"sm{major}{minor}", DeviceCapability(major, minor))


def device_of(device: torch.device) -> Device:
    """The device that torch's tensors on `device` are on."""
    import torch

    if device.type != "cuda":
        return Device(device.type)
    return cuda_device(*torch.cuda.get_device_capability(device))
