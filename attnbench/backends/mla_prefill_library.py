"""MLA's prefill axis: the libraries of the expanded form, which one a device gets, what it takes.

They are variants of FLASH_ATTN, all in vLLM's wheel. Nothing here imports a library.
"""

from __future__ import annotations

from attnbench.backends.device import Device
from attnbench.backends.flash_attn_library import LIBRARIES, Library

PREFILLS = ("FA3", "FA4", "FA2")


def default_prefill(device: Device, qk_head_dim: int, v_head_dim: int) -> str:
    """The prefill library of a device: FA3 on compute capability 9.x, FA4 on 10.x, else FA2.

    vLLM 0.22.1's (mla/prefill/flash_attn.py, fa_utils.py: get_flash_attn_version): FA2 too on 10.x
    where FA4 has no kernel of the keys' width; here also where it has none of the values'.
    """
    major = 0 if device.capability is None else device.capability.major
    if major == 9:
        return "FA3"
    if major == 10 and prefill_refusal("FA4", device, qk_head_dim, v_head_dim) is None:
        return "FA4"
    return "FA2"


def usual_prefills(device: Device) -> tuple[str, ...]:
    """What `default_prefill` may give on `device`, the usual one first."""
    deepseek, without_fa4 = (192, 128), (256, 128)
    found = (default_prefill(device, *widths) for widths in (deepseek, without_fa4))
    return tuple(dict.fromkeys(found))


def prefill_refusal(prefill: str, device: Device, qk_head_dim: int, v_head_dim: int) -> str | None:
    """Why `prefill` has no kernel for these widths on `device`; None: it has, or pads to one."""
    lib = LIBRARIES[prefill]
    capability = device.capability
    if capability is not None and lib.majors and capability.major not in lib.majors:
        wanted = ", ".join(f"{major}.x" for major in lib.majors)
        return f"{prefill} needs compute capability {wanted}, {device} has {capability}"
    if lib.version == 4 and not _fa4_takes(qk_head_dim, v_head_dim, device):
        return (
            f"FA4 has no kernel for keys of {qk_head_dim} numbers and values of {v_head_dim} on "
            f"{device}; ask for +FA2"
        )
    return None


def _fa4_takes(qk_head_dim: int, v_head_dim: int, device: Device) -> bool:
    """FA4's own rule (cute/interface.py: _validate_head_dims); vLLM pads no values for it."""
    widths = (qk_head_dim, v_head_dim)
    if any(width < 8 or width % 8 for width in widths):
        return False
    if device.capability is not None and device.capability.major >= 10:
        return max(widths) <= 128 or widths in ((192, 128), (64, 512), (256, 256))
    return max(widths) <= 512


def takes_widths(lib: Library, qk_head_dim: int, v_head_dim: int) -> bool:
    """Whether values may have another width than the keys; else they are padded to it.

    FA3's own rule (hopper/flash_api.cpp); FA2 has one width for all, FA4 one for each.
    """
    if qk_head_dim == v_head_dim or lib.version == 4:
        return True
    if lib.version == 2:
        return False
    large = 128 < qk_head_dim <= 192 and 96 < v_head_dim <= 128
    return large or (qk_head_dim <= 64 and v_head_dim <= 512)
