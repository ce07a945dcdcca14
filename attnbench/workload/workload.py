"""`Workload`: what is measured, as a value that has one canonical text and one id."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attnbench.errors import WorkloadError
from attnbench.workload.batch_spec import (
    MAX_TOKENS,
    batch_phase,
    check_batch_spec,
    format_batch_spec,
)
from attnbench.workload.identity import short_hash
from attnbench.workload.lengths import draw_lengths, normalise_lengths
from attnbench.workload.model import EXPECTED as MODEL_EXPECTED
from attnbench.workload.model import ModelSizes
from attnbench.workload.shapes import get_shape
from attnbench.workload.text import (
    DS_MLA,
    DTYPES,
    KV_CACHE_DTYPES,
    LAYOUTS,
    MAX_SEED,
    TOPK_PATTERNS,
    format_workload_text,
    parse_workload_text,
)
from attnbench.workload.types import AttentionShape, AttentionType, Phase, Request, WorkloadFields


@dataclass(frozen=True, kw_only=True)
class Workload(WorkloadFields):
    """An attention shape, a batch spec, types, cache and features. Hashable, and valid once made.

    Two workloads that mean the same are equal and have the same text: a `kv_cache_dtype` that is
    the dtype becomes `auto`, and `lengths` gets its one spelling.

    Example:
        >>> Workload.parse("8q1s4096 block=16 dtype=fp32").text
        '8q1s4k dtype=fp32'

    Raises:
        WorkloadError: the fields contradict each other or are out of range.
    """

    def __post_init__(self) -> None:
        _one_of("attn", self.attn_type, tuple(AttentionType))
        object.__setattr__(self, "attn_type", AttentionType(self.attn_type))
        if self.kv_cache_dtype == self.dtype:
            object.__setattr__(self, "kv_cache_dtype", "auto")
        object.__setattr__(self, "lengths", normalise_lengths(self.lengths))
        check_batch_spec(self.batch_spec)
        check_shape(self.shape)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("layout", self.kv_cache_layout, LAYOUTS)
        _in_range("block", self.block_size, 1, MAX_TOKENS, 16)
        _in_range("prefix", self.common_prefix_len, 0, MAX_TOKENS, 512)
        _in_range("seed", self.seed, 0, MAX_SEED, 7)
        if self.shape.is_mla and self.kv_cache_layout != "NHD":
            raise WorkloadError("layout=HND: an MLA cache has no head dimension; leave layout= out")
        self._check_prefix()
        self._check_attn_type()
        self._check_topk()
        self._check_ds_mla()
        self._check_model()

    def _check_prefix(self) -> None:
        prefix = self.common_prefix_len
        context = min(r.seq_len - r.query_len for r in self.batch_spec.requests)
        if prefix > context:
            raise WorkloadError(
                f"prefix={prefix}: longer than the shortest context of "
                f"{format_batch_spec(self.batch_spec)} ({context} tokens: seq_len - query_len); "
                "write a shorter prefix or longer sequences"
            )
        if prefix % self.block_size:
            raise WorkloadError(
                f"prefix={prefix}: only whole blocks of {self.block_size} tokens can be shared; "
                f"write prefix={prefix // self.block_size * self.block_size}"
                f" or prefix={(prefix // self.block_size + 1) * self.block_size}"
            )

    def _check_attn_type(self) -> None:
        if self.attn_type is AttentionType.DECODER:
            return
        if self.shape.is_mla:
            raise WorkloadError(f"attn={self.attn_type}: MLA is decoder attention; leave attn= out")
        if self.attn_type is AttentionType.ENCODER_DECODER:
            if self.shape.sliding_window:
                raise WorkloadError(
                    f"window={self.shape.sliding_window}: a window over encoder tokens has no "
                    "meaning in encoder_decoder attention; write window=0"
                )
            return
        for request in self.batch_spec.requests:
            if request.query_len != request.seq_len:
                raise WorkloadError(
                    f"attn={self.attn_type}: an encoder request attends to its own tokens, nothing "
                    f"is cached; write q{request.query_len} without s{request.seq_len}"
                )

    def _check_topk(self) -> None:
        """Sparse attention is MLA's: an indexer picks latents for every query (DeepSeek-V3.2)."""
        if not self.topk_tokens and not self.topk_pattern:
            return
        word = f"topk={self.topk_tokens}:{self.topk_pattern}"
        if self.topk_pattern not in TOPK_PATTERNS:
            raise WorkloadError(
                f"{word}: unknown pattern; write one of "
                + ", ".join(f"topk={self.topk_tokens or 2048}:{name}" for name in TOPK_PATTERNS)
            )
        if not 1 <= self.topk_tokens <= MAX_TOKENS:
            raise WorkloadError(
                f"{word}: expected 1 to {MAX_TOKENS} tokens, e.g. topk=2048:{self.topk_pattern}; "
                "for dense attention leave topk= out"
            )
        if not self.shape.is_mla:
            raise WorkloadError(
                f"{word}: only latent attention is sparse; name an MLA shape, e.g. "
                "shape=deepseek-v3.2, or leave topk= out"
            )
        if self.shape.sliding_window:
            raise WorkloadError(
                f"{word}: no sparse layer has a sliding window too; leave window= out, or write "
                f"topk={self.shape.sliding_window}:window without it"
            )

    def _check_ds_mla(self) -> None:
        """The format fixes widths and the type of its rotary part."""
        if self.kv_cache_dtype != DS_MLA:
            return
        widths = (self.shape.kv_lora_rank, self.shape.qk_rope_head_dim)
        if widths != (512, 64) or self.dtype != "bf16":
            raise WorkloadError(
                f"kv={DS_MLA}: a token is 512 e4m3 numbers, four scales and 64 bf16 ones, so it "
                "needs an MLA shape of 512+64 and dtype=bf16, e.g. shape=deepseek-v3.2; for "
                "another shape write kv=fp8_e4m3"
            )

    def _check_model(self) -> None:
        """A step is one of a decoder whose layers are all of one dense kind."""
        if not self.model:
            return
        word = f"model={self.model}"
        try:
            sizes = ModelSizes.parse(self.model)
        except ValueError:
            raise WorkloadError(
                f"{word}: expected {MODEL_EXPECTED}, e.g. model=4096:14336:128256"
            ) from None
        object.__setattr__(self, "model", sizes.text)
        if self.attn_type is not AttentionType.DECODER or self.is_sparse:
            raise WorkloadError(
                f"{word}: a step is one of dense decoder attention; leave attn= and topk= out, or "
                "leave model= out"
            )
        if sizes.q_lora_rank and not self.shape.is_mla:
            raise WorkloadError(
                f"{word}: only MLA's query has a low rank; leave :q{sizes.q_lora_rank} out"
            )
        if self.shape.num_layers < sizes.num_dense_layers:
            raise WorkloadError(
                f"{word}: {sizes.num_dense_layers} dense layers come first, and layers= is "
                f"{self.shape.num_layers}; write layers={sizes.num_dense_layers + 1} or more"
            )

    @property
    def is_step(self) -> bool:
        """Whether this is a whole step of a model, not attention alone."""
        return bool(self.model)

    @property
    def attention(self) -> Workload:
        """The attention of a step by itself: without `model=` and `layers=`."""
        shape = self.shape
        layers = get_shape(shape.name, shape.tensor_parallel_size).num_layers if shape.name else 1
        return self.replace(model="", shape=dataclasses.replace(shape, num_layers=layers))

    @classmethod
    def parse(cls, text: str) -> Workload:
        """The workload that `text` describes, e.g. `8q1s4k dtype=fp32 shape=qwen3-8b`."""
        return cls(**parse_workload_text(text))

    @cached_property
    def text(self) -> str:
        """Canonical text: `Workload.parse(w.text) == w`."""
        return format_workload_text(self)

    @cached_property
    def id(self) -> str:
        """16 hex digits made from the canonical text alone."""
        return short_hash("workload", self.text)

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The requests, in order, after `lengths` and `seed` are applied."""
        return draw_lengths(
            self.batch_spec.requests, self.lengths, self.seed, self.common_prefix_len
        )

    @property
    def phase(self) -> Phase:
        """What the batch spec as written does; drawn lengths do not change it."""
        return batch_phase(self.batch_spec)

    @property
    def num_reqs(self) -> int:
        return len(self.batch_spec.requests)

    @property
    def num_tokens(self) -> int:
        """Query tokens of one call."""
        return sum(request.query_len for request in self.requests)

    @property
    def is_sparse(self) -> bool:
        """Whether each query attends to `topk_tokens` cached tokens only."""
        return self.topk_tokens > 0

    @property
    def causal(self) -> bool:
        """Whether a token sees only tokens at or before its own position."""
        return self.attn_type is AttentionType.DECODER

    @property
    def resolved_kv_cache_dtype(self) -> str:
        """`kv_cache_dtype`, or the dtype where it is `auto`."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def replace(self, **changes: Any) -> Workload:
        """A copy with some fields replaced (names of `WorkloadFields`), checked again."""
        return dataclasses.replace(self, **changes)

    def columns(self) -> dict[str, str | int | float | bool]:
        """The identity columns of a stored row. `kv_cache_dtype` is resolved, never `auto`."""
        shape = self.shape
        return {
            "workload_id": self.id,
            "workload": self.text,
            "batch_spec": format_batch_spec(self.batch_spec),
            "shape": shape.name,
            "tensor_parallel_size": shape.tensor_parallel_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_size": shape.head_size,
            "v_head_size": shape.v_head_size,
            "kv_lora_rank": shape.kv_lora_rank,
            "qk_nope_head_dim": shape.qk_nope_head_dim,
            "qk_rope_head_dim": shape.qk_rope_head_dim,
            "dtype": self.dtype,
            "kv_cache_dtype": self.resolved_kv_cache_dtype,
            "block_size": self.block_size,
            "kv_cache_layout": self.kv_cache_layout,
            "attn_type": str(self.attn_type),
            "sliding_window": shape.sliding_window,
            "logits_soft_cap": float(shape.logits_soft_cap),
            "has_sink": shape.has_sink,
            "use_alibi": shape.use_alibi,
            "common_prefix_len": self.common_prefix_len,
            "lengths": self.lengths,
            "seed": self.seed,
            "topk_tokens": self.topk_tokens,
            "topk_pattern": self.topk_pattern,
            "phase": str(self.phase),
            "num_reqs": self.num_reqs,
            "num_tokens": self.num_tokens,
        }


def check_shape(shape: AttentionShape) -> None:
    """Raise WorkloadError unless a workload text can describe `shape`."""
    for key, number in (
        ("num_heads", shape.num_heads),
        ("num_kv_heads", shape.num_kv_heads),
        ("head_size", shape.head_size),
        ("v_head_size", shape.v_head_size),
        ("num_layers", shape.num_layers),
    ):
        _in_range(key, number, 1, MAX_TOKENS, 8)
    _in_range("window", shape.sliding_window, 0, MAX_TOKENS, 4096)
    if not 0.0 <= shape.logits_soft_cap < math.inf:
        raise WorkloadError(
            f"softcap={shape.logits_soft_cap}: expected a number, 0 for none, e.g. softcap=50"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise WorkloadError(
            f"heads={shape.num_heads}/{shape.num_kv_heads}: num_kv_heads must divide num_heads, "
            "e.g. heads=32/8"
        )
    latent = (shape.kv_lora_rank, shape.qk_nope_head_dim, shape.qk_rope_head_dim)
    if any(latent):
        width = shape.kv_lora_rank + shape.qk_rope_head_dim
        if min(latent) < 1 or shape.num_kv_heads != 1 or shape.head_size != width:
            raise WorkloadError(
                "an MLA shape has all of kv_lora_rank, qk_nope_head_dim and qk_rope_head_dim, one "
                "KV head and head_size = kv_lora_rank + qk_rope_head_dim, "
                "e.g. heads=128/1 mla=512+64:128+128"
            )
    if shape.name:
        named = get_shape(shape.name, shape.tensor_parallel_size)
        if _geometry(shape) != _geometry(named):
            raise WorkloadError(
                f"a shape named {shape.name} with other heads or widths than {shape.name} has; "
                'set name="" and tensor_parallel_size=1 for a shape by numbers'
            )
    elif shape.tensor_parallel_size != 1:
        raise WorkloadError(
            f"tp={shape.tensor_parallel_size}: a shape by numbers is already one rank's; "
            "leave tp= out or name the shape, e.g. shape=llama-3-70b tp=4"
        )


def _geometry(shape: AttentionShape) -> tuple[int, ...]:
    return (
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        shape.v_head_size,
        shape.kv_lora_rank,
        shape.qk_nope_head_dim,
        shape.qk_rope_head_dim,
    )


def _one_of(key: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise WorkloadError(
            f"{key}={value}: expected one of {', '.join(names)}, e.g. {key}={names[0]}"
        )


def _in_range(key: str, value: int, low: int, high: int, example: int) -> None:
    if not low <= value <= high:
        raise WorkloadError(f"{key}={value}: expected {low} to {high}, e.g. {key}={example}")
