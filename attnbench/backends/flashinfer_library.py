"""The library behind FLASHINFER: its variants, what each refuses, and how its names are found.

A variant fixes the kernel of prefill and of decode, so that a series never changes its kernels by
what FlashInfer's `auto` chooses. Nothing here imports the library before `load_names` is called.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.device import Device
from attnbench.errors import BackendUnavailableError, UsageError
from attnbench.workload.types import WorkloadFields

INSTALL = "pip install flashinfer-python==0.6.11.post2"

# The kernels of one phase: of all prefill, or of all decode, requests of a batch.
FA2 = "fa2"
FA3 = "fa3"
CUDA_CORES = "cuda-cores"
XQA = "xqa"
TRTLLM_GEN = "trtllm-gen"
CASCADE = "cascade"

#: Query heads per KV head that the CUDA-core decode kernel is instantiated for
#: (include/flashinfer/utils.cuh, DISPATCH_GQA_GROUP_SIZE).
CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
#: Kernels that take fp8 queries, and no others, when the KV cache is fp8.
FP8_QUERY_KERNELS = (FA3, TRTLLM_GEN)
#: FA3 and XQA have no kernel above (hopper/prefill_sm90.cuh, jit/xqa.py).
MAX_HEAD_SIZE = 256
#: A batch whose requests all have this many new tokens or fewer, equally many, is decoded by
#: TRTLLM-GEN.
MAX_SPECULATIVE_QUERY_LEN = 8
#: Page sizes XQA is compiled for (jit/xqa.py).
XQA_PAGES = (16, 32, 64, 128)
#: Page sizes vLLM gives TRTLLM-GEN (v1/attention/backends/flashinfer.py:339).
TRTLLM_PAGES = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class Variant:
    """The kernels of prefill and decode, and the major compute capabilities they exist for."""

    name: str
    prefill: str
    decode: str
    majors: tuple[int, ...] = ()  # empty: all

    @property
    def kernels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.prefill, self.decode)))


_VARIANTS = (
    # The first that a device has is what vLLM runs there.
    Variant("TRTLLM_GEN", TRTLLM_GEN, TRTLLM_GEN, (10,)),
    # On Hopper vLLM's `auto` wrappers take FA3 for prefill and FA2 for decode.
    Variant("FA3", FA3, FA2, (9,)),
    Variant("FA2", FA2, FA2),
    Variant("FA3_DECODE", FA3, FA3, (9,)),
    Variant("CUDA_CORES", FA2, CUDA_CORES),
    Variant("XQA", FA2, XQA, (9, 10, 12)),
    Variant("CASCADE", CASCADE, CASCADE),
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({v.name: v for v in _VARIANTS})

_Uses = dict[str, tuple[str, ...]]

_PREFILL = "prefill.BatchPrefillWithPagedKVCacheWrapper"
_DECODE = "decode.BatchDecodeWithPagedKVCacheWrapper"
_CASCADE = "cascade.MultiLevelCascadeAttentionWrapper"
_CONTEXT = "prefill.trtllm_batch_context_with_kv_cache"
_TRTLLM = "decode.trtllm_batch_decode_with_kv_cache"

_HEADS = ("num_qo_heads", "num_kv_heads", "page_size", "sm_scale", "window_left")
_TYPES = ("logits_soft_cap", "q_data_type", "kv_data_type")
_RUN = ("q", "paged_kv_cache", "q_scale", "k_scale", "v_scale", "out", "return_lse")
_PREFILL_USES: _Uses = {
    f"{_PREFILL}.__init__": (
        *("float_workspace_buffer", "kv_layout", "backend", "use_cuda_graph", "qo_indptr_buf"),
        *("paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf"),
    ),
    f"{_PREFILL}.plan": (
        *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"),
        *(*_HEADS, *_TYPES, "head_dim_qk", "causal", "o_data_type"),
    ),
    f"{_PREFILL}.run": _RUN,
}
_DECODE_USES: _Uses = {
    f"{_DECODE}.__init__": (
        *("float_workspace_buffer", "kv_layout", "backend", "use_tensor_cores", "use_cuda_graph"),
        *("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
    ),
    f"{_DECODE}.plan": (
        *("indptr", "indices", "last_page_len", *_HEADS, *_TYPES, "head_dim", "o_data_type"),
    ),
    f"{_DECODE}.run": _RUN,
}
_CASCADE_USES: _Uses = {
    f"{_CASCADE}.__init__": ("num_levels", "float_workspace_buffer", "kv_layout"),
    f"{_CASCADE}.plan": (
        *("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr"),
        *("paged_kv_last_page_len", *_HEADS, *_TYPES, "head_dim", "causal"),
    ),
    f"{_CASCADE}.run": ("q", "paged_kv_cache"),
}
_TRTLLM_COMMON = (
    *("query", "kv_cache", "workspace_buffer", "block_tables", "seq_lens", "bmm1_scale"),
    *("bmm2_scale", "window_left", "out", "sinks", "kv_layout"),
)
_TRTLLM_DECODE_USES: _Uses = {_TRTLLM: (*_TRTLLM_COMMON, "max_seq_len", "backend", "q_len_per_req")}
_TRTLLM_PREFILL_USES: _Uses = {
    _CONTEXT: (
        *(*_TRTLLM_COMMON, "max_q_len", "max_kv_len", "batch_size"),
        *("cum_seq_lens_q", "cum_seq_lens_kv"),
    )
}
_PREFILL_KERNELS: dict[str, _Uses] = {
    FA2: _PREFILL_USES,
    FA3: _PREFILL_USES,
    TRTLLM_GEN: _TRTLLM_PREFILL_USES,
    CASCADE: _CASCADE_USES,
}
_DECODE_KERNELS: dict[str, _Uses] = {
    FA2: _DECODE_USES,
    FA3: _DECODE_USES,
    CUDA_CORES: _DECODE_USES,
    XQA: _TRTLLM_DECODE_USES,
    TRTLLM_GEN: _TRTLLM_DECODE_USES,
    CASCADE: _CASCADE_USES,
}


def uses(variant: Variant) -> dict[str, tuple[str, ...]]:
    """`module.function` or `module.Class.method`: the parameters passed to it, all by keyword."""
    return _PREFILL_KERNELS[variant.prefill] | _DECODE_KERNELS[variant.decode]


def find_variant(name: str) -> Variant:
    """Raises UsageError for a name that is none."""
    if name not in VARIANTS:
        raise UsageError(
            f"FLASHINFER has no variant {name!r}; write FLASHINFER:VARIANT with one of "
            f"{', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


def variants_of(device: Device) -> tuple[str, ...]:
    """Variants whose kernels exist for `device`, all of them where that is not known."""
    capability = device.capability
    return tuple(
        v.name
        for v in _VARIANTS
        if capability is None or not v.majors or capability.major in v.majors
    )


def default_variant(config: AttentionConfig, device: Device) -> str:
    """What vLLM 0.22.1 runs, its libraries and cubins present (utils/flashinfer.py:322-440).

    There TRTLLM-GEN takes soft caps too and leaves them out; here they go to FA2.
    """
    major = device.capability.major if device.capability is not None else 0
    if major == 10 and not config.has_logits_soft_cap:
        return "TRTLLM_GEN"
    is_fp8 = config.kv_cache_dtype.startswith("fp8")
    if major == 9 and not is_fp8 and config.head_size <= MAX_HEAD_SIZE:
        return "FA3"
    return "FA2"


def phases(variant: Variant, query_lens: Sequence[int]) -> tuple[bool, bool]:
    """Whether a batch has requests that are decoded, and some that are prefilled.

    TRTLLM-GEN decodes a batch of a few tokens each, equally many, as speculation is.
    """
    longest = max(query_lens)
    if variant.decode == TRTLLM_GEN and min(query_lens) == longest <= MAX_SPECULATIVE_QUERY_LEN:
        return True, False
    return min(query_lens) <= 1, longest > 1


# --- what a variant refuses -----------------------------------------------------------------------
def refusal(name: str, config: AttentionConfig, device: Device) -> str | None:
    """Why the kernels of a variant refuse `config`, None if they take it (or are unknown)."""
    variant = VARIANTS.get(name)
    if variant is None:
        return None
    capability = device.capability
    if capability is not None and variant.majors and capability.major not in variant.majors:
        wanted = ", ".join(f"{major}.x" for major in variant.majors)
        return f"FLASHINFER:{name} needs compute capability {wanted}, {device} has {capability}"
    if config.kv_cache_dtype == "nvfp4":
        return "attnbench makes no nvfp4 KV cache yet; use kv=fp8_e4m3"
    if config.use_alibi:
        return "FlashInfer takes no ALiBi slopes, it has its own; ask for FLASH_ATTN:FA2"
    is_fp8 = config.kv_cache_dtype.startswith("fp8")
    if not is_fp8 and not _is_same_dtype(config):
        return f"a {config.kv_cache_dtype} KV cache needs queries of the same type"
    for kernels in variant.kernels:
        if reason := _kernel_refusal(kernels, config, device, is_fp8):
            return reason
    return None


def _kernel_refusal(
    kernels: str, config: AttentionConfig, device: Device, is_fp8: bool
) -> str | None:
    by_trtllm = kernels in (XQA, TRTLLM_GEN)
    if config.has_sink and not by_trtllm:
        return f"FlashInfer's {kernels} kernels take no sinks; TRTLLM-GEN (SM10x) does"
    if config.has_logits_soft_cap and by_trtllm:
        return f"{kernels} has no soft cap; ask for FLASHINFER:FA2"
    if is_fp8 and kernels in (FA3, XQA, TRTLLM_GEN) and config.kv_cache_dtype == "fp8_e5m2":
        return f"{kernels} takes e4m3 only; ask for FLASHINFER:FA2 or use kv=fp8_e4m3"
    if kernels in (FA3, XQA) and config.head_size > MAX_HEAD_SIZE:
        return f"{kernels} ends at head size {MAX_HEAD_SIZE}: {config.head_size}"
    block_size = config.block_size
    match kernels:
        case "fa3" if is_fp8 and config.has_logits_soft_cap:
            # DefaultFP8Attention has no such parameter: the cap would be left out in silence.
            return "FA3's fp8 kernels have no soft cap; ask for FLASHINFER:FA2"
        case "cuda-cores" if config.num_heads // config.num_kv_heads not in CUDA_CORE_GROUPS:
            groups = ", ".join(map(str, CUDA_CORE_GROUPS))
            group = config.num_heads // config.num_kv_heads
            return f"the CUDA-core decode kernel takes {groups} query heads a KV head: {group}"
        case "xqa" if block_size is not None and block_size not in XQA_PAGES:
            return f"XQA takes blocks of {', '.join(map(str, XQA_PAGES))}: {block_size}"
        case "trtllm-gen" if block_size is not None and block_size not in TRTLLM_PAGES:
            return f"TRTLLM-GEN takes blocks of {', '.join(map(str, TRTLLM_PAGES))}: {block_size}"
        case "cascade" if _is_hopper(device) and config.head_size > MAX_HEAD_SIZE:
            # Its `auto` takes FA3 there whatever the head size.
            return f"cascade is FA3 on 9.x, which ends at head size {MAX_HEAD_SIZE}"
        case "cascade" if is_fp8:
            return "FlashInfer's cascade takes no scales of an fp8 KV cache; use kv=auto"
        case "cascade" if config.has_sliding_window:
            return "a shared prefix has no window of its own; use a workload without window="
    return None


def _is_hopper(device: Device) -> bool:
    return device.capability is not None and device.capability.major == 9


def _is_same_dtype(config: AttentionConfig) -> bool:
    names = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return config.kv_cache_dtype in ("auto", names.get(config.dtype))


# --- what is launched -----------------------------------------------------------------------------
#: Kernels' names in FlashInfer's sources (attention/*.cuh, csrc/xqa); `FP8` before FA3's for fp8.
_KERNEL_PATTERNS = {
    FA2: r"\bBatchPrefillWithPagedKVCacheKernel\b",
    FA3: r"\b(FP8)?PrefillWithKVCacheKernel\b",
    CUDA_CORES: r"\bBatchDecodeWithPagedKVCacheKernel\b",
    XQA: r"\bkernel_mha(_impl)?\b",
    CASCADE: r"\bMergeStateInPlaceKernel\b",
}
#: TRTLLM-GEN's kernels come as binaries, whose names end in their phase.
_TRTLLM_PREFILL = r"\bfmhaSm10\w+Context"
_TRTLLM_DECODE = r"\bfmhaSm10\w+ForGen"


def kernel_patterns(name: str) -> tuple[str, ...]:
    """`AttentionBackend.kernel_patterns`: those of decode and of prefill."""
    variant = VARIANTS.get(name)
    if variant is None:
        return ()
    return tuple(dict.fromkeys((_decode_pattern(variant), _prefill_pattern(variant))))


def promised_kernels(
    name: str, query_lens: Sequence[int], device: Device
) -> tuple[tuple[str, ...], ...]:
    """`AttentionBackend.promised_kernels` of a batch with so many new tokens a request."""
    variant = VARIANTS.get(name)
    if variant is None:
        return ()
    if variant.prefill == CASCADE:
        # Both levels are the wrapper's `auto`: FA3 on Hopper, FA2 elsewhere.
        levels = FA3 if _is_hopper(device) else FA2
        return ((_KERNEL_PATTERNS[CASCADE],), (_KERNEL_PATTERNS[levels],))
    has_decodes, has_prefills = phases(variant, query_lens)
    found = [_decode_pattern(variant)] if has_decodes else []
    found += [_prefill_pattern(variant)] if has_prefills else []
    return tuple((pattern,) for pattern in dict.fromkeys(found))


def _decode_pattern(variant: Variant) -> str:
    return _KERNEL_PATTERNS.get(variant.decode, _TRTLLM_DECODE)


def _prefill_pattern(variant: Variant) -> str:
    return _KERNEL_PATTERNS.get(variant.prefill, _TRTLLM_PREFILL)


# --- what is compiled -----------------------------------------------------------------------------
def compilation_key(workload: WorkloadFields, name: str, device: Device) -> str:
    """What FlashInfer compiles at the first call of `workload`: the numbers in its modules' names.

    (jit/attention/modules.py, get_batch_prefill_uri and get_batch_decode_uri; jit/xqa.py.)
    """
    variant = VARIANTS.get(name)
    if variant is None:
        return ""
    shape = workload.shape
    lengths = [request.query_len for request in workload.batch_spec.requests]
    has_decodes, has_prefills = phases(variant, lengths)
    compiled = {variant.decode} if has_decodes else set()
    if has_prefills:
        compiled.add(variant.prefill)
    common = f"{workload.dtype} {workload.kv_cache_dtype} {shape.head_size}"
    masks = f"{shape.sliding_window > 0} {shape.logits_soft_cap > 0}"
    found = []
    for kernels in sorted(compiled):
        match kernels:
            case "xqa":
                group = shape.num_heads // shape.num_kv_heads
                found.append(f"xqa {common} {workload.block_size} {group} {masks}")
            case "trtllm-gen":
                found.append("trtllm-gen")  # binaries, and one launcher for all of them
            case _:
                found.append(f"{kernels} {common} {masks}")
    return " + ".join(found)


# --- the library ----------------------------------------------------------------------------------
def is_found() -> bool:
    """Whether the package is installed; it may still fail to import."""
    return "flashinfer" in sys.modules or find_spec("flashinfer") is not None


def require() -> None:
    """Raises BackendUnavailableError when the library is not installed; does not import it."""
    if not is_found():
        raise BackendUnavailableError(f"flashinfer is not installed; {INSTALL}")


def missing_reason(name: str) -> str | None:
    """Why this process cannot load a variant, with the command that brings it; None: it can."""
    if name not in VARIANTS:
        return None
    try:
        load_names(VARIANTS[name])
    except BackendUnavailableError as error:
        return str(error)
    return None


def load_names(variant: Variant) -> dict[str, Any]:
    """The functions and classes of `variant` by their last name, their parameters checked.

    Raises: BackendUnavailableError when the library is absent, broken, or of another signature.
    """
    found: dict[str, Any] = {}
    for path, wanted in uses(variant).items():
        module_name, name, *method = path.split(".")
        try:
            module = importlib.import_module(f"flashinfer.{module_name}")
        # A library built for another torch or CUDA fails in many ways while it is imported.
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise _unavailable(variant, f"{type(error).__name__}: {error}") from error
        thing = found[name] = getattr(module, name, None)
        function = getattr(thing, method[0], None) if method else thing
        if function is None:
            raise _unavailable(
                variant, f"flashinfer.{module_name} has no {'.'.join([name, *method])}"
            )
        if lacking := lacking_parameters(inspect.signature(function), wanted):
            raise _unavailable(variant, f"its {path} has no parameter {', '.join(lacking)}")
    return found


def lacking_parameters(signature: inspect.Signature, wanted: tuple[str, ...]) -> list[str]:
    """Which of `wanted` cannot be passed by keyword."""
    have = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in have.values()):
        return []  # 0.7: the plan of decode checks its keywords itself
    return [parameter for parameter in wanted if parameter not in have]


def _unavailable(variant: Variant, why: str) -> BackendUnavailableError:
    reason = " ".join(why.split())
    return BackendUnavailableError(
        f"FLASHINFER:{variant.name} cannot be imported ({reason}); {INSTALL}"
    )
