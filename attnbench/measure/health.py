"""Is the device still usable? Asked after anything that may have left it broken."""

from __future__ import annotations

from collections.abc import Callable

from attnbench.backends.device import Device
from attnbench.errors import InfrastructureError

#: Raises whatever it likes if the device does not work. Sent to workers: a module's own function.
HealthCheck = Callable[[Device], None]

#: Numbers in the tensor of the small kernel.
_SIZE = 1 << 12


def check_device(device: Device) -> None:
    """Run a small kernel and wait for its result. On a CPU there is nothing to break.

    Raises: what the device raises, or InfrastructureError for a wrong result.
    """
    if device.kind == "cpu":
        return
    import torch

    # Random numbers: their generator is what a failed capture of a graph leaves broken.
    numbers = torch.rand(_SIZE, device=device.torch_device)
    total = float((numbers < 2).sum().item())
    if total != _SIZE:
        raise InfrastructureError(
            f"{device}: the count of {_SIZE} numbers came out as {total:g}; look at the device's "
            "error counters (nvidia-smi -q) before trusting any result"
        )
