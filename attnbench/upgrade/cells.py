"""The questions a selector is asked, and the grid of them that an upgrade is judged on.

A cell is one layer on one device: the shape, types and features that an engine's selector reads.
Its text is its identity (`head_size=64 kv=fp8 sinks=1`), defaults left out, so that cells of two
versions, of two runs and of two people can be laid side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from attnbench.workload.types import AttentionShape


@dataclass(frozen=True, slots=True, kw_only=True)
class MLADims:
    """Widths of a latent-attention layer."""

    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    @property
    def head_size(self) -> int:
        """Width of the cached latent, which is what a selector calls the head size."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def __str__(self) -> str:
        return (
            f"{self.kv_lora_rank}+{self.qk_rope_head_dim}:{self.qk_nope_head_dim}+{self.v_head_dim}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One question. Heads are one rank's; `block_size` None: the engine chooses.

    `topk` is the number of keys a sparse MLA query reads (0: dense). `model` says whose layer it
    is; `hf_config`, its `config.json`, lets the engine's own rules for that model speak before its
    selector does, `layer_head_sizes` are the head sizes of all its layers.
    """

    head_size: int = 128
    num_heads: int = 32
    num_kv_heads: int = 8
    dtype: str = "bf16"
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    sliding_window: int = 0
    sinks: bool = False
    softcap: bool = False
    alibi: bool = False
    attn_type: str = "decoder"
    mm_prefix: bool = False
    mla: MLADims | None = None
    topk: int = 0
    dcp: int = 1
    pcp: int = 1
    batch_invariant: bool = False
    num_speculative_tokens: int = 0
    model: str = ""
    hf_config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    layer_head_sizes: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def text(self) -> str:
        """The cell's identity: head size first, then what differs from a plain decoder layer."""
        words = [self.model] if self.model else []
        if self.mla is None:
            words.append(f"head_size={self.head_size}")
        else:
            words.append(f"mla={self.mla}")
        if self.mla is not None:
            words.append(f"heads={self.num_heads}")
        elif (self.num_heads, self.num_kv_heads) != (32, 8):
            words.append(f"heads={self.num_heads}/{self.num_kv_heads}")
        for name, word in _WORDS.items():
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                words.append(f"{word}={int(value) if isinstance(value, bool) else value}")
        return " ".join(words)

    def case(self) -> dict[str, Any]:
        """The cell as the probe is asked it (JSON)."""
        case = {f.name: getattr(self, f.name) for f in fields(self)}
        case["case_id"] = self.text
        case["hf_config"] = dict(self.hf_config or {})
        case["layer_head_sizes"] = list(self.layer_head_sizes)
        if self.mla is not None:
            case["mla"] = {f.name: getattr(self.mla, f.name) for f in fields(self.mla)}
        return case


_WORDS = {
    "dtype": "dtype",
    "kv_cache_dtype": "kv",
    "block_size": "block",
    "sliding_window": "window",
    "sinks": "sinks",
    "softcap": "softcap",
    "alibi": "alibi",
    "attn_type": "attn",
    "mm_prefix": "mm_prefix",
    "topk": "topk",
    "dcp": "dcp",
    "pcp": "pcp",
    "batch_invariant": "batch_invariant",
    "num_speculative_tokens": "speculative",
}
_DEFAULTS = {f.name: f.default for f in fields(Cell)}


def cell_of_shape(shape: AttentionShape, **changes: Any) -> Cell:
    """The cell of a named model's layer (`workload/shapes.py`)."""
    mla = None
    if shape.is_mla:
        mla = MLADims(
            kv_lora_rank=shape.kv_lora_rank,
            qk_nope_head_dim=shape.qk_nope_head_dim,
            qk_rope_head_dim=shape.qk_rope_head_dim,
            v_head_dim=shape.v_head_size,
        )
    values: dict[str, Any] = {
        "model": shape.name,
        "head_size": shape.head_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "sliding_window": shape.sliding_window,
        "sinks": shape.has_sink,
        "softcap": shape.logits_soft_cap > 0,
        "alibi": shape.use_alibi,
        "mla": mla,
    }
    return Cell(**(values | changes))


def default_grid() -> tuple[Cell, ...]:
    """Every cell that is asked when no model is named, in a fixed order, none twice."""
    return tuple(dict.fromkeys([*_plain(), *_latent(), *_sparse()]))


def _plain() -> Iterator[Cell]:
    for head_size in (32, 40, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512):
        yield Cell(head_size=head_size)
    for dtype in ("fp16", "fp32"):
        for head_size in (64, 128, 256):
            yield Cell(head_size=head_size, dtype=dtype)
    for head_size in (64, 80, 128, 256):
        for kv in ("fp8", "fp8_e5m2"):
            yield Cell(head_size=head_size, kv_cache_dtype=kv)
    for kv in ("nvfp4", "int8_per_token_head", "fp8_per_token_head", "turboquant_4bit_nc"):
        yield Cell(kv_cache_dtype=kv)
        yield Cell(kv_cache_dtype=kv, head_size=64)
    for block_size in (16, 32, 64, 128, 256):
        yield Cell(block_size=block_size)
        yield Cell(block_size=block_size, kv_cache_dtype="fp8")
        yield Cell(block_size=block_size, head_size=256)
    for heads in ((32, 32), (64, 8), (8, 1), (71, 1), (128, 8), (5, 1)):
        yield Cell(num_heads=heads[0], num_kv_heads=heads[1])
        yield Cell(num_heads=heads[0], num_kv_heads=heads[1], kv_cache_dtype="fp8")
    for head_size in (64, 128, 256):
        for kv in ("auto", "fp8"):
            yield Cell(head_size=head_size, kv_cache_dtype=kv, sliding_window=4096)
            yield Cell(head_size=head_size, kv_cache_dtype=kv, softcap=True)
            yield Cell(head_size=head_size, kv_cache_dtype=kv, batch_invariant=True)
            yield Cell(head_size=head_size, kv_cache_dtype=kv, dcp=2)
            yield Cell(head_size=head_size, kv_cache_dtype=kv, pcp=2)
            yield Cell(head_size=head_size, kv_cache_dtype=kv, num_speculative_tokens=3)
    for head_size in (64, 128):
        for kv in ("auto", "fp8"):
            for window in (0, 128):
                yield Cell(
                    head_size=head_size,
                    num_heads=64,
                    sinks=True,
                    kv_cache_dtype=kv,
                    sliding_window=window,
                )
        yield Cell(head_size=head_size, num_heads=32, num_kv_heads=32, alibi=True)
        for attn_type in ("encoder", "encoder_only", "encoder_decoder"):
            yield Cell(head_size=head_size, num_kv_heads=32, attn_type=attn_type)
    for head_size in (128, 256, 512):
        for kv in ("auto", "fp8"):
            yield Cell(head_size=head_size, kv_cache_dtype=kv, mm_prefix=True)
    yield Cell(head_size=256, mm_prefix=True, sliding_window=1024)


def _latent() -> Iterator[Cell]:
    for num_heads in (128, 64, 16):
        for kv in ("auto", "fp8"):
            yield _mla(num_heads=num_heads, kv_cache_dtype=kv)
            yield _mla(num_heads=num_heads, kv_cache_dtype=kv, dcp=2)
    for kv in ("auto", "fp8"):
        for block_size in (16, 32, 64, 128):
            yield _mla(kv_cache_dtype=kv, block_size=block_size)
        yield _mla(kv_cache_dtype=kv, batch_invariant=True)
        yield _mla(kv_cache_dtype=kv, pcp=2)
        yield _mla(kv_cache_dtype=kv, num_speculative_tokens=3)
        yield _mla(kv_cache_dtype=kv, dtype="fp16")
        yield _mla(kv_cache_dtype=kv, sliding_window=512)
        yield _mla(MLADims(qk_nope_head_dim=192, v_head_dim=256), kv_cache_dtype=kv)
        yield _mla(
            MLADims(kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
            num_heads=40,
            kv_cache_dtype=kv,
        )


def _sparse() -> Iterator[Cell]:
    for num_heads in (128, 64, 16, 8):
        for kv in ("auto", "fp8", "fp8_ds_mla"):
            yield _mla(num_heads=num_heads, kv_cache_dtype=kv, topk=2048)
    for block_size in (32, 64, 128):
        yield _mla(topk=2048, block_size=block_size)
    yield _mla(topk=2048, dcp=2)
    yield _mla(topk=2048, dtype="fp16")
    yield _mla(topk=2048, num_speculative_tokens=3)
    yield _mla(MLADims(qk_nope_head_dim=192, v_head_dim=256), topk=2048)


def _mla(dims: MLADims | None = None, *, num_heads: int = 128, **features: Any) -> Cell:
    dims = dims or MLADims()
    return Cell(head_size=dims.head_size, num_heads=num_heads, num_kv_heads=1, mla=dims, **features)
