"""Which backend and variant is run with which workload: what its predicates accept."""

from __future__ import annotations

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.cutlass_mla import CutlassMLABackend
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flash_attn_mla import FlashAttentionMLABackend
from attnbench.backends.flashinfer_mla import FlashInferMLABackend
from attnbench.backends.flashmla import FlashMLABackend
from attnbench.backends.mla_libraries import MLA_LIBRARIES
from attnbench.workload import Workload
from tests.backends.mla.fake_library import RECORDED
from tests.backends.running import config_of

BACKENDS: dict[str, type[AttentionBackend]] = {
    "FLASHMLA": FlashMLABackend,
    "FLASH_ATTN_MLA": FlashAttentionMLABackend,
    "FLASHINFER_MLA": FlashInferMLABackend,
    "CUTLASS_MLA": CutlassMLABackend,
}
BLOCKS = {"FLASHMLA": 64, "FLASH_ATTN_MLA": 16, "FLASHINFER_MLA": 32, "CUTLASS_MLA": 128}
#: (record, backend, variant).
BUILDS = [
    *(
        (record, facts["backend"], variant)
        for record, facts in RECORDED.items()
        for variant in facts["variants"]
    ),
    ("vllm-0.22.1 flash_attn", "FLASH_ATTN_MLA", "FA3"),
    ("hopper-2.8.3 flash_attn", "FLASH_ATTN_MLA", "FA3_UPSTREAM"),
    ("hopper-01afd16 flash_attn", "FLASH_ATTN_MLA", "FA3_UPSTREAM"),
]


def device_of(backend: str, variant: str) -> Device:
    """A device the variant has kernels for, Hopper where it has."""
    majors = MLA_LIBRARIES[backend][variant.partition("+")[0]].majors
    return cuda_device(9 if 9 in majors else majors[0], 0)


def with_block(backend: str, text: str) -> str:
    return text if "block=" in text else f"{text} block={BLOCKS[backend]}"


def refused(backend: str, variant: str, text: str, device: Device | None = None) -> str | None:
    """Why the backend or its variant refuses the workload; None: it runs."""
    config = config_of(Workload.parse(text))
    where = device or device_of(backend, variant)
    cls = BACKENDS[backend]
    reasons = cls.validate_configuration(config, where)
    return "; ".join(reasons) or cls.variant_refusal(variant, config, where)
