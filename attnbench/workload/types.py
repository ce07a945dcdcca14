"""The values a workload is made of. No torch here: these words are used by every room.

Lengths are in tokens. Names are vLLM's (`vllm/v1/attention/backend.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class AttentionType(StrEnum):
    """vLLM's four kinds of attention (`vllm/v1/attention/backend.py: AttentionType`)."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class Phase(StrEnum):
    """What a batch does. One kind of request: its name; several kinds together: mixed."""

    PREFILL = "prefill"
    DECODE = "decode"
    EXTEND = "extend"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, order=True)
class Request:
    """One request of a batch: `query_len` new tokens at the end of `seq_len` tokens."""

    query_len: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """The requests of one engine step, in order. Text form: vLLM's `8q1s4k`, `2q2k_32q1s1k`."""

    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One attention layer of a model on one rank.

    For MLA (`kv_lora_rank > 0`) `head_size` is the latent width `kv_lora_rank + qk_rope_head_dim`
    (576 for DeepSeek-V3), `num_kv_heads` is 1 and `v_head_size` is the value width of the expanded
    form (128 for DeepSeek-V3), as in vLLM.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    sliding_window: int = 0  # tokens a query sees, itself included; 0: all
    logits_soft_cap: float = 0.0  # 0: none
    has_sink: bool = False
    use_alibi: bool = False
    num_layers: int = 1
    name: str = ""  # registered name, "" when given by numbers
    tensor_parallel_size: int = 1
    source: str = field(default="", compare=False)

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head in the expanded form (192 for DeepSeek-V3)."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_size

    @property
    def scale(self) -> float:
        """Softmax scale, 1/sqrt(width of a query head in the expanded form)."""
        return 1.0 / math.sqrt(self.qk_head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFields:
    """The fields of a `Workload`; the text form and the derived values are in `workload.py`."""

    batch_spec: BatchSpec
    shape: AttentionShape
    dtype: str = "bf16"  # fp32, fp16, bf16
    #: auto (= dtype), fp32, fp16, bf16, fp8_e4m3, fp8_e5m2, fp8_ds_mla
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    kv_cache_layout: str = "NHD"  # NHD or HND
    attn_type: AttentionType = AttentionType.DECODER
    common_prefix_len: int = 0  # tokens all requests share, in the same KV blocks
    lengths: str = ""  # "" as the batch spec says; "geometric"; "uniform:0.5"
    seed: int = 0
    topk_tokens: int = 0  # cached tokens each query attends to; 0: all it may see (dense)
    topk_pattern: str = ""  # which: random, prefix, window; "" when dense
    model: str = ""  # sizes around the layer (`workload/model.py`): a step; "": attention alone


IdentityColumns = Mapping[str, str | int | float | bool]
