"""The impls of `VLLM:NAME`, which hand everything to vLLM's own.

What a call costs beside vLLM's: nothing for ordinary attention but one Python call; for MLA a copy
of the decode output (vLLM's impls return a new tensor). An fp8 query is made as vLLM's layer makes
it, in the time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attnbench.backends.dtypes import is_fp8
from attnbench.backends.impl import AttentionImpl, AttentionLayer, MLAAttentionImpl, MLALayer
from attnbench.backends.vllm_bridge_builder import VllmMetadata
from attnbench.backends.vllm_bridge_engine import (
    Limits,
    VllmLibrary,
    cache_dtype,
    kv_b_proj_weight,
    load_vllm,
    make_config,
    make_layer,
    parameters_of,
)
from attnbench.errors import UsageError
from attnbench.workload.types import AttentionShape, AttentionType

_SCALES = ("_q_scale", "_k_scale", "_v_scale")


class _Bound:
    """vLLM's layer behind an impl: made at the first call, when dtype and device are known."""

    def __init__(
        self,
        vllm_name: str,
        shape: AttentionShape,
        kv_cache_dtype: str,
        attn_type: AttentionType,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self.library: VllmLibrary = load_vllm()
        self.their_class = self.library.backend(vllm_name)
        self.shape = shape
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.alibi_slopes = alibi_slopes
        self.sinks = sinks
        self.cache_dtype = ""
        self.layout = ""
        self._config: Any = None
        self._layer: Any = None
        self._scales: tuple[float, ...] = (1.0, 1.0, 1.0)
        self._seen: tuple[torch.Tensor, int | None, torch.Tensor] | None = None

    def layer(
        self, ours: AttentionLayer, like: torch.Tensor, projection: torch.Tensor | None = None
    ) -> Any:
        """vLLM's layer with the scales of `ours`; `like` has the query's dtype and device."""
        if self._layer is None:
            self.cache_dtype = cache_dtype(self.kv_cache_dtype, like.dtype)
            self._config = make_config(
                self.library,
                self.shape,
                like.dtype,
                self.kv_cache_dtype,
                16,  # no impl reads the block size: it sees the cache
                Limits(),
            )
            self._layer = make_layer(
                self.library,
                self.their_class,
                self._config,
                like.device,
                self.attn_type,
                self.alibi_slopes,
                self.sinks,
                projection,
            )
        scales = (ours._q_scale_float, ours._k_scale_float, ours._v_scale_float)
        if scales != self._scales:
            self._set_scales(ours)
            self._scales = scales
        return self._layer

    def _set_scales(self, ours: AttentionLayer) -> None:
        for name in _SCALES:
            number = getattr(ours, f"{name}_float")
            getattr(self._layer, name).copy_(getattr(ours, name))
            setattr(self._layer, f"{name}_float", number)
            on_the_host = getattr(self._layer, f"{name}_cpu", None)
            if on_the_host is not None:
                on_the_host.fill_(number)

    def cache(self, kv_cache: torch.Tensor, metadata: VllmMetadata) -> torch.Tensor:
        """The cache of a step; 0.30's FLASHINFER reads its layout from the configuration."""
        if metadata.layout != self.layout:
            self.library.api.apply_layout(self._config, metadata.layout)
            self.layout = metadata.layout
        return self.view(kv_cache, metadata.num_blocks)

    def view(self, kv_cache: torch.Tensor, num_blocks: int | None = None) -> torch.Tensor:
        """The cache as vLLM's impl gets it; made again only for another one."""
        if self._seen is None or self._seen[0] is not kv_cache or self._seen[1] != num_blocks:
            self._seen = (kv_cache, num_blocks, self.library.api.view(kv_cache, num_blocks))
        return self._seen[2]


def _refuse_quantised_output(*scales: torch.Tensor | None) -> None:
    if any(scale is not None for scale in scales):
        raise UsageError("VLLM backends are run without a quantised output; call without scales")


class VllmAttentionImpl(AttentionImpl[VllmMetadata]):
    """The impl of one backend of vLLM."""

    vllm_name: ClassVar[str] = ""

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises BackendUnavailableError."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.bound = _Bound(self.vllm_name, shape, kv_cache_dtype, attn_type, alibi_slopes, sinks)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """vLLM's own; nothing where `forward` writes."""
        if self.bound.their_class.forward_includes_kv_cache_update or not len(slot_mapping):
            return
        theirs = self.bound.layer(layer, key)
        theirs.impl.do_kv_cache_update(theirs, key, value, self.bound.view(kv_cache), slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: VllmMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        _refuse_quantised_output(output_scale, output_block_scale)
        theirs = self.bound.layer(layer, query)
        if theirs.query_quant is not None and not is_fp8(query.dtype):
            rows, _ = theirs.query_quant(query.flatten(1), theirs._q_scale)
            query = rows.view(query.shape)
        theirs.impl.forward(
            theirs,
            query,
            key,
            value,
            self.bound.cache(kv_cache, attn_metadata),
            attn_metadata.theirs,
            output=output,
        )
        return output


class VllmMLAImpl(MLAAttentionImpl[VllmMetadata]):
    """The impl of one MLA backend of vLLM."""

    vllm_name: ClassVar[str] = ""

    def __init__(
        self,
        shape: AttentionShape,
        kv_cache_dtype: str = "auto",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        variant: str = "",
    ) -> None:
        """Raises BackendUnavailableError."""
        super().__init__(shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, variant)
        self.bound = _Bound(self.vllm_name, shape, kv_cache_dtype, attn_type, None, None)
        self._projection: torch.Tensor | None = None

    def _layer(self, layer: MLALayer, like: torch.Tensor) -> Any:
        if self._projection is None:
            self._projection = kv_b_proj_weight(layer.W_UK, layer.W_UV).to(like.dtype)
        return self.bound.layer(layer, like, self._projection)

    def _cache(self, kv_cache: torch.Tensor, attn_metadata: VllmMetadata) -> torch.Tensor:
        view = self.bound.cache(kv_cache, attn_metadata)
        if view.dtype is not torch.uint8:
            return view
        # As vLLM's MLA layer does before either form.
        return view.view(self.bound.library.platform.fp8_dtype())

    def do_kv_cache_update(
        self,
        layer: MLALayer,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        theirs = self._layer(layer, kv_c_normed)
        name = self.bound.cache_dtype
        more: dict[str, Any] = {}
        update = theirs.impl.do_kv_cache_update
        if "skip_scale" in parameters_of(type(theirs.impl).do_kv_cache_update):
            more["skip_scale"] = name.startswith("fp8") and theirs._k_scale_float == 1.0
        update(
            kv_c_normed,
            k_pe,
            self.bound.view(kv_cache),
            slot_mapping,
            name,
            theirs._k_scale,
            **more,
        )

    def forward_mqa(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: VllmMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        """No LSE: vLLM takes one under context parallelism only, each backend in its own form."""
        theirs = self._layer(layer, q)
        latent, rope = q[..., : self.kv_lora_rank], q[..., self.kv_lora_rank :]
        query: Any = (latent, rope)
        if theirs.q_pad_num_heads is not None:
            query = (_padded(latent, theirs.q_pad_num_heads), _padded(rope, theirs.q_pad_num_heads))
        if self.bound.cache_dtype.startswith("fp8") and theirs.impl.supports_quant_query_input:
            query = theirs._decode_concat_quant_fp8_op(*query, theirs._q_scale)
        found, _ = theirs.impl.forward_mqa(
            query, self._cache(kv_cache, attn_metadata), attn_metadata.theirs, theirs
        )
        output.copy_(found.view(-1, *output.shape[1:]))
        return None

    def forward_mha(
        self,
        layer: MLALayer,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: VllmMetadata,
        output: torch.Tensor,
    ) -> None:
        theirs = self._layer(layer, q)
        theirs.impl.forward_mha(
            q,
            kv_c_normed,
            k_pe,
            self._cache(kv_cache, attn_metadata),
            attn_metadata.theirs,
            theirs._k_scale,
            output=output.flatten(1),
        )


def _padded(query: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The same values in memory with room for `num_heads` heads, which some kernels read."""
    tokens, heads, size = query.shape
    memory = query.new_empty((tokens, num_heads, size))
    memory.resize_((tokens, heads, size))
    return memory.copy_(query)
