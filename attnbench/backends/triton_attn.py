"""TRITON_ATTN: our own Triton kernels for variable-length attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attnbench.backends.abstract import AttentionConfig, is_quantized_kv_cache
from attnbench.backends.builder import AttentionCGSupport, AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.device import Device, DeviceCapability
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES, torch_dtype
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.triton_attn_launch import (
    INTERPRETER_TILE,
    attention_launches,
    attention_tile_shape,
    write_kv_launch,
)
from attnbench.backends.triton_kernels.attention import attention_kernel
from attnbench.backends.triton_launch import (
    Launch,
    TileGroup,
    TileShape,
    host_lengths,
    is_interpreted,
    kernel_patterns_of,
    launch_device,
    multiprocessors,
    next_power_of_two,
    plan_tile_groups,
)
from attnbench.errors import BackendUnavailableError, UsageError
from attnbench.workload.types import AttentionShape, AttentionType, WorkloadFields

#: Rows (tokens x heads of a KV head) up to which a request counts as decode.
SHORT_ROWS = 64
#: Key tiles one interpreted point may take: 10 to 25 ms each, up to 5 s in all.
INTERPRETER_MAX_TILES = 200

NEEDS_INTERPRETER = (
    "Triton has no CPU target: start the process with TRITON_INTERPRET=1 to run its interpreter"
)


def require_launchable(device: torch.device) -> None:
    """Raises BackendUnavailableError where this process cannot launch a Triton kernel on it."""
    if reason := triton_unavailable_reason(launch_device(device)):
        raise BackendUnavailableError(reason)


def triton_unavailable_reason(device: Device) -> str | None:
    """Why Triton kernels of this process cannot run on a device of this kind, or None."""
    if device.kind == "cpu" and not is_interpreted():
        return NEEDS_INTERPRETER
    if device.kind != "cpu" and is_interpreted():
        return f"TRITON_INTERPRET=1 excludes launches on {device}; unset it and start again"
    return None


def triton_combination_refusal(config: AttentionConfig, device: Device) -> str | None:
    """Number formats Triton 3.7 gets wrong, or has no instruction for, on `device`."""
    if device.kind == "cpu":
        if config.dtype == torch.bfloat16 or config.kv_cache_dtype == "bf16":
            return "bf16 arithmetic is wrong in Triton's interpreter; use --dtype fp16 or fp32"
        if is_quantized_kv_cache(config.kv_cache_dtype):
            return "fp8 stores round wrongly in Triton's interpreter; use an unquantised KV cache"
    lacks_e4m3 = device.capability is not None and device.capability < (8, 9)
    if lacks_e4m3 and config.kv_cache_dtype == "fp8_e4m3":
        return "fp8_e4m3 needs compute capability 8.9 in Triton; use fp8_e5m2"
    return None


@dataclass(slots=True, kw_only=True)
class TritonAttentionMetadata:
    """One step's metadata; lengths in tokens."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    """(num_reqs,) keys of each request: of the encoder in encoder-decoder attention."""
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    groups: tuple[TileGroup, ...]


class TritonAttentionBackend(PairedCacheBackend):
    """Paged variable-length attention, prefill and decode, by kernels written for this project.

    Where keys and values differ in size, both have the wider one's room in the cache.
    """

    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = FLOAT_AND_FP8_CACHES
    install_hint: ClassVar[str] = "pip install triton"
    interpreted_on_cpu: ClassVar[bool] = True

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return TritonAttentionMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= 512

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= (7, 5)

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in ("cuda", "rocm", "cpu")

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return v_head_size == head_size or cls.supports_head_size(v_head_size)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_logits_soft_cap(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        return triton_combination_refusal(config, device)

    @classmethod
    def unavailable_reason(cls, device: Device) -> str | None:
        return triton_unavailable_reason(device)

    @classmethod
    def compilation_key(cls, workload: WorkloadFields, variant: str, device: Device) -> str:
        return triton_compilation_key(workload)

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return kernel_patterns_of(attention_kernel)

    @classmethod
    def interpreter_refusal(cls, workload: WorkloadFields) -> str | None:
        shape = workload.shape
        group = shape.num_heads // shape.num_kv_heads
        rows = INTERPRETER_TILE.block_m
        tiles = shape.num_kv_heads * sum(
            -(-request.query_len * group // rows) * -(-request.seq_len // INTERPRETER_TILE.tile_n)
            for request in workload.batch_spec.requests
        )
        return interpreter_limit(tiles)


def interpreter_limit(tiles: int) -> str | None:
    """Why this many key tiles are too many for the interpreter, or None."""
    if tiles <= INTERPRETER_MAX_TILES:
        return None
    return (
        f"{tiles} tiles are too many for Triton's interpreter on the CPU "
        f"(limit {INTERPRETER_MAX_TILES}, 10 to 25 ms each); use fewer heads or tokens, or a GPU"
    )


def triton_compilation_key(workload: WorkloadFields) -> str:
    """Numbers a kernel is compiled for, and the lengths that tile shapes are chosen by."""
    query_lens = {request.query_len for request in workload.batch_spec.requests}
    lengths = (sorted({next_power_of_two(n) for n in query_lens}), len(query_lens) == 1)
    types = (workload.dtype, workload.kv_cache_dtype, workload.attn_type)
    return f"{types} {workload.shape} {workload.block_size} {lengths}"


class TritonAttentionMetadataBuilder(AttentionMetadataBuilder[TritonAttentionMetadata]):
    """Chooses tiles and splits.

    In a uniform batch the kernels find their request by arithmetic, so a captured graph reads
    only the engine's own tensors; a ragged batch needs a map made on the host.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: ClassVar[bool] = True

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.launch_device = launch_device(device)
        self.num_sms = multiprocessors(device)

    def tile_shape(self, rows: int, is_short: bool) -> TileShape:
        """The tile shape of a group whose longest request has `rows` rows."""
        shape = self.spec.shape
        return attention_tile_shape(
            self.launch_device,
            shape.head_size,
            shape.v_head_size,
            self.spec.dtype,
            torch_dtype(self.spec.kv_cache_dtype),
            rows,
            is_short,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonAttentionMetadata:
        common = common_attn_metadata
        shape = self.spec.shape
        groups = plan_tile_groups(
            *host_lengths(common),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            v_head_size=shape.v_head_size,
            window=shape.sliding_window,
            max_short_query_len=max(SHORT_ROWS * shape.num_kv_heads // shape.num_heads, 1),
            choose_shape=self.tile_shape,
            num_sms=self.num_sms,
            device=self.device,
        )
        encoder_seq_lens = common.encoder_seq_lens
        return TritonAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens if encoder_seq_lens is None else encoder_seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            groups=groups,
        )

    def update_block_table(
        self,
        metadata: TritonAttentionMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> TritonAttentionMetadata:
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class TritonAttentionImpl(AttentionImpl[TritonAttentionMetadata]):
    """Launches the kernels. `do_kv_cache_update` must have run before `forward`."""

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.is_quantized = is_quantized_kv_cache(kv_cache_dtype)
        self.reads_cache = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if not self.reads_cache:
            return
        require_launchable(key.device)
        self.update_launch(layer, key, value, kv_cache, slot_mapping).run()

    def update_launch(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> Launch:
        """The launch of `do_kv_cache_update`."""
        scales = (layer._k_scale, layer._v_scale) if self.is_quantized else (None, None)
        return write_kv_launch(key, value, kv_cache, slot_mapping, *scales)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise UsageError("TRITON_ATTN does not quantise its output; call it without scales")
        require_launchable(query.device)
        for launch in self.launches(layer, query, key, value, kv_cache, attn_metadata, output):
            launch.run()
        return output

    def launches(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> list[Launch]:
        """The launches of `forward`; `lse` (num_tokens, num_heads) float32 is written too."""
        where: dict[str, Any]
        if self.reads_cache:
            where = {
                "key": kv_cache[0, ..., : self.head_size],
                "value": kv_cache[1, ..., : self.shape.v_head_size],
                "block_table": attn_metadata.block_table,
            }
            if self.is_quantized:
                where |= {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        else:
            where = {"key": key, "value": value, "key_start_loc": attn_metadata.query_start_loc}
        launches: list[Launch] = []
        for group in attn_metadata.groups:
            launches += attention_launches(
                group,
                query=query,
                output=output,
                query_start_loc=attn_metadata.query_start_loc,
                seq_lens=attn_metadata.seq_lens,
                scale=self.scale,
                causal=attn_metadata.causal and self.attn_type is AttentionType.DECODER,
                alibi_slopes=self.alibi_slopes,
                sinks=self.sinks,
                window=self.sliding_window,
                soft_cap=self.logits_soft_cap,
                lse=lse,
                **where,
            )
        return launches
