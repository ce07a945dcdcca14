"""TORCH_SDPA: `torch.nn.functional.scaled_dot_product_attention` over gathered pages.

What one gets without a paged kernel: the pages of each request are copied into dense K and V, then
torch's own kernel runs, once per group of requests of the same lengths. The copy is part of the
time, and shown apart as `page_gather`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnbench.backends.abstract import AttentionConfig
from attnbench.backends.builder import AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.cache_shapes import PairedCacheBackend
from attnbench.backends.device import Device
from attnbench.backends.dtypes import FLOAT_AND_FP8_CACHES
from attnbench.backends.impl import AttentionImpl, AttentionLayer
from attnbench.backends.masks import additive, alibi_bias, visible
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.paged_ops import dequantize, gather_heads, write_slots
from attnbench.backends.sdpa_refusal import sdpa_refusal
from attnbench.errors import SelectionError
from attnbench.workload.types import AttentionType

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_VARIANTS = {
    "cpu": ("", "flash", "math"),
    "cuda": ("", "flash", "cudnn", "efficient", "math"),
    "rocm": ("", "flash", "efficient", "math"),
}
#: Kernels of torch's CUDA builds, by the names other people's profiles show, and those of AOTriton
#: in builds for ROCm, by its source; neither yet seen by us.
_CUDA_PATTERNS = {
    "flash": (r"\bpytorch_flash::flash_fwd_(splitkv_)?kernel",),
    "cudnn": (r"^cudnn_.*sdpa",),
    "efficient": (r"^fmha_cutlassF",),
    "math": (r"(?i)softmax",),
}
_AOTRITON = (r"\battn_fwd",)
_ROCM_PATTERNS = {"flash": _AOTRITON, "efficient": _AOTRITON, "math": (r"(?i)softmax",)}
_PATTERNS = {"cuda": _CUDA_PATTERNS, "rocm": _ROCM_PATTERNS}


class TorchSDPABackend(PairedCacheBackend):
    """Variants: `""` is torch's own choice among its kernels; a name is that kernel or an error."""

    supported_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
    supported_kv_cache_dtypes: ClassVar[tuple[str, ...]] = FLOAT_AND_FP8_CACHES

    @staticmethod
    def get_name() -> str:
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[TorchSDPAImpl]:
        return TorchSDPAImpl

    @staticmethod
    def get_builder_cls() -> type[TorchSDPAMetadataBuilder]:
        return TorchSDPAMetadataBuilder

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        return _VARIANTS.get(device.kind, ("",))

    @classmethod
    def variant_refusal(cls, variant: str, config: AttentionConfig, device: Device) -> str | None:
        """What torch says when it is run; a batch's masks and lengths are asked by the builder."""
        return sdpa_refusal(variant, config, device)

    @classmethod
    def kernel_patterns(cls, variant: str, device: Device) -> tuple[str, ...]:
        return _PATTERNS.get(device.kind, {}).get(variant, ())

    @classmethod
    def supports_attn_type(cls, attn_type: AttentionType) -> bool:
        return True

    @classmethod
    def supports_device(cls, device: Device) -> bool:
        return device.kind in _VARIANTS

    @classmethod
    def supports_v_head_size(cls, head_size: int, v_head_size: int) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_combination(cls, config: AttentionConfig, device: Device) -> str | None:
        if config.use_alibi and device.kind != "cpu" and config.dtype != torch.float32:
            # Off the CPU the bias must have the query's dtype, and distances of a long context
            # are no longer exact there.
            return "ALiBi needs fp32 on this device: the bias would be rounded"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SDPAGroup:
    """Requests of the same lengths, computed by one call.

    token_index: (num_reqs * query_len,) rows of the query.
    block_table: (num_reqs, num_blocks), from the block of the first key any query sees.
    first_key: position of that key; skip: its offset in its block.
    num_keys: keys from there to the end.
    mask: (query_len, num_keys) bool, or None where `is_causal` or nothing is hidden.
    """

    query_len: int
    token_index: torch.Tensor
    block_table: torch.Tensor
    first_key: int
    skip: int
    num_keys: int
    is_causal: bool
    mask: torch.Tensor | None
    query_positions: torch.Tensor
    key_positions: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSDPAMetadata:
    groups: tuple[SDPAGroup, ...]


class TorchSDPAMetadataBuilder(AttentionMetadataBuilder[TorchSDPAMetadata]):
    """Groups requests by (query length, number of keys), longest first."""

    def __init__(
        self,
        spec: KVCacheSpec,
        layer_names: Sequence[str],
        device: torch.device,
        variant: str = "",
    ) -> None:
        super().__init__(spec, layer_names, device, variant)
        self.on_cpu = device.type == "cpu"

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchSDPAMetadata:
        """`common_prefix_len` changes nothing: a gathered prefix is copied per request.

        Raises: SelectionError when the variant asked for has no kernel for some of the requests.
        """
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        seq_lens = common.seq_lens_cpu if common.seq_lens_cpu is not None else common.seq_lens.cpu()
        members: dict[tuple[int, int], list[int]] = {}
        for request, seq_len in enumerate(seq_lens.tolist()):
            lengths = (starts[request + 1] - starts[request], seq_len)
            members.setdefault(lengths, []).append(request)
        groups = [
            self._group(common, lengths, requests, starts)
            for lengths, requests in sorted(members.items(), reverse=True)
        ]
        if reason := next(filter(None, map(self._refusal, groups)), ""):
            raise SelectionError(
                f"TORCH_SDPA:{self.variant} {reason}; use --backend TORCH_SDPA, where torch chooses"
            )
        return TorchSDPAMetadata(groups=tuple(groups))

    def _refusal(self, group: SDPAGroup) -> str:
        """Why the variant has no kernel for a group, as torch's rules say; "": it may have."""
        if self.on_cpu:
            return ""
        if self.variant == "flash" and group.mask is not None:
            lengths = f"{group.query_len} new tokens over {group.num_keys} keys"
            return f"takes no mask, and {lengths} need one"
        if self.variant == "cudnn" and group.num_keys == 1:
            return "takes two keys at least, and a request of this batch has one"
        return ""

    def _group(
        self,
        common: CommonAttentionMetadata,
        lengths: tuple[int, int],
        requests: list[int],
        starts: list[int],
    ) -> SDPAGroup:
        query_len, seq_len = lengths
        block_size, window, device = (
            self.spec.block_size,
            self.spec.shape.sliding_window,
            self.device,
        )
        first_query = seq_len - query_len
        first_key = max(0, first_query - window + 1) if window and common.causal else 0
        first_block = first_key // block_size
        query_positions = torch.arange(first_query, seq_len)
        key_positions = torch.arange(first_key, seq_len)
        square = query_len == seq_len and not window
        mask = None
        if not (common.causal and square):
            # On the host, where nobody waits for the device to look at it.
            seen = visible(query_positions, key_positions, common.causal, window)
            mask = None if bool(seen.all()) else seen.to(device)
        first_rows = torch.tensor([starts[r] for r in requests], device=device)
        token_index = first_rows[:, None] + torch.arange(query_len, device=device)
        last_block = -(-seq_len // block_size)
        rows = torch.tensor(requests, device=device)
        return SDPAGroup(
            query_len=query_len,
            token_index=token_index.reshape(-1),
            block_table=common.block_table_tensor[rows, first_block:last_block],
            first_key=first_key,
            skip=first_key - first_block * block_size,
            num_keys=seq_len - first_key,
            is_causal=common.causal and square,
            mask=mask,
            query_positions=query_positions.to(device),
            key_positions=key_positions.to(device),
        )


class TorchSDPAImpl(AttentionImpl[TorchSDPAMetadata]):
    """Gather, then SDPA, group by group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads_cache = self.attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)
        self.v_head_size = self.shape.v_head_size

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        write_slots(kv_cache[0], key, slot_mapping, layer._k_scale_float)
        write_slots(kv_cache[1], value, slot_mapping, layer._v_scale_float)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchSDPAMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raises SelectionError if the variant asked for cannot serve a group of this batch."""
        for group in attn_metadata.groups:
            if self.reads_cache:
                keys, values = self._gather(layer, kv_cache, group, query.dtype)
            else:
                keys, values = (
                    x[group.token_index].view(-1, group.query_len, *x.shape[1:]).transpose(1, 2)
                    for x in (key, value)
                )
            queries = query[group.token_index].view(-1, group.query_len, *query.shape[1:])
            out = self._attend(queries.transpose(1, 2), keys, values, group)
            output[group.token_index] = out.transpose(1, 2).flatten(0, 1)
        return output

    def parts(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TorchSDPAMetadata,
    ) -> Mapping[str, Callable[[], Any]]:
        if not self.reads_cache:
            return {}

        def gather_all() -> None:
            for group in attn_metadata.groups:
                self._gather(layer, kv_cache, group, query.dtype)

        return {"page_gather": gather_all}

    def _gather(
        self,
        layer: AttentionLayer,
        kv_cache: torch.Tensor,
        group: SDPAGroup,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense K and V of a group, (num_reqs, num_kv_heads, num_keys, size), in `dtype`."""
        tokens = slice(group.skip, group.skip + group.num_keys)
        keys = gather_heads(kv_cache[0], group.block_table)[:, :, tokens, : self.head_size]
        values = gather_heads(kv_cache[1], group.block_table)[:, :, tokens, : self.v_head_size]
        return (
            dequantize(keys, dtype, layer._k_scale_float),
            dequantize(values, dtype, layer._v_scale_float),
        )

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: SDPAGroup
    ) -> torch.Tensor:
        mask = group.mask
        is_causal = group.is_causal
        if self.alibi_slopes is not None:
            bias = alibi_bias(self.alibi_slopes, group.query_positions, group.key_positions)
            if is_causal:
                mask = visible(group.query_positions, group.key_positions, True, 0)
            mask = bias if mask is None else bias + additive(mask)
            is_causal = False
        run = partial(
            scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        try:
            with self._kernel():
                return run()
        except RuntimeError as error:
            if not self.variant or "available kernel" not in str(error):
                raise
            raise SelectionError(
                f"TORCH_SDPA:{self.variant} has no kernel for query {tuple(query.shape)}, key "
                f"{tuple(key.shape)}, value {tuple(value.shape)} in {query.dtype} "
                f"{'with' if mask is not None else 'without'} a mask; "
                "use --backend TORCH_SDPA, where torch chooses"
            ) from error

    def _kernel(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(_KERNELS[self.variant]) if self.variant else nullcontext()
