"""FLASHINFER_MLA: FlashInfer's latent decode, by the real library.

- TRTLLM_GEN (vLLM's choice) and CUTE_DSL, on compute capability 10.x: uniform query lengths, and
  no LSE.
- FA3 (9.x) and FA2 (8.0 and newer), which vLLM does not use: any query lengths, planned on the
  host when metadata is built. They are run when asked for by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import FlashInferMLA
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import is_fp8, torch_dtype
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import (
    DecodeBatch,
    LibraryMLABackend,
    LibraryMLABuilder,
    LibraryMLAImpl,
    LibraryMLAMetadata,
    QueryLenSupport,
)
from attnbench.backends.mla_libraries import MLA_LIBRARIES, MLALibrary, load_functions
from attnbench.backends.paged_ops import quantize
from attnbench.workload.types import AttentionShape, AttentionType

NAME = "FLASHINFER_MLA"
WRAPPER = "BatchMLAPagedAttentionWrapper"
TRTLLM = "trtllm_batch_decode_with_kv_cache_mla"
#: vLLM's and the library's recommendation; zero before its first use.
WORKSPACE_BYTES = 128 * 1024 * 1024
#: `backend=` of the library, by variant.
_LIBRARY_BACKENDS = {"TRTLLM_GEN": "trtllm-gen", "CUTE_DSL": "cute-dsl"}


class FlashInferPlan:
    """A planned wrapper. It may be planned anew when the plan is gone, not before."""

    __slots__ = ("__weakref__", "wrapper")

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferMLADecode:
    """`plan` for FA2 and FA3; the other fields for TRTLLM_GEN and CUTE_DSL."""

    num_decodes: int
    query_len: int
    seq_lens: torch.Tensor
    max_seq_len: int
    block_table: torch.Tensor
    plan: FlashInferPlan | None


class FlashInferMLABackend(LibraryMLABackend, FlashInferMLA):
    """The capabilities are vLLM's, but for FA2 and FA3 on the devices vLLM leaves to others."""

    install_hint: ClassVar[str] = MLA_LIBRARIES[NAME]["TRTLLM_GEN"].install
    latent_widths: ClassVar[tuple[tuple[int, int], ...]] = ((512, 64), (256, 64))

    @classmethod
    def get_impl_cls(cls) -> type[FlashInferMLAImpl]:
        """Raises BackendUnavailableError when FlashInfer is not installed."""
        cls.require_library()
        return FlashInferMLAImpl

    @classmethod
    def get_builder_cls(cls) -> type[FlashInferMLAMetadataBuilder]:
        """Raises BackendUnavailableError when FlashInfer is not installed."""
        cls.require_library()
        return FlashInferMLAMetadataBuilder

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return any(capability.major in lib.majors for lib in MLA_LIBRARIES[NAME].values())

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        is_fp8_cache = config.kv_cache_dtype.startswith("fp8")
        if lib.variant in _LIBRARY_BACKENDS:
            if config.dtype is not torch.bfloat16:
                return f"{lib.variant} writes bf16; use dtype=bf16"
            return None
        if is_fp8_cache:
            return f"{lib.variant} has no scale for an fp8 KV cache; use kv=auto"
        if config.kv_lora_rank not in (0, 512):
            return f"{lib.variant} is run with kv_lora_rank 512 only, not {config.kv_lora_rank}"
        return None

    @classmethod
    def note(cls, config: AttentionConfig, device: Device) -> str:
        if device.capability is None or device.capability.major == 10:
            return ""
        return "FA2 and FA3 run here when asked for by name; vLLM 0.22.1 has none"


class FlashInferMLAMetadataBuilder(LibraryMLABuilder[FlashInferMLADecode]):
    backend: ClassVar[str] = NAME
    #: vLLM's is one more than the tokens it drafts; up to 16 here, of one length for TRTLLM_GEN.
    reorder_batch_threshold: int | None = 16

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        functions = load_functions(NAME, self.library)
        self.make_wrapper: Callable[..., Any] | None = functions.get(WRAPPER)
        if self.make_wrapper is not None:
            self.query_len_support = QueryLenSupport.VARLEN
        self._free: list[Any] = []

    def build_decode(
        self, batch: DecodeBatch, fast_build: bool, for_graph: bool
    ) -> FlashInferMLADecode:
        plan = None
        block_table = batch.block_table
        if self.make_wrapper is not None:
            plan = self._plan(batch, self.make_wrapper)
        else:
            # The kernel takes page tables of whole 128 tokens; the null block fills the rest.
            missing = -block_table.shape[1] % (128 // self.spec.block_size)
            if missing:
                block_table = F.pad(block_table, (0, missing))
        return FlashInferMLADecode(
            num_decodes=batch.num_decodes,
            query_len=batch.query_len,
            seq_lens=batch.seq_lens,
            max_seq_len=batch.max_seq_len,
            block_table=block_table,
            plan=plan,
        )

    def _plan(self, batch: DecodeBatch, make_wrapper: Callable[..., Any]) -> FlashInferPlan:
        wrapper = self._free.pop() if self._free else None
        if wrapper is None:
            wrapper = make_wrapper(
                float_workspace_buffer=_workspace(self.device),
                backend=self.library.variant.lower(),
            )
        plan = FlashInferPlan(wrapper)
        # A wrapper holds one plan: metadata that is still in use keeps its own.
        weakref.finalize(plan, self._free.append, wrapper)
        shape, block_size = self.spec.shape, self.spec.block_size
        seq_lens = batch.seq_lens_cpu.to(torch.int32)
        pages = (seq_lens + block_size - 1) // block_size
        starts = torch.zeros(len(pages) + 1, dtype=torch.int32)
        starts[1:] = pages.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(pages)), pages)
        column = torch.arange(len(owner)) - starts[:-1].repeat_interleave(pages)
        wrapper.plan(
            qo_indptr=batch.query_start_loc_cpu,
            kv_indptr=starts,
            kv_indices=batch.block_table[owner.to(self.device), column.to(self.device)],
            kv_len_arr=seq_lens,
            num_heads=shape.num_heads,
            head_dim_ckv=shape.kv_lora_rank,
            head_dim_kpe=shape.qk_rope_head_dim,
            page_size=block_size,
            causal=batch.max_query_len > 1,
            sm_scale=shape.scale,
            q_data_type=self.spec.dtype,
            kv_data_type=torch_dtype(self.spec.kv_cache_dtype),
        )
        return plan


class FlashInferMLAImpl(LibraryMLAImpl[FlashInferMLADecode]):
    """One call of the library. `do_kv_cache_update` must have run before either forward."""

    backend: ClassVar[str] = NAME
    #: FA2 and FA3 do; the others return None.
    can_return_lse_for_decode: ClassVar[bool] = True
    supports_quant_query_input: ClassVar[bool] = True

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises UsageError without a variant, BackendUnavailableError without its library."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.functions = load_functions(NAME, self.library)
        self.library_backend = _LIBRARY_BACKENDS.get(self.library.variant, "")

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LibraryMLAMetadata[FlashInferMLADecode],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        decode = self.decode_of(attn_metadata)
        if decode.plan is None:
            self._trtllm(layer, q, kv_cache, decode, output)
            return None
        rank = self.kv_lora_rank
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        decode.plan.wrapper.run(
            q_nope=q[..., :rank],
            q_pe=q[..., rank:],
            ckv_cache=kv_cache[..., :rank],
            kpe_cache=kv_cache[..., rank:],
            out=output,
            lse=lse,
            return_lse=True,
            return_lse_base_on_e=True,  # of its own accord the library's LSE is of base 2
        )
        return lse

    def _trtllm(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        decode: FlashInferMLADecode,
        output: torch.Tensor,
    ) -> None:
        qk_scale, v_scale = self.scale, 1.0
        if self.is_quantized:
            if not is_fp8(q.dtype):
                q = quantize(q, torch.float8_e4m3fn, layer._q_scale_float)
            qk_scale *= layer._q_scale_float * layer._k_scale_float
            v_scale = layer._k_scale_float
        size = (decode.num_decodes, decode.query_len, self.num_heads)
        workspace = _workspace(q.device)
        if self.library_backend == "cute-dsl":
            workspace = workspace.view(torch.int8)
        self.functions[TRTLLM](
            query=q.view(*size, q.shape[-1]),
            kv_cache=kv_cache.unsqueeze(1),
            workspace_buffer=workspace,
            qk_nope_head_dim=self.qk_nope_head_dim,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            block_tables=decode.block_table,
            seq_lens=decode.seq_lens,
            max_seq_len=decode.max_seq_len,
            out=output.view(*size, self.kv_lora_rank),
            bmm1_scale=qk_scale,
            bmm2_scale=v_scale,
            backend=self.library_backend,
        )


@lru_cache(maxsize=4)
def _workspace(device: torch.device) -> torch.Tensor:
    """Scratch of all FlashInfer calls on a device, which run one after another."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
