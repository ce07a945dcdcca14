"""Names of number formats and what a format can hold. `auto` is resolved before it gets here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from attnbench.errors import WorkloadError

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        # Bytes of mixed meaning: see `ds_mla.py`.
        "fp8_ds_mla": torch.uint8,
    }
)

#: `kv_cache_dtype`s of a kernel that reads every format above; fp8 with one scale a tensor.
FLOAT_AND_FP8_CACHES: tuple[str, ...] = (
    "auto",
    "fp32",
    "fp16",
    "bf16",
    "fp8_e4m3",
    "fp8_e5m2",
)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in `TORCH_DTYPES`.

    Raises:
        WorkloadError: another name.
    """
    try:
        return TORCH_DTYPES[name]
    except KeyError:
        raise WorkloadError(
            f"dtype {name!r} is not known; write one of {', '.join(TORCH_DTYPES)}"
        ) from None


def dtype_name(dtype: torch.dtype) -> str:
    """Our name of a torch dtype; the reverse of `torch_dtype`."""
    for name, known in TORCH_DTYPES.items():
        if known == dtype:
            return name
    raise WorkloadError(f"{dtype} has no name here; use one of {', '.join(TORCH_DTYPES)}")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest: half of `torch.finfo(dtype).eps`.

    (N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 2.1.)
    """
    return torch.finfo(dtype).eps / 2


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes when it is fp8: torch cannot index fp8 tensors on every device."""
    return tensor.view(torch.uint8) if is_fp8(tensor.dtype) else tensor
