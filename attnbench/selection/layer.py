"""`Attention` and `MLAAttention`: the layers a model calls. They never know which kernel runs."""

from __future__ import annotations

from typing import Any

import torch

from attnbench.backends.abstract import AttentionBackend
from attnbench.backends.builder import AttentionMetadataBuilder, KVCacheSpec
from attnbench.backends.device import Device
from attnbench.backends.impl import AttentionImpl, MLAAttentionImpl
from attnbench.backends.registry import get_backend_class
from attnbench.errors import UsageError
from attnbench.selection.config import config_for
from attnbench.selection.platform import current_device
from attnbench.selection.selector import Selection, select
from attnbench.workload.types import AttentionShape, AttentionType


class _Layer(torch.nn.Module):
    """What both layers share: the selection, the scales of a quantised cache, the builder.

    Args:
        shape: heads, sizes and features of the layer.
        dtype: of queries and outputs.
        kv_cache_dtype, block_size, kv_cache_layout: of the cache it is called with.
        attn_type: one of the four kinds.
        backend: name of a backend; None: `select` decides.
        device: a selection device; None: this machine's.

    Raises: SelectionError, UnknownBackendError.
    """

    _q_scale: torch.Tensor
    _k_scale: torch.Tensor
    _v_scale: torch.Tensor
    _prob_scale: torch.Tensor

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        kv_cache_dtype: str,
        block_size: int,
        kv_cache_layout: str,
        attn_type: AttentionType,
        backend: str | None,
        device: Device | None,
        use_sparse: bool = False,
    ) -> None:
        super().__init__()
        self.shape = shape
        config = config_for(
            shape, dtype, kv_cache_dtype, block_size, kv_cache_layout, attn_type, use_sparse
        )
        self.selection: Selection = select(config, device or current_device(), backend)
        self.backend: type[AttentionBackend] = get_backend_class(self.selection.backend)
        self.kv_cache_spec = KVCacheSpec(
            shape=shape,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            kv_cache_layout=kv_cache_layout,
        )
        for name in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
            self.register_buffer(name, torch.ones((), dtype=torch.float32))
        self._q_scale_float = self._k_scale_float = self._v_scale_float = 1.0

    def set_scales(self, *, q: float = 1.0, k: float = 1.0, v: float = 1.0) -> None:
        """Scales of the query and of the cache: a stored value times its scale is the value."""
        for name, value in (("_q_scale", q), ("_k_scale", k), ("_v_scale", v)):
            getattr(self, name).fill_(value)
            setattr(self, f"{name}_float", float(value))

    def make_builder(
        self, device: torch.device | str, layer_names: tuple[str, ...] = ("attention",)
    ) -> AttentionMetadataBuilder[Any]:
        """The builder whose metadata `forward` takes; layers of one kind share one."""
        builder = self.backend.get_builder_cls()
        return builder(
            self.kv_cache_spec, layer_names, torch.device(device), self.selection.variant
        )

    def extra_repr(self) -> str:
        return f"backend={self.selection.backend}, heads={self.shape.num_heads}"


class Attention(_Layer):
    """Ordinary attention of one layer.

    Args (besides those of `_Layer`):
        alibi_slopes: (num_heads,) float32; needed when `shape.use_alibi`.
        sinks: (num_heads,); needed when `shape.has_sink`.

    Raises: UsageError for an MLA shape, or when slopes or sinks are missing.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        dtype: torch.dtype,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        kv_cache_layout: str = "NHD",
        attn_type: AttentionType = AttentionType.DECODER,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        backend: str | None = None,
        device: Device | None = None,
    ) -> None:
        if shape.is_mla:
            raise UsageError("Attention was given an MLA shape; use MLAAttention")
        super().__init__(
            shape, dtype, kv_cache_dtype, block_size, kv_cache_layout, attn_type, backend, device
        )
        _check_given("alibi_slopes", shape.use_alibi, alibi_slopes, shape)
        _check_given("sinks", shape.has_sink, sinks, shape)
        self.register_buffer("alibi_slopes", alibi_slopes)
        self.register_buffer("sinks", sinks)
        make_impl: Any = self.backend.get_impl_cls()
        self.impl: AttentionImpl[Any] = make_impl(
            shape, kv_cache_dtype, attn_type, alibi_slopes, sinks, self.selection.variant
        )
        self._has_cache = attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        slot_mapping: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new keys and values to the cache, then attend over all of it.

        Args:
            query: (num_tokens, num_heads, head_size).
            key: (num_new_tokens, num_kv_heads, head_size); empty when the cache holds everything
                (cross attention after its first step).
            value: (num_new_tokens, num_kv_heads, v_head_size).
            attn_metadata: of this backend's builder (`make_builder`).
            slot_mapping: (num_new_tokens,) int64, where they are written.
            output: (num_tokens, num_heads, v_head_size), written in place; None: allocated.

        Returns: the output.
        """
        if output is None:
            shape = (query.shape[0], self.shape.num_heads, self.shape.v_head_size)
            output = query.new_empty(shape)
        if self._has_cache and key.shape[0] and not self.backend.forward_includes_kv_cache_update:
            self.impl.do_kv_cache_update(self, key, value, kv_cache, slot_mapping)
        return self.impl.forward(self, query, key, value, kv_cache, attn_metadata, output)


class MLAAttention(_Layer):
    """Multi-head latent attention of one layer: absorbs, splits and up-projects around the kernel.

    Args (besides those of `_Layer`):
        W_UK: (num_heads, qk_nope_head_dim, kv_lora_rank).
        W_UV: (num_heads, kv_lora_rank, v_head_size). Both are halves of the model's `kv_b_proj`.
        use_sparse: queries attend to the positions that the metadata's `topk_indices_buffer` gives.

    Raises: UsageError for a shape that is not MLA, or weights of other sizes.
    """

    W_UK: torch.Tensor
    W_UV: torch.Tensor

    def __init__(
        self,
        shape: AttentionShape,
        W_UK: torch.Tensor,
        W_UV: torch.Tensor,
        *,
        dtype: torch.dtype,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        kv_cache_layout: str = "NHD",
        backend: str | None = None,
        device: Device | None = None,
        use_sparse: bool = False,
    ) -> None:
        if not shape.is_mla:
            raise UsageError("MLAAttention was given a shape without kv_lora_rank; use Attention")
        super().__init__(
            shape,
            dtype,
            kv_cache_dtype,
            block_size,
            kv_cache_layout,
            AttentionType.DECODER,
            backend,
            device,
            use_sparse,
        )
        heads, rank = shape.num_heads, shape.kv_lora_rank
        for name, weight, wanted in (
            ("W_UK", W_UK, (heads, shape.qk_nope_head_dim, rank)),
            ("W_UV", W_UV, (heads, rank, shape.v_head_size)),
        ):
            if tuple(weight.shape) != wanted:
                raise UsageError(
                    f"{name} has shape {tuple(weight.shape)}; this shape needs {wanted}"
                )
            self.register_buffer(name, weight)
        make_impl: Any = self.backend.get_impl_cls()
        self.impl: MLAAttentionImpl[Any] = make_impl(
            shape, kv_cache_dtype, AttentionType.DECODER, None, None, self.selection.variant
        )

    def forward(
        self,
        query: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        slot_mapping: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the new latents, then attend: decode tokens absorbed, the others expanded.

        Args:
            query: (num_tokens, num_heads, qk_nope_head_dim + qk_rope_head_dim), decode first.
            kv_c_normed: (num_tokens, kv_lora_rank).
            k_pe: (num_tokens, 1, qk_rope_head_dim).
            attn_metadata: of this backend's builder (`make_builder`).
            slot_mapping: (num_tokens,) int64, where the latents are written.
            output: (num_tokens, num_heads, v_head_size), written in place; None: allocated.

        Returns: the output.
        """
        shape = self.shape
        if output is None:
            output = query.new_empty((query.shape[0], shape.num_heads, shape.v_head_size))
        if not self.backend.forward_includes_kv_cache_update:
            self.impl.do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping)
        split = attn_metadata.num_decode_tokens
        if split:
            nope = query[:split, :, : shape.qk_nope_head_dim]
            rope = query[:split, :, shape.qk_nope_head_dim :]
            absorbed = torch.einsum("thn,hnl->thl", nope, self.W_UK)
            latent = query.new_empty((split, shape.num_heads, shape.kv_lora_rank))
            self.impl.forward_mqa(
                self, torch.cat([absorbed, rope], -1), kv_cache, attn_metadata, latent
            )
            output[:split] = torch.einsum("thl,hlv->thv", latent, self.W_UV)
        if split < query.shape[0]:
            self.impl.forward_mha(
                self,
                query[split:],
                kv_c_normed[split:],
                k_pe[split:],
                kv_cache,
                attn_metadata,
                output[split:],
            )
        return output


def _check_given(
    name: str, needed: bool, given: torch.Tensor | None, shape: AttentionShape
) -> None:
    if needed != (given is not None):
        raise UsageError(
            f"this shape needs {name}; pass a tensor of ({shape.num_heads},)"
            if needed
            else f"{name} were given, and this shape has none; leave them out"
        )
