"""device × dtype × feature -> backend and why, without any of the devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.backends.dtypes import torch_dtype
from attnbench.errors import UsageError
from attnbench.selection.platform import platforms
from attnbench.selection.selector import Candidate, consider
from attnbench.workload.closest import did_you_mean
from attnbench.workload.types import AttentionType

DTYPES = ("bf16", "fp16", "fp32")

# DeepSeek-V3's latent layer: 512 + 64 wide, heads of 128 + 64 and 128.
_MLA: Mapping[str, Any] = {
    "use_mla": True,
    "head_size": 576,
    "num_heads": 128,
    "num_kv_heads": 1,
    "v_head_size": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
}

#: What each feature changes in a plain decoder layer: 32/8 heads of 128, cache of the same type,
#: block size and layout left to the backend.
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "head 64": {"head_size": 64},
    "head 96": {"head_size": 96},
    "head 256": {"head_size": 256},
    "v head 64": {"v_head_size": 64},
    "block 16": {"block_size": 16},
    "block 64": {"block_size": 64},
    "block 128": {"block_size": 128},
    "block 1": {"block_size": 1},
    "fp8 KV": {"kv_cache_dtype": "fp8_e4m3"},
    "fp8_e5m2 KV": {"kv_cache_dtype": "fp8_e5m2"},
    "sinks": {"has_sink": True, "head_size": 64},
    "sliding window": {"has_sliding_window": True},
    "soft cap": {"has_logits_soft_cap": True},
    "alibi": {"use_alibi": True},
    "non-causal": {"use_non_causal": True},
    "batch invariant": {"use_batch_invariant": True},
    "multimodal prefix": {"use_mm_prefix": True},
    "encoder": {"attn_type": AttentionType.ENCODER},
    "encoder only": {"attn_type": AttentionType.ENCODER_ONLY},
    "encoder-decoder": {"attn_type": AttentionType.ENCODER_DECODER},
    "MLA": _MLA,
    "MLA fp8 KV": {**_MLA, "kv_cache_dtype": "fp8_e4m3"},
    "MLA block 64": {**_MLA, "block_size": 64},
    "MLA sparse": {**_MLA, "use_sparse": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One (device, dtype, feature). `backend` is "" where nothing accepts it."""

    device: str
    dtype: str
    feature: str
    head_size: int
    kv_cache_dtype: str
    block_size: int | None
    backend: str
    source: str
    note: str
    followed: str
    follows: str
    refused: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """The cell as a line of a table: names of columns are names of fields."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "feature": self.feature,
            "head_size": self.head_size,
            "kv_cache_dtype": self.kv_cache_dtype,
            "block_size": self.block_size,
            "backend": self.backend or "none",
            "source": self.source,
            "note": self.note,
            "followed": self.followed or "none",
            "refused": list(self.refused),
        }


def default_devices() -> tuple[Device, ...]:
    """Every platform's examples: what the matrix shows when no device is named."""
    found = []
    for platform in platforms():
        found += [platform.parse_device(text) for text in platform.examples]
    return tuple(device for device in found if device is not None)


def config_with(feature: str, dtype: torch.dtype) -> AttentionConfig:
    """The plain layer with one feature.

    Raises: UsageError for a feature that is not in `FEATURES`.
    """
    if feature not in FEATURES:
        raise UsageError(f"unknown feature {feature!r}; {did_you_mean(feature, FEATURES)}")
    plain: dict[str, Any] = {"head_size": 128, "num_heads": 32, "num_kv_heads": 8}
    return AttentionConfig(dtype=dtype, **(plain | dict(FEATURES[feature])))


def matrix(
    devices: Iterable[Device] = (),
    dtypes: Iterable[str] = (),
    features: Iterable[str] = (),
) -> Iterator[Cell]:
    """Cells of every combination; an empty argument means all that are known.

    Raises: UsageError for an unknown dtype or feature.
    """
    for device in tuple(devices) or default_devices():
        for dtype in tuple(dtypes) or DTYPES:
            if dtype not in DTYPES:
                raise UsageError(f"unknown dtype {dtype!r}; {did_you_mean(dtype, DTYPES)}")
            for feature in tuple(features) or FEATURES:
                yield _cell(device, dtype, feature)


def _cell(device: Device, dtype: str, feature: str) -> Cell:
    config = config_with(feature, torch_dtype(dtype))
    selection = consider(config, device)
    refused = selection.better_ranked()
    chosen: Candidate | None = None
    if selection.backend:
        chosen = selection.candidates[len(refused)]
    return Cell(
        device=str(device),
        dtype=dtype,
        feature=feature,
        head_size=config.head_size,
        kv_cache_dtype=config.kv_cache_dtype,
        block_size=config.block_size,
        backend=selection.backend,
        source=str(chosen.source) if chosen else "",
        note=chosen.note if chosen else "",
        followed=selection.followed,
        follows=selection.follows,
        refused=tuple(f"{c.name}: {', '.join(c.reasons)}" for c in refused),
    )
