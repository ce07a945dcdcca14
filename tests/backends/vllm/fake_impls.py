"""Impls of the fake vLLM: attention in plain torch over the cache they are given."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.backends.flash_attn.fake_library import attend
from tests.backends.vllm.fake_state import FP8, State, has_cache_shapes, signature_of


def _planes(state: State, cache: torch.Tensor, own: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V caches (blocks, tokens, heads, size) of the cache an impl is given."""
    if has_cache_shapes(state.version):
        assert cache.dim() == 5
        axis = own.pair_axis(cache)
        return cache.select(axis, 0), cache.select(axis, 1)
    assert cache.dim() == 4, "(blocks, head slots, tokens, content)"
    cache, heads, size = cache.transpose(1, 2), own.num_kv_heads, own.head_size
    if cache.shape[-1] == size:
        assert cache.shape[2] == 2 * heads
        return cache[:, :, :heads], cache[:, :, heads:]
    return cache[..., :size], cache[..., size:]


def _rows(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    size = cache.shape[1]
    blocks = table[: -(-length // size)].long()
    return cache[blocks].flatten(0, 1)[:length]


def _store(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, scale: Any) -> None:
    if cache.dtype is torch.uint8:
        rows = (rows.float() / scale).to(FP8).view(torch.uint8)
    keep = slots >= 0
    size = cache.shape[1]
    cache[slots[keep] // size, slots[keep] % size] = rows[keep]


def make_impl(
    state: State,
    quant_query: bool = False,
    writes: bool = False,
    gpu_blocks: bool = False,
    layout: str | None = None,
) -> type[Any]:
    class Impl:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("TritonAttentionImpl.__init__", *args, **kwargs)
            self.cache_config = state.current().cache_config
            self.supports_quant_query_input = quant_query
            self.scale, self.head_size, self.num_kv_heads = a.scale, a.head_size, a.num_kv_heads
            self.softcap = a.logits_soft_cap or 0.0
            self.attn_type = a.attn_type
            self.is_encoder = a.attn_type in ("encoder", "encoder_only")
            self.window = (-1, -1)
            if a.sliding_window is not None:
                left = a.sliding_window - 1
                self.window = (left, left if self.is_encoder else 0)
            assert a.alibi_slopes is None or isinstance(a.alibi_slopes, list)
            self.alibi = (
                None
                if a.alibi_slopes is None
                else torch.tensor(a.alibi_slopes, dtype=torch.float32)
            )
            assert a.sinks is None or a.sinks.dtype is torch.bfloat16
            self.sinks = a.sinks
            self.loaded = False

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            self.loaded = True

        def pair_axis(self, cache: torch.Tensor) -> int:
            return 0 if cache.shape[0] == 2 else 1

        def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("TritonAttentionImpl.do_kv_cache_update", *args, **kwargs)
            if writes:
                raise AssertionError("forward writes")
            if not self.is_encoder:
                self._write(a)

        def _write(self, a: SimpleNamespace) -> None:
            key_cache, value_cache = _planes(state, a.kv_cache, self)
            _store(key_cache, a.key, a.slot_mapping, a.layer._k_scale)
            _store(value_cache, a.value, a.slot_mapping, a.layer._v_scale)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            a = state.bind("TritonAttentionImpl.forward", *args, **kwargs)
            assert self.loaded, "process_weights_after_loading"
            common, layer = a.attn_metadata.common, a.layer
            call = SimpleNamespace(
                q=a.query,
                cu_seqlens_q=common.query_start_loc,
                softmax_scale=self.scale,
                window_size=self.window,
                softcap=self.softcap,
                causal=common.causal,
            )
            if a.query.dtype is FP8:
                assert quant_query
                call.q = a.query.float() * layer._q_scale
            if self.is_encoder:
                lens = common.seq_lens.tolist()
                keys, values = list(a.key.split(lens)), list(a.value.split(lens))
            else:
                if writes:
                    self._write(SimpleNamespace(**vars(a), slot_mapping=common.slot_mapping))
                keys, values = self._read(a, common, layer)
            out, _ = attend(call, keys, values, self.alibi, self.sinks)
            a.output.copy_(out)
            return a.output  # type: ignore[no-any-return]

        def _read(self, a: SimpleNamespace, common: Any, layer: Any) -> Any:
            cache = a.kv_cache
            if layout == "HND":
                # The memory of one head of a block is one piece.
                planes = _planes(state, cache, self)
                assert planes[0].stride(1) < planes[0].stride(2), "not HND"
                if not has_cache_shapes(state.version):
                    # FLASHINFER of 0.30.0 asks its configuration at every call.
                    assert self.cache_config.kv_cache_layout == "LBHNC"
            if gpu_blocks:
                size = a.attn_metadata.block_size
                tokens = a.attn_metadata.num_blocks * size
                assert cache.numel() == 2 * tokens * self.num_kv_heads * self.head_size
            key_cache, value_cache = _planes(state, cache, self)
            assert key_cache.shape[1] == a.attn_metadata.block_size
            found = []
            for plane, scale in ((key_cache, layer._k_scale), (value_cache, layer._v_scale)):
                rows = [
                    _rows(plane, table, int(length))
                    for table, length in zip(
                        common.block_table_tensor, common.seq_lens, strict=True
                    )
                ]
                if plane.dtype is torch.uint8:
                    rows = [row.view(FP8).float() * scale for row in rows]
                found.append(rows)
            return found

    return Impl


def make_mla_impl(state: State, pad: int | None) -> type[Any]:
    class Impl:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("MLAAttentionImpl.__init__", *args, **kwargs)
            self.scale, self.rank, self.num_heads = a.scale, a.kv_lora_rank, a.num_heads
            self.nope, self.v = a.qk_nope_head_dim, a.v_head_dim
            self.kv_b_proj: Callable[..., Any] = a.kv_b_proj
            self.supports_quant_query_input = True
            self.pad = pad
            # 0.22.1 waits for the layer's first forward.
            self.dcp_world_size = -1 if has_cache_shapes(state.version) else 1

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            return

        def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("MLAAttentionImpl.do_kv_cache_update", *args, **kwargs)
            assert a.kv_cache.dtype is (
                torch.uint8 if a.kv_cache_dtype.startswith("fp8") else a.kv_c_normed.dtype
            )
            assert not getattr(a, "skip_scale", False) or float(a.k_scale) == 1.0
            rows = torch.cat([a.kv_c_normed, a.k_pe.squeeze(1)], -1)
            _store(a.kv_cache, rows, a.slot_mapping, a.k_scale)

        def forward_mqa(self, *args: Any, **kwargs: Any) -> Any:
            a = state.bind("MLAAttentionImpl.forward_mqa", *args, **kwargs)
            query = a.q
            if isinstance(query, tuple):
                assert a.kv_c_and_k_pe_cache.dtype is not FP8
                if pad is not None:
                    for part in query:
                        room = part.untyped_storage().nbytes() // part.element_size()
                        assert room >= part.shape[0] * pad * part.shape[2]
                query = torch.cat([part.float() for part in query], -1)
            else:
                assert query.dtype is FP8
                query = query.float() * a.layer._q_scale
            common, count = a.attn_metadata.common, a.attn_metadata.num_decodes
            keys = [self._latents(a, r, int(common.seq_lens[r])) for r in range(count)]
            call = SimpleNamespace(
                q=query,
                cu_seqlens_q=common.query_start_loc[: count + 1],
                softmax_scale=self.scale,
                window_size=None,
                softcap=0.0,
                causal=True,
            )
            out, _ = attend(
                call,
                [k[:, None] for k in keys],
                [k[:, None, : self.rank] for k in keys],
                None,
                None,
            )
            return out, None

        def _latents(self, a: SimpleNamespace, request: int, length: int) -> torch.Tensor:
            cache = a.kv_c_and_k_pe_cache
            assert cache.dim() == 3
            stored = cache.view(torch.uint8) if cache.dtype is FP8 else cache
            table = a.attn_metadata.common.block_table_tensor[request]
            rows = _rows(stored, table, length)
            scale = a.layer._k_scale if hasattr(a, "layer") else a.k_scale
            return rows.view(FP8).float() * scale if cache.dtype is FP8 else rows.float()

        def forward_mha(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("MLAAttentionImpl.forward_mha", *args, **kwargs)
            assert self.dcp_world_size != -1
            assert a.output.dim() == 2
            common, first = a.attn_metadata.common, a.attn_metadata.num_decodes
            starts = common.query_start_loc[first:] - common.query_start_loc[first]
            keys, values = [], []
            for request in range(first, common.num_reqs):
                latents = self._latents(a, request, int(common.seq_lens[request]))
                up, bias = self.kv_b_proj(latents[:, : self.rank].to(a.q.dtype))
                assert bias is None
                heads = up.view(-1, self.num_heads, self.nope + self.v).float()
                rope = latents[:, None, self.rank :].expand(-1, self.num_heads, -1)
                keys.append(torch.cat([heads[..., : self.nope], rope], -1))
                values.append(heads[..., self.nope :])
            call = SimpleNamespace(
                q=a.q,
                cu_seqlens_q=starts,
                softmax_scale=self.scale,
                window_size=None,
                softcap=0.0,
                causal=True,
            )
            out, _ = attend(call, keys, values, None, None)
            a.output.copy_(out.flatten(1))

    # The bridge reads its parameters off the function.
    update: Any = Impl.do_kv_cache_update
    update.__signature__ = signature_of(state.version, "MLAAttentionImpl.do_kv_cache_update")
    return Impl
