"""What is behind a backend's name: everything that can change while the name stays."""

from __future__ import annotations

import inspect
from typing import Any

from .engine import Case, call, torch_dtype

PREFILL_TOKENS = 8192
NATIVE = "native"
"""FlashInfer's own kernels, not those of TensorRT-LLM that it brings too."""

_FLASHINFER = ("FLASHINFER", "TRITON_FLASHINFER")


def behind_the_name(
    backend: Any, name: str, case: Case, config: Any
) -> tuple[dict[str, Any], list[str]]:
    """The second-level answers for the chosen class, and what this version did not let us ask."""
    values: dict[str, Any] = {}
    not_evaluated = []
    for key, evaluate in _PARTS.items():
        try:
            value = evaluate(backend, name, case, config)
        except Exception as error:  # this version differs: said, and the rest goes on
            not_evaluated.append(f"{key}: {type(error).__name__}: {error}")
            continue
        if value is not None:
            values[key] = value
    return values, not_evaluated


def _kernel_block_sizes(backend: Any, _name: str, _case: Case, _config: Any) -> str:
    return ", ".join(_block_size(size) for size in backend.get_supported_kernel_block_sizes())


def _preferred_block_size(backend: Any, _name: str, case: Case, _config: Any) -> int | None:
    if case.get("block_size"):
        return None  # the user's own
    from vllm.config.cache import CacheConfig

    return int(backend.get_preferred_block_size(CacheConfig.DEFAULT_BLOCK_SIZE))


def _kv_cache_layout(backend: Any, _name: str, _case: Case, _config: Any) -> str | None:
    """The layouts the backend takes, the preferred one first (0.30 and later), or the one it
    sets for the whole process (0.2x)."""
    if hasattr(backend, "supported_kv_cache_layouts"):
        layouts = backend.supported_kv_cache_layouts()
        if layouts is None:
            return None
        return ", ".join(str(getattr(layout, "name", layout)) for layout in layouts)
    required = backend.get_required_kv_cache_layout()
    return None if required is None else str(required)


def _cudagraph_support(backend: Any, _name: str, case: Case, config: Any) -> str:
    builder = backend.get_builder_cls()
    ask = getattr(builder, "get_cudagraph_support", None)
    support = ask(config, _kv_cache_spec(case)) if ask else builder.cudagraph_support
    return str(support.name)


def _reorder_batch_threshold(backend: Any, _name: str, _case: Case, _config: Any) -> int | None:
    threshold = getattr(backend.get_builder_cls(), "reorder_batch_threshold", None)
    return int(threshold) if isinstance(threshold, int) else None


def _effective_kv_cache_dtype(backend: Any, name: str, case: Case, _config: Any) -> str:
    """Sparse MLA layers convert the dtype that was asked for."""
    asked = str(case["kv_cache_dtype"])
    if not (case.get("mla") and case.get("topk")):
        return asked
    from vllm.model_executor.layers.attention import mla_attention

    canonical = getattr(mla_attention, "_canonicalize_sparse_mla_kv_cache_dtype", None)
    if canonical is not None:
        return str(canonical(backend, asked))
    # Up to 0.2x the rule is inside the layer's constructor and cannot be called by itself:
    # FLASHMLA_SPARSE turns every quantised dtype into fp8_ds_mla, the others keep theirs.
    constructor = _source(mla_attention.MLAAttention.__init__)
    if '"FLASHMLA_SPARSE"' not in constructor or '"fp8_ds_mla"' not in constructor:
        raise NotImplementedError("no known rule in this version")
    return "fp8_ds_mla" if name == "FLASHMLA_SPARSE" and asked.startswith("fp8") else asked


def _flash_attn_version(_backend: Any, name: str, case: Case, _config: Any) -> int | None:
    if "FLASH_ATTN" not in name:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    head_size = None if case.get("mla") else case["head_size"]
    wanted = {
        "requires_alibi": bool(case.get("alibi")),
        "head_size": head_size,
        "head_size_v": head_size,
        "has_sinks": bool(case.get("sinks")),
        "requires_softcap": bool(case.get("softcap")),
        "kv_cache_block_size": case.get("block_size"),
    }
    version = call(get_flash_attn_version, wanted, [])
    return None if version is None else int(version)


_sources: dict[Any, str] = {}


def _source(code: Any) -> str:
    """The text of a class or function, found once: finding a class takes its whole file apart."""
    if code not in _sources:
        _sources[code] = inspect.getsource(code)
    return _sources[code]


def _flashinfer_decode(_backend: Any, name: str, case: Case, _config: Any) -> str | None:
    """Whose kernels decode under the name FLASHINFER: TRTLLM_GEN, XQA or native.

    The builder decides once, whatever the number of tokens (`FlashInferMetadataBuilder.__init__`,
    all versions read); it cannot be made without a GPU, so the functions it asks are asked here.
    """
    if name not in _FLASHINFER:
        return None
    from vllm.utils.flashinfer import can_use_trtllm_attention
    from vllm.v1.attention.backends import flashinfer

    builder = flashinfer.FlashInferMetadataBuilder
    if "self.use_trtllm_decode_attention = can_use" not in _source(builder):
        raise NotImplementedError("no known rule in this version")
    wanted = {
        "num_qo_heads": case["num_heads"],
        "num_kv_heads": case["num_kv_heads"],
        "is_prefill": False,
    }
    if not call(can_use_trtllm_attention, wanted, []):
        return NATIVE
    which = getattr(builder, "_get_flashinfer_trtllm_api_decode_kernel", None)
    if which is None:  # up to 0.2x: Blackwell's only, and without context parallelism
        return NATIVE if case.get("dcp", 1) > 1 else "TRTLLM_GEN"
    kernel = str(which().name)
    if kernel == "XQA":
        fits = getattr(flashinfer, "_is_xqa_head_dim_supported", lambda _size: True)
        if case.get("dcp", 1) > 1 or not fits(case["head_size"]):
            return NATIVE
    return kernel


def _flashinfer_prefill(_backend: Any, name: str, case: Case, config: Any) -> str | None:
    """Whose kernels prefill under the name FLASHINFER: TRTLLM_GEN or native."""
    if name not in _FLASHINFER:
        return None
    import torch
    from vllm.utils.flashinfer import can_use_trtllm_attention, use_trtllm_attention

    heads = {"num_qo_heads": case["num_heads"], "num_kv_heads": case["num_kv_heads"]}
    q_dtype = torch_dtype(case["dtype"])
    # The builder quantises queries for a quantised cache where these kernels can run.
    quantised = (
        str(case["kv_cache_dtype"]).startswith(("fp8", "nvfp4"))
        and not config.attention_config.disable_flashinfer_q_quantization
    )
    if quantised and call(can_use_trtllm_attention, heads | {"is_prefill": True}, []):
        q_dtype = torch.float8_e4m3fn
    wanted = {
        **heads,
        "num_tokens": PREFILL_TOKENS,
        "max_seq_len": PREFILL_TOKENS,
        "dcp_world_size": case.get("dcp", 1),
        "kv_cache_dtype": case["kv_cache_dtype"],
        "q_dtype": q_dtype,
        "is_prefill": True,
        "force_use_trtllm": config.attention_config.use_trtllm_attention,
        "has_sinks": bool(case.get("sinks")),
        "has_spec": bool(case.get("num_speculative_tokens")),
    }
    return "TRTLLM_GEN" if call(use_trtllm_attention, wanted, []) else NATIVE


def _mla_prefill_backend(_backend: Any, _name: str, case: Case, config: Any) -> str | None:
    if not case.get("mla"):
        return None
    from vllm.v1.attention.backends.mla.prefill.selector import get_mla_prefill_backend

    return str(get_mla_prefill_backend(config).get_name())


_PARTS = {
    "flash_attn_version": _flash_attn_version,
    "flashinfer_decode": _flashinfer_decode,
    "flashinfer_prefill": _flashinfer_prefill,
    "mla_prefill_backend": _mla_prefill_backend,
    "kernel_block_sizes": _kernel_block_sizes,
    "preferred_block_size": _preferred_block_size,
    "kv_cache_layout": _kv_cache_layout,
    "effective_kv_cache_dtype": _effective_kv_cache_dtype,
    "cudagraph_support": _cudagraph_support,
    "reorder_batch_threshold": _reorder_batch_threshold,
}


def _block_size(size: Any) -> str:
    """`64`, or `MultipleOf(16)`: a class of its own without a text in 0.2x."""
    return f"MultipleOf({size.base})" if hasattr(size, "base") else str(size)


def _kv_cache_spec(case: Case) -> Any:
    from vllm.v1 import kv_cache_interface as specs

    mla = case.get("mla")
    wanted = {
        "block_size": case.get("block_size") or (64 if mla else 16),
        "num_kv_heads": 1 if mla else case["num_kv_heads"],
        "head_size": case["head_size"],
        "dtype": torch_dtype(case["dtype"]),
    }
    return call(specs.MLAAttentionSpec if mla else specs.FullAttentionSpec, wanted, [])
