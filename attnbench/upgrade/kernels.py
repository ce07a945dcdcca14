"""Which of attnbench's backends and variants runs the kernels that a vLLM chooses for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnbench.errors import BackendUnavailableError, UnknownBackendError
from attnbench.upgrade.batches import UnmeasurableError
from attnbench.upgrade.probe import CellAnswer
from attnbench.workload import Phase, Workload

BEHIND_KERNELS = frozenset(
    {
        "flash_attn_version",
        "flashinfer_decode",
        "flashinfer_prefill",
        "mla_prefill_backend",
        "preferred_block_size",
        "kv_cache_layout",
        "effective_kv_cache_dtype",
    }
)
"""What is behind a name and makes other kernels run, or the same ones over another cache."""


NATIVE = "native"
"""FlashInfer's own kernels, as the probe says it (`vllm_probe/behind.py`)."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """A backend and the variants any of which runs the kernels in question, the best first."""

    backend: str
    variants: tuple[str, ...] = ("",)

    @property
    def request(self) -> str:
        """As `--backend` takes it."""
        return f"{self.backend}:{self.variants[0]}" if self.variants[0] else self.backend


def vllm_kernels(answer: CellAnswer) -> Kernels:
    """vLLM's own class, to be measured in an environment with that version."""
    return Kernels(f"VLLM:{answer.backend}")


def own_kernels(answer: CellAnswer, workload: Workload, capability: str) -> Kernels:
    """attnbench's adapter of the same kernels.

    Raises UnmeasurableError where there is none, or none whose prefill and decode are this mix.
    """
    name = answer.backend or ""
    major = 0 if capability == "cpu" else int(capability.partition(".")[0])
    if name == "FLASH_ATTN":
        return Kernels(name, _flash_attn(answer))
    if name == "FLASHINFER":
        return Kernels(name, _flashinfer(answer.behind, workload, major))
    if workload.shape.is_mla:
        return Kernels(name, _latent(answer, name, workload, capability, major))
    return Kernels(name, (_default_variant(name, workload, capability),))


def _flash_attn(answer: CellAnswer) -> tuple[str, ...]:
    version = answer.behind.get("flash_attn_version")
    if version is None:
        raise UnmeasurableError("the version of FlashAttention is not known")
    return (f"FA{version}", f"FA{version}_UPSTREAM")


def _flashinfer(behind: Mapping[str, Any], workload: Workload, major: int) -> tuple[str, ...]:
    """By phase: prefills and decodes of a step may run different kernels."""
    decode, prefill = behind.get("flashinfer_decode"), behind.get("flashinfer_prefill")
    if decode is None or prefill is None:
        raise UnmeasurableError("which of FlashInfer's kernels a step gets is not known")
    is_fp8 = workload.resolved_kv_cache_dtype.startswith("fp8")
    native = "FA3" if major == 9 and not is_fp8 and workload.shape.head_size <= 256 else "FA2"
    if workload.phase is Phase.DECODE:
        if decode != NATIVE:
            return (decode,)
        return (native, *(("FA2",) if native == "FA3" else ()))  # both decode by fa2
    if workload.phase in (Phase.PREFILL, Phase.EXTEND):
        return (native if prefill == NATIVE else prefill,)
    if decode == prefill:
        return (native if prefill == NATIVE else prefill,)
    if decode == "XQA" and prefill == NATIVE and native == "FA2":
        return ("XQA",)
    raise UnmeasurableError("no variant of FLASHINFER has this mix of prefill and decode kernels")


def _latent(
    answer: CellAnswer, name: str, workload: Workload, capability: str, major: int
) -> tuple[str, ...]:
    variant = _default_variant(name, workload, capability)
    version = answer.behind.get("flash_attn_version")
    if name == "FLASH_ATTN_MLA" and version != 3:
        raise UnmeasurableError(f"attnbench has no FLASH_ATTN_MLA by FlashAttention {version}")
    if workload.phase is Phase.DECODE:
        return (variant,)
    prefill = answer.behind.get("mla_prefill_backend")
    if prefill != "FLASH_ATTN" or major == 10:
        raise UnmeasurableError(f"attnbench has no MLA prefill by {prefill} on {capability}")
    return (variant,)


def _default_variant(name: str, workload: Workload, capability: str) -> str:
    from attnbench.backends.device import parse_device
    from attnbench.backends.registry import get_backend_class, runnable_backend_names
    from attnbench.selection import config_of

    if name not in runnable_backend_names():
        raise UnmeasurableError(f"attnbench has no {name or 'backend'} of its own")
    device = parse_device(capability)
    assert device is not None
    try:
        backend = get_backend_class(name)
    except (BackendUnavailableError, UnknownBackendError) as error:
        raise UnmeasurableError(str(error)) from error
    return backend.default_variant(config_of(workload), device)
