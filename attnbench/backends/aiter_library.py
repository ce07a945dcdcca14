"""AITER, AMD's kernels for Instinct GPUs: which functions the ROCM_AITER backends call, and how.

Read in the source of amd-aiter 0.1.7.post2.dev18 (its wheel) and of the project's main branch; the
recorded signatures are beside the tests. Nothing here imports `aiter` before `load_functions`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module as _import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.declared.vllm_0_22_1 import is_mi300
from attnbench.backends.device import Device
from attnbench.errors import BackendUnavailableError
from attnbench.workload.types import WorkloadFields

INSTALL = (
    "pip install amd-aiter on a ROCm build of torch, or build github.com/ROCm/aiter "
    "(git clone --recursive, python setup.py develop)"
)

#: Kernels by name, read off the source and the binaries of the wheel; not yet seen on hardware.
UNIFIED_PATTERN = r"\bkernel_unified_attention_[23]d\b|\b_?unified_attention_gluon_kernel"
PAGED_PATTERN = r"\bpaged_attention_ll4mi_QKV_mfma16_kernel"
FMHA_PATTERN = r"ck_tile::FmhaFwd|\bfmha_fwd_hd\d+"
TRITON_FMHA_PATTERN = r"^_?attn_fwd\b"
MLA_PATTERN = r"\bmla_(dec_stage1|a\d+w\d+)_"


@dataclass(frozen=True, slots=True)
class AiterFunction:
    """A function of AITER and the parameters passed to it.

    modules: where it is or was, the newest place first.
    """

    modules: tuple[str, ...]
    name: str
    parameters: tuple[str, ...]


_VARLEN = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("softmax_scale", "causal", "out"),
)
_UNIFIED = AiterFunction(
    ("aiter.ops.triton.attention.unified_attention", "aiter.ops.triton.unified_attention"),
    "unified_attention",
    (
        *("q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k"),
        *("softmax_scale", "causal", "window_size", "block_table", "softcap", "q_descale"),
        *("k_descale", "v_descale", "alibi_slopes", "sinks"),
    ),
)
_FMHA = AiterFunction(
    ("aiter",), "flash_attn_varlen_func", (*_VARLEN, "window_size", "alibi_slopes", "return_lse")
)
_PAGED = AiterFunction(
    ("aiter",),
    "paged_attention_v1",
    (
        *("out", "workspace_buffer", "query", "key_cache", "value_cache", "scale"),
        *("block_tables", "cu_query_lens", "context_lens", "max_context_len", "alibi_slopes"),
        *("kv_cache_dtype", "kv_cache_layout", "logits_soft_cap", "k_scale", "v_scale"),
        *("partition_size", "sliding_window"),
    ),
)
_MLA = AiterFunction(
    ("aiter.mla",),
    "mla_decode_fwd",
    (
        *("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"),
        *("max_seqlen_q", "sm_scale", "q_scale", "kv_scale"),
    ),
)
_TRITON_FMHA = AiterFunction(
    ("aiter.ops.triton.attention.mha", "aiter.ops.triton.mha"),
    "flash_attn_varlen_func",
    (*_VARLEN, "return_lse"),
)

#: Backend name: what it calls, by the role each has.
FUNCTIONS: Mapping[str, Mapping[str, AiterFunction]] = MappingProxyType(
    {
        "ROCM_AITER_UNIFIED_ATTN": {"unified": _UNIFIED},
        "ROCM_AITER_FA": {"paged": _PAGED, "varlen": _FMHA},
        "ROCM_AITER_MLA": {"mla": _MLA, "varlen": _FMHA},
        "ROCM_AITER_TRITON_MLA": {"mla": _MLA, "varlen": _TRITON_FMHA},
    }
)


def device_refusal(config: AttentionConfig, device: Device) -> str | None:
    """Why AITER's kernels do not serve `config` on `device`, whichever they are; None: they do."""
    if device.kind != "rocm":
        return None  # refused by its kind already
    arch = device.arch.partition("+")[0]
    if not is_mi300(device):
        return f"AITER's attention is built for gfx942 and gfx950, this is {arch}"
    if config.kv_cache_dtype == "fp8_e5m2":
        return "AITER reads e4m3 from an fp8 KV cache; use kv=fp8_e4m3"
    if config.kv_cache_dtype.startswith("fp8") and arch == "gfx942":
        # aiter/utility/dtypes.py: the fp8 of gfx942 is float8_e4m3fnuz.
        return (
            "fp8 on gfx942 is e4m3fnuz, whose numbers mean half of what our e4m3 cache holds; "
            "gfx950 has e4m3"
        )
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    is_fp8 = config.kv_cache_dtype.startswith("fp8")
    if not is_fp8 and config.kv_cache_dtype not in ("auto", names.get(config.dtype)):
        return f"a {config.kv_cache_dtype} KV cache needs queries of the same type"
    return None


def promised_by_phase(
    workload: WorkloadFields, decode: str, prefill: str
) -> tuple[tuple[str, ...], ...]:
    """`AttentionBackend.promised_kernels`, where requests of one new token have their own."""
    lengths = {request.query_len for request in workload.batch_spec.requests}
    groups = ((decode, 1 in lengths), (prefill, lengths != {1}))
    return tuple((pattern,) for pattern, is_run in groups if is_run)


def require_aiter(backend: str) -> None:
    """Raises BackendUnavailableError when AITER is not installed; imports nothing."""
    if "aiter" not in sys.modules and find_spec("aiter") is None:
        raise BackendUnavailableError(f"{backend} needs aiter, not installed; {INSTALL}")


def missing_reason(backend: str) -> str | None:
    """Why this process cannot call what `backend` needs, with the mend; None: it can."""
    try:
        load_functions(backend)
    except BackendUnavailableError as error:
        return str(error)
    return None


@cache
def load_functions(backend: str) -> Mapping[str, Callable[..., Any]]:
    """What `backend` calls, by role: imported now, parameters checked.

    Raises: BackendUnavailableError when AITER is absent, broken, or of another signature.
    """
    loaded = {}
    for role, wanted in FUNCTIONS[backend].items():
        function = getattr(_import(backend, wanted), wanted.name, None)
        if function is None:
            raise _unavailable(backend, f"{wanted.modules[0]} has no {wanted.name}")
        have = inspect.signature(function).parameters
        if lacking := [name for name in wanted.parameters if name not in have]:
            raise _unavailable(backend, f"its {wanted.name} has no parameter {', '.join(lacking)}")
        loaded[role] = function
    return MappingProxyType(loaded)


def _import(backend: str, wanted: AiterFunction) -> ModuleType:
    *newer, oldest = wanted.modules
    try:
        for name in newer:
            try:
                return _import_module(name)
            except ModuleNotFoundError as error:
                # Not there in this version; what it imports itself being absent is a fault.
                if error.name is None or not name.startswith(error.name):
                    raise
        return _import_module(oldest)
    # It asks `rocminfo` for the GPU and compiles kernels while it is imported: much can go wrong.
    except Exception as error:
        raise _unavailable(backend, f"{type(error).__name__}: {error}") from error


def _unavailable(backend: str, why: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{backend} cannot import aiter ({' '.join(why.split())}); {INSTALL}"
    )
