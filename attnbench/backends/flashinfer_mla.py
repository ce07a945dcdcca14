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
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import KVCacheSpec
from attnbench.backends.declared.vllm_0_22_1 import FlashInferMLA
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import torch_dtype
from attnbench.backends.impl import MLALayer
from attnbench.backends.mla_backend import LibraryMLABackend, LibraryMLAImpl
from attnbench.backends.mla_builder import (
    DecodeBatch,
    LibraryMLABuilder,
    LibraryMLAMetadata,
    QueryLenSupport,
)
from attnbench.backends.mla_libraries import MLA_LIBRARIES, MLALibrary

NAME = "FLASHINFER_MLA"
WRAPPER = "BatchMLAPagedAttentionWrapper"
TRTLLM = "trtllm_batch_decode_with_kv_cache_mla"
#: vLLM's and the library's recommendation; zero before its first use.
WORKSPACE_BYTES = 128 * 1024 * 1024
#: New tokens of a request, and query heads, of the CUTE_DSL kernels (cute_dsl/attention:
#: mla_config.py, can_implement; wrappers/batch_mla.py).
CUTE_DSL_MAX_QUERY_LEN = 4
CUTE_DSL_HEADS = 128
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
        self.make_wrapper = self.functions.get(WRAPPER)
        self._free: list[Any] = []
        self._for_graphs: dict[tuple[int, ...], Any] = {}

    @classmethod
    def decodes_of(cls, decode: str) -> tuple[int, QueryLenSupport]:
        threshold, support = super().decodes_of(decode)
        match decode:
            case "CUTE_DSL":
                return CUTE_DSL_MAX_QUERY_LEN, support
            case "TRTLLM_GEN":
                return threshold, support
            case _:
                return threshold, QueryLenSupport.VARLEN

    def build_decode(
        self, batch: DecodeBatch, fast_build: bool, for_graph: bool
    ) -> FlashInferMLADecode:
        plan = None
        block_table = batch.block_table
        if self.make_wrapper is not None:
            plan = self._plan(batch, self.make_wrapper, for_graph)
        else:
            # The kernel takes page tables of whole 128 tokens; the null block fills the rest.
            # Rows are read as if they followed each other.
            block_table = block_table.contiguous()
            missing = -block_table.shape[1] % (128 // self.spec.block_size)
            if missing:
                block_table = F.pad(block_table, (0, missing))
                if for_graph:
                    block_table = self.graph_buffers.keep("block_table", block_table)
        return FlashInferMLADecode(
            num_decodes=batch.num_decodes,
            query_len=batch.query_len,
            seq_lens=batch.seq_lens,
            max_seq_len=batch.max_seq_len,
            block_table=block_table,
            plan=plan,
        )

    def _wrapper(self, make_wrapper: Callable[..., Any], **graph: Any) -> Any:
        return make_wrapper(
            float_workspace_buffer=_workspace(self.device, "planned"),
            backend=self.library.variant.lower(),
            **graph,
        )

    def _graph_wrapper(self, batch: DecodeBatch, make_wrapper: Callable[..., Any]) -> Any:
        """The wrapper of a captured graph, which is planned anew in its own tables."""
        key = (batch.num_decodes, batch.num_tokens, batch.block_table.numel())
        if key not in self._for_graphs:

            def table(size: int) -> torch.Tensor:
                return torch.zeros(size, dtype=torch.int32, device=self.device)

            self._for_graphs[key] = self._wrapper(
                make_wrapper,
                use_cuda_graph=True,
                qo_indptr=table(batch.num_decodes + 1),
                kv_indptr=table(batch.num_decodes + 1),
                kv_indices=table(batch.block_table.numel()),
                kv_len_arr=table(batch.num_decodes),
            )
        return self._for_graphs[key]

    def _plan(
        self, batch: DecodeBatch, make_wrapper: Callable[..., Any], for_graph: bool
    ) -> FlashInferPlan:
        if for_graph:
            wrapper = self._graph_wrapper(batch, make_wrapper)
            plan = FlashInferPlan(wrapper)
        else:
            wrapper = self._free.pop() if self._free else self._wrapper(make_wrapper)
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
    """FA2 and FA3 give an LSE, the others none."""

    backend: ClassVar[str] = NAME
    supports_quant_query_input: ClassVar[bool] = True

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
            q = self.quantized_query(layer, q)
            qk_scale *= layer._q_scale_float * layer._k_scale_float
            v_scale = layer._k_scale_float
        size = (decode.num_decodes, decode.query_len, self.num_heads)
        variant = self.library.variant
        workspace = _workspace(q.device, variant)
        if variant == "CUTE_DSL":
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
            backend=_LIBRARY_BACKENDS[variant],
        )


class FlashInferMLABackend(LibraryMLABackend, FlashInferMLA):
    """The capabilities are vLLM's, but for FA2 and FA3 on the devices vLLM leaves to others."""

    impl_cls = FlashInferMLAImpl
    builder_cls = FlashInferMLAMetadataBuilder
    latent_widths: ClassVar[tuple[tuple[int, int], ...]] = ((512, 64), (256, 64))

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return any(capability.major in lib.majors for lib in MLA_LIBRARIES[NAME].values())

    @classmethod
    def library_refusal(cls, lib: MLALibrary, config: AttentionConfig) -> str | None:
        match lib.variant:
            case "TRTLLM_GEN":
                return _trtllm_gen_refusal(config)
            case "CUTE_DSL":
                return _cute_dsl_refusal(config)
        if config.kv_cache_dtype.startswith("fp8"):
            return f"{lib.variant} has no scale for an fp8 KV cache; use kv=auto"
        if config.kv_lora_rank not in (0, 512):
            return f"{lib.variant} is run with kv_lora_rank 512 only, not {config.kv_lora_rank}"
        return None

    @classmethod
    def note(cls, config: AttentionConfig, device: Device) -> str:
        if device.capability is None or device.capability.major == 10:
            return ""
        return "FA2 and FA3 run here when asked for by name; vLLM 0.22.1 has none"


def _trtllm_gen_refusal(config: AttentionConfig) -> str | None:
    if config.dtype is not torch.bfloat16:
        return "TRTLLM_GEN writes bf16; use dtype=bf16"
    heads = config.num_heads
    # A tile has up to 16 heads, above 32 heads up to 64 for some batches, and all tiles equally
    # many (trtllm/fmha/fmhaKernels.cuh: selectMlaGenerationKernel, which is for rank 512 only).
    fits = heads <= 16 or (heads % 16 == 0 and (heads <= 64 or heads % 64 == 0))
    if config.kv_lora_rank == 512 and not fits:
        return f"TRTLLM_GEN takes up to 16, 32, 48 or a multiple of 64 query heads: {heads}"
    return None


def _cute_dsl_refusal(config: AttentionConfig) -> str | None:
    if config.kv_cache_dtype.startswith("fp8") and config.dtype is not torch.bfloat16:
        return "CUTE_DSL writes bf16 when the KV cache is fp8; use dtype=bf16"
    if config.kv_lora_rank not in (0, 512):
        return f"CUTE_DSL takes kv_lora_rank 512 only, not {config.kv_lora_rank}"
    if config.num_heads != CUTE_DSL_HEADS:
        return (
            f"CUTE_DSL takes {CUTE_DSL_HEADS} query heads, not {config.num_heads}; "
            "ask for FLASHINFER_MLA:TRTLLM_GEN"
        )
    return None


@cache
def _workspace(device: torch.device, owner: str) -> torch.Tensor:
    """Scratch of all calls of one kind on a device, which run one after another.

    One for each: TRTLLM_GEN counts in the first 8 MiB of its own, which must be zero before its
    first call and which it leaves so; the others leave anything.
    """
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
