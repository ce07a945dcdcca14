"""Runs a workload on a variant; CASCADE gets the prefix, as the measuring room gives it."""

from __future__ import annotations

from attnbench.backends.device import Device
from attnbench.backends.flashinfer import FlashInferBackend as Backend
from attnbench.backends.flashinfer import FlashInferMetadata, FlashInferMetadataBuilder
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.workload import Workload
from tests.backends.running import Run, config_of


def refused(variant: str, text: str, device: Device) -> str | None:
    """Why a variant does not run a workload; None: it does."""
    workload = Workload.parse(text)
    config = config_of(workload)
    reasons = Backend.validate_configuration(config, device)
    if variant not in Backend.get_variants(device):
        reasons.append(f"{device} has no {variant}")
    if refusal := Backend.variant_refusal(variant, config, device):
        reasons.append(refusal)
    if variant == "CASCADE" and not workload.common_prefix_len:
        reasons.append("no shared prefix")
    return "; ".join(reasons) or None


def fitted(variant: str, text: str) -> str:
    """The workload in the layout the variant's devices require."""
    if variant == "TRTLLM_GEN" and "layout=" not in text:
        return f"{text} layout=HND"
    return text


class FlashInferRun(Run):
    """`Run`, which builds for a shared prefix where the builder wants it."""

    def __init__(self, text: str, variant: str, device: str = "cpu") -> None:
        super().__init__(
            _building_for(Workload.parse(text).common_prefix_len), text, variant, device
        )


def _building_for(prefix: int) -> type[Backend]:
    """The backend with a builder that decides about the cascade, as the measuring room does."""

    class Builder(FlashInferMetadataBuilder):
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> FlashInferMetadata:
            wanted = self.use_cascade_attention(prefix, [1], 1, 1, False, False, False, 1, 1)
            common_prefix_len = prefix if wanted else 0
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    class Deciding(Backend):
        @classmethod
        def get_builder_cls(cls) -> type[FlashInferMetadataBuilder]:
            return Builder

    return Deciding
