"""Published peaks of devices, to hold measured rates against.

Memory bandwidth, and the dense rate (no 2:4 sparsity) of fp16 and bf16 matrix products with fp32
accumulation. A device is known by the exact name its driver gives: a MIG slice, or a variant with
another memory, has another name and is unknown, which is said and never guessed.

The figures NVIDIA gives in the data sheets of A100, H100, H200, L4, L40S, DGX B200 and GB200 NVL72
(rates with sparsity halved) and its architecture white papers (H100 PCIe, Ada, RTX Blackwell),
entered by hand from secondary sources: a rate a few percent above a peak here means that the table
is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnbench.measure.environment import class_of_name


@dataclass(frozen=True, slots=True)
class Peak:
    """What the maker says a device can do at most."""

    memory_bytes_per_s: float
    matmul_flops_per_s: float  # fp16 and bf16 alike


PEAKS: Mapping[str, Peak] = {
    "NVIDIA A100-SXM4-40GB": Peak(1.555e12, 312e12),
    "NVIDIA A100-PCIE-40GB": Peak(1.555e12, 312e12),
    "NVIDIA A100-SXM4-80GB": Peak(2.039e12, 312e12),
    "NVIDIA A100 80GB PCIe": Peak(1.935e12, 312e12),
    "NVIDIA H100 80GB HBM3": Peak(3.35e12, 989.4e12),
    "NVIDIA H100 PCIe": Peak(2.039e12, 756e12),
    "NVIDIA H100 NVL": Peak(3.938e12, 835e12),
    "NVIDIA H200": Peak(4.8e12, 989.4e12),
    "NVIDIA H200 NVL": Peak(4.8e12, 835e12),
    "NVIDIA B200": Peak(8.0e12, 2250e12),
    "NVIDIA GB200": Peak(8.0e12, 2500e12),
    "NVIDIA L4": Peak(300e9, 121e12),
    "NVIDIA L40S": Peak(864e9, 362e12),
    "NVIDIA RTX 6000 Ada Generation": Peak(960e9, 364.2e12),
    "NVIDIA GeForce RTX 4090": Peak(1.008e12, 165.2e12),
    "NVIDIA GeForce RTX 5090": Peak(1.792e12, 209.5e12),
}

#: NVIDIA's table of compute capabilities: what a device that is not here is asked about as.
COMPUTE_CAPABILITIES: Mapping[str, str] = {
    "NVIDIA A100-SXM4-40GB": "8.0",
    "NVIDIA A100-PCIE-40GB": "8.0",
    "NVIDIA A100-SXM4-80GB": "8.0",
    "NVIDIA A100 80GB PCIe": "8.0",
    "NVIDIA H100 80GB HBM3": "9.0",
    "NVIDIA H100 PCIe": "9.0",
    "NVIDIA H100 NVL": "9.0",
    "NVIDIA H200": "9.0",
    "NVIDIA H200 NVL": "9.0",
    "NVIDIA B200": "10.0",
    "NVIDIA GB200": "10.0",
    "NVIDIA L4": "8.9",
    "NVIDIA L40S": "8.9",
    "NVIDIA RTX 6000 Ada Generation": "8.9",
    "NVIDIA GeForce RTX 4090": "8.9",
    "NVIDIA GeForce RTX 5090": "12.0",
}


def peak_of(device_name: str) -> Peak | None:
    """The published peaks of a device by its driver's name for it; None: not in the table."""
    return PEAKS.get(device_name.strip())


def capability_of_class(device_class: str) -> str:
    """`9.0` of `nvidia-h200`; "": a class that is not in the table."""
    names = (one for one in COMPUTE_CAPABILITIES if class_of_name(one) == device_class)
    return COMPUTE_CAPABILITIES.get(next(names, ""), "")
