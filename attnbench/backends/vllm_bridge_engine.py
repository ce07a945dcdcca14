"""What vLLM's backends expect around them: configuration, layer, metadata. Made by vLLM's own code.

The layer is vLLM's `Attention` or `MLAAttention`, so the impl's arguments, the scales, the KV-cache
spec and the query's quantisation are those of the installed version. The configuration is a real
`VllmConfig`; only its model is a stand-in with the numbers of one layer.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.vllm_bridge_cache import CacheApi, cache_api
from attnbench.backends.vllm_bridge_install import INSTALL, find_vllm
from attnbench.errors import BackendUnavailableError
from attnbench.workload.types import AttentionShape, AttentionType

LAYER_NAME = "model.layers.0.self_attn.attn"

#: What vLLM's engine takes on an H200 when nothing is said (`EngineArgs` of 0.22.1: 1024 requests
#: and 16,384 tokens a step; `CompilationConfig`: graphs of up to 512 tokens). More where a batch
#: needs it. The length is a long-context model's.
MAX_NUM_SEQS = 1024
MAX_NUM_BATCHED_TOKENS = 16_384
MAX_MODEL_LEN = 131_072
GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))

_CACHE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_TORCH_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes buffers are allocated for."""

    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    max_model_len: int = MAX_MODEL_LEN

    def fitting(self, common: CommonAttentionMetadata) -> Limits:
        """These, or larger ones that hold the batch."""
        return Limits(
            max(self.max_num_seqs, common.num_reqs),
            max(self.max_num_batched_tokens, common.num_actual_tokens),
            max(self.max_model_len, common.max_seq_len),
        )


@dataclass(frozen=True, slots=True)
class VllmLibrary:
    """The names of an imported vLLM that are used, and the adapter of its KV-cache API."""

    version: str
    api: CacheApi
    config_class: Callable[[], Any]
    current_config: Callable[[Any], AbstractContextManager[Any]]
    attention: Callable[..., Any]
    mla_attention: Callable[..., Any]
    common_metadata: Callable[..., Any]
    common_fields: frozenset[str]
    device_capability: Callable[..., Any]
    backend_enum: Any
    platform: Any
    workspace: ModuleType

    def backend(self, name: str) -> type[Any]:
        """vLLM's class of that name, imported now. Raises BackendUnavailableError."""
        try:
            found: type[Any] = self.backend_enum[name].get_class()
        # Class bodies look for devices, drivers and other packages, and fail in many ways.
        except Exception as error:
            raise BackendUnavailableError(
                f"VLLM:{name} cannot be imported from vLLM {self.version} "
                f"({_one_line(error)}); install what it names, or ask for another backend"
            ) from error
        return found

    def platform_kind(self) -> str:
        """The kind of device this vLLM runs on here; "": it found none."""
        kinds = ("cuda", "rocm", "cpu", "xpu")
        return next((kind for kind in kinds if getattr(self.platform, f"is_{kind}")()), "")


@cache
def load_vllm() -> VllmLibrary:
    """Import vLLM. Raises BackendUnavailableError when it is absent, broken, or too different."""
    install = find_vllm()
    if install is None:
        raise BackendUnavailableError(f"vLLM is not installed; {INSTALL}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        config = importlib.import_module("vllm.config")
        layers = importlib.import_module("vllm.model_executor.layers.attention")
        backend = importlib.import_module("vllm.v1.attention.backend")
        registry = importlib.import_module("vllm.v1.attention.backends.registry")
        platforms = importlib.import_module("vllm.platforms")
        return VllmLibrary(
            version=install.version,
            api=cache_api(backend.AttentionBackend),
            config_class=config.VllmConfig,
            current_config=config.set_current_vllm_config,
            attention=layers.Attention,
            mla_attention=layers.MLAAttention,
            common_metadata=backend.CommonAttentionMetadata,
            common_fields=frozenset(f.name for f in fields(backend.CommonAttentionMetadata)),
            device_capability=importlib.import_module("vllm.platforms.interface").DeviceCapability,
            backend_enum=registry.AttentionBackendEnum,
            platform=platforms.current_platform,
            workspace=importlib.import_module("vllm.v1.worker.workspace"),
        )
    # vLLM of another torch, without its extensions or one of its hundred packages.
    except Exception as error:
        raise BackendUnavailableError(
            f"vLLM {install.version} at {install.root} cannot be imported ({_one_line(error)}); "
            f"mend that, or {INSTALL}"
        ) from error


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


class ModelFacts(SimpleNamespace):
    """Stands in for vLLM's `ModelConfig`: what attention code asks, of a model of one layer."""

    shape: AttentionShape

    def get_num_attention_heads(self, parallel_config: Any) -> int:
        return self.shape.num_heads

    def get_num_kv_heads(self, parallel_config: Any) -> int:
        return self.shape.num_kv_heads

    def get_head_size(self) -> int:
        return self.shape.head_size

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"attnbench's stand-in for vLLM's model_config has no {name!r}")


def model_facts(shape: AttentionShape, dtype: torch.dtype, max_model_len: int) -> ModelFacts:
    hf_config = SimpleNamespace(model_type="attnbench", architectures=[])
    if shape.is_mla:
        hf_config.q_lora_rank = None
        hf_config.kv_lora_rank = shape.kv_lora_rank
        hf_config.qk_nope_head_dim = shape.qk_nope_head_dim
        hf_config.qk_rope_head_dim = shape.qk_rope_head_dim
        hf_config.v_head_dim = shape.v_head_size
    return ModelFacts(
        shape=shape,
        dtype=dtype,
        max_model_len=max_model_len,
        hf_config=hf_config,
        hf_text_config=hf_config,
        architectures=[],
        architecture="",
        use_mla=shape.is_mla,
        is_hybrid=False,
        is_mm_prefix_lm=False,
        is_diffusion=False,
        rswa_window=None,
        # Read where a builder asks which model runner the engine has.
        runner_type="generate",
        is_moe=False,
        is_quantized=False,
        is_encoder_decoder=False,
        has_inner_state=False,
        logits_processors=None,
        logprobs_mode="raw_logprobs",
        enable_prompt_embeds=False,
        enable_return_routed_experts=False,
    )


def cache_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> str:
    """vLLM's name of a KV-cache dtype; `auto` when it is the query's own, as vLLM's default is."""
    if kv_cache_dtype in ("auto", _TORCH_NAMES.get(dtype)):
        return "auto"
    return _CACHE_DTYPES.get(kv_cache_dtype, kv_cache_dtype)


def make_config(
    library: VllmLibrary,
    shape: AttentionShape,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    block_size: int,
    limits: Limits,
    layout: str | None = None,
) -> Any:
    """A `VllmConfig` of the engine's defaults for a model of one layer.

    `layout` is made vLLM's; None leaves it as it is.
    """
    config = library.config_class()
    config.model_config = model_facts(shape, dtype, limits.max_model_len)
    config.cache_config.block_size = block_size
    config.cache_config.cache_dtype = cache_dtype(kv_cache_dtype, dtype)
    config.scheduler_config.max_num_seqs = limits.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = limits.max_num_batched_tokens
    # Left empty by a configuration without a model; the rule is vLLM's.
    config.compilation_config.cudagraph_capture_sizes = list(GRAPH_SIZES)
    config.compilation_config.max_cudagraph_capture_size = GRAPH_SIZES[-1]
    if layout is not None:
        library.api.apply_layout(config, layout)
    return config


def config_of_question(library: VllmLibrary, config: AttentionConfig) -> Any:
    """The configuration vLLM's predicates read beside their arguments."""
    shape = AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        v_head_size=config.v_head_size or config.head_size,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
    )
    return make_config(
        library,
        shape,
        config.dtype,
        config.kv_cache_dtype,
        config.block_size or 16,
        Limits(),
    )


class KvBProj(torch.nn.Module):
    """The up-projection of MLA's latents, called as vLLM calls its `ColumnParallelLinear`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.params_dtype = weight.dtype

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None


def kv_b_proj_weight(w_uk: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """(num_heads * (nope + v), kv_lora_rank): of each head the rows of K, then those of V."""
    return torch.cat([w_uk, w_uv.transpose(1, 2)], dim=1).flatten(0, 1).contiguous()


def make_layer(
    library: VllmLibrary,
    theirs: type[Any],
    config: Any,
    device: torch.device,
    attn_type: AttentionType = AttentionType.DECODER,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
) -> Any:
    """vLLM's layer with the impl of `theirs`, made as vLLM's model loader makes one."""
    shape: AttentionShape = config.model_config.shape
    dtype: torch.dtype = config.model_config.dtype
    if not library.workspace.is_workspace_manager_initialized():
        library.workspace.init_workspace_manager(device)
    with library.current_config(config), _default_dtype(dtype), device:
        if shape.is_mla:
            weight = torch.empty(0, dtype=dtype) if projection is None else projection
            layer = library.mla_attention(
                num_heads=shape.num_heads,
                scale=shape.scale,
                qk_nope_head_dim=shape.qk_nope_head_dim,
                qk_rope_head_dim=shape.qk_rope_head_dim,
                v_head_dim=shape.v_head_size,
                q_lora_rank=None,
                kv_lora_rank=shape.kv_lora_rank,
                kv_b_proj=KvBProj(weight),
                cache_config=config.cache_config,
                prefix=LAYER_NAME,
                attn_backend=theirs,
            )
            # 0.22.1 leaves this to the layer's first forward, which is not called here.
            if layer.impl.dcp_world_size == -1:
                layer.impl.dcp_world_size = 1
        else:
            # As models store them, and as FlashAttention 3 takes them.
            more = {} if sinks is None else {"sinks": sinks.to(torch.bfloat16)}
            layer = library.attention(
                num_heads=shape.num_heads,
                head_size=shape.head_size,
                scale=shape.scale,
                num_kv_heads=shape.num_kv_heads,
                alibi_slopes=None if alibi_slopes is None else alibi_slopes.tolist(),
                cache_config=config.cache_config,
                logits_soft_cap=shape.logits_soft_cap or None,
                per_layer_sliding_window=shape.sliding_window or None,
                prefix=LAYER_NAME,
                attn_type=str(attn_type),
                attn_backend=theirs,
                **more,
            )
        layer.impl.process_weights_after_loading(dtype)
    return layer


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def common_metadata(library: VllmLibrary, common: CommonAttentionMetadata) -> Any:
    """vLLM's `CommonAttentionMetadata`, with the fields the installed version has."""
    seq_lens_cpu = common.seq_lens_cpu
    known: dict[str, Any] = {
        "query_start_loc": common.query_start_loc,
        "query_start_loc_cpu": common.query_start_loc_cpu,
        "seq_lens": common.seq_lens,
        "num_reqs": common.num_reqs,
        "num_actual_tokens": common.num_actual_tokens,
        "max_query_len": common.max_query_len,
        "max_seq_len": common.max_seq_len,
        "block_table_tensor": common.block_table_tensor,
        "slot_mapping": common.slot_mapping,
        "causal": common.causal,
        "encoder_seq_lens": common.encoder_seq_lens,
        "seq_lens_cpu_upper_bound": seq_lens_cpu,
        "_seq_lens_cpu": seq_lens_cpu,
    }
    if common.encoder_seq_lens_cpu is not None:
        known["encoder_seq_lens_cpu"] = common.encoder_seq_lens_cpu.numpy()
    if seq_lens_cpu is not None:
        query_lens = common.query_start_loc_cpu.diff()
        known["_num_computed_tokens_cpu"] = seq_lens_cpu - query_lens
    return library.common_metadata(
        **{name: value for name, value in known.items() if name in library.common_fields}
    )


@cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)
