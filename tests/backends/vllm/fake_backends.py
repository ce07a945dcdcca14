"""Backends of the fake vLLM: the forms of cache, blocks, layouts and impls the real ones have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.backends.flash_attn.fake_library import attend
from tests.backends.vllm.fake_vllm import FP8, State, has_cache_shapes, layouts_of, signature_of


def multiple_of(base: int) -> SimpleNamespace:
    return SimpleNamespace(base=base)


def make_backends(state: State) -> tuple[type[Any], dict[str, type[Any]]]:
    """vLLM's `AttentionBackend`, and classes by their names in the registry."""
    base = _base(state)

    def backend(name: str, impl: type[Any], threshold: int | None, **members: Any) -> type[Any]:
        members.setdefault("get_supported_kernel_block_sizes", lambda: [multiple_of(16)])
        members = {
            member: staticmethod(value) if inspect.isfunction(value) else value
            for member, value in members.items()
        }
        builder = _builder(state, threshold, gpu_blocks=name == "FLEX_ATTENTION")
        members |= {
            "get_name": staticmethod(lambda: name),
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        }
        return type(f"Fake_{name}", (base,), members)

    def with_config() -> list[Any]:
        state.current()  # FLASH_ATTN of 0.22.1 asks it for hybrid models
        return [multiple_of(16)]

    pair_first: dict[str, Any] = {"pair": 0}
    found = {
        "TRITON_ATTN": backend("TRITON_ATTN", _impl(state), None, pair=1),
        "FLASH_ATTN": backend(
            "FLASH_ATTN",
            _impl(state, quant_query=True),
            None,
            get_supported_kernel_block_sizes=with_config,
            **pair_first,
        ),
        "FLASHINFER": backend(
            "FLASHINFER",
            _impl(state, layout="HND"),
            1,
            pair=1,
            layout="HND",
            get_supported_kernel_block_sizes=lambda: [16, 32, 64],
        ),
        "FLEX_ATTENTION": backend("FLEX_ATTENTION", _impl(state, gpu_blocks=True), None, pair=0),
        "ROCM_AITER_FA": backend("ROCM_AITER_FA", _impl(state), None, pair=0, planes=True),
        "CPU_ATTN": backend(
            "CPU_ATTN",
            _impl(state, writes=True),
            None,
            pair=0,
            forward_includes_kv_cache_update=True,
        ),
        "FLASH_ATTN_DIFFKV": backend("FLASH_ATTN_DIFFKV", _impl(state), None, pair=-1),
    }
    for name, threshold, pad, sizes in (
        ("TRITON_MLA", 1, None, [multiple_of(16)]),
        ("FLASHMLA", 128, None, [64]),
        ("CUTLASS_MLA", 1, 128, [128]),
    ):
        found[name] = backend(
            name,
            _mla_impl(state, pad),
            threshold,
            mla=True,
            forward_includes_kv_cache_update=True,
            get_supported_kernel_block_sizes=lambda sizes=sizes: sizes,
        )
    found["FLASHMLA_SPARSE"] = backend(
        "FLASHMLA_SPARSE", _mla_impl(state, None), None, mla=True, sparse=True
    )
    return base, found


def _base(state: State) -> type[Any]:
    class AttentionBackend:
        forward_includes_kv_cache_update = False
        pair = 1
        planes = False
        mla = False
        sparse = False
        layout: str | None = None

        @classmethod
        def is_mla(cls) -> bool:
            return cls.mla

        @classmethod
        def is_sparse(cls) -> bool:
            return cls.sparse

        @classmethod
        def is_ssm(cls) -> bool:
            return False

    def validate(a: SimpleNamespace) -> list[str]:
        state.current()
        reasons = list(state.reasons)
        if a.kv_cache_dtype not in ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"):
            reasons.append("kv_cache_dtype not supported")
        return reasons

    cls: Any = AttentionBackend
    cls.validate_configuration = classmethod(
        lambda own, *args, **kwargs: (
            validate(state.bind("AttentionBackend.validate_configuration", *args, **kwargs))
            + (["sparse"] if own.sparse else [])
            + (["MLA"] if own.mla != kwargs["use_mla"] else [])
        )
    )
    # The bridge reads the parameters off the function.
    cls.validate_configuration.__func__.__signature__ = _with_cls(
        signature_of(state.version, "AttentionBackend.validate_configuration")
    )
    if has_cache_shapes(state.version):
        _add_shapes(state, cls)
    else:
        _add_specs(state, cls)
    return AttentionBackend


def _with_cls(signature: inspect.Signature) -> inspect.Signature:
    own = inspect.Parameter("own", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def _add_shapes(state: State, cls: Any) -> None:
    def shape(own: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        a = state.bind("AttentionBackend.get_kv_cache_shape", *args, **kwargs)
        if own.mla:
            return (a.num_blocks, a.block_size, a.head_size)
        if own.pair == -1:
            return (a.num_blocks, a.block_size, a.num_kv_heads, 2 * a.head_size)
        rest = (a.block_size, a.num_kv_heads, a.head_size)
        return (2, a.num_blocks, *rest) if own.pair == 0 else (a.num_blocks, 2, *rest)

    def order(own: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        state.bind("AttentionBackend.get_kv_cache_stride_order", *args, **kwargs)
        if own.mla:
            raise NotImplementedError
        assert state.layout is not None
        return (0, 1, 2, 3, 4) if state.layout == "NHD" else (0, 1, 3, 2, 4)

    cls.get_kv_cache_shape = classmethod(shape)
    cls.get_kv_cache_stride_order = classmethod(order)
    cls.get_required_kv_cache_layout = classmethod(lambda own: own.layout)


def _add_specs(state: State, cls: Any) -> None:
    from dataclasses import replace

    layouts = layouts_of(state.version)

    def customize(own: Any, spec: Any) -> Any:
        if own.pair == -1:
            return replace(spec, state_content_bytes=5)
        if own.planes:
            size = spec.head_size * spec.dtype.itemsize
            slots = 2 * spec.num_kv_heads
            return replace(spec, num_head_slots=slots, state_content_bytes=size)
        return replace(spec, head_size_v=0) if own.mla else spec

    cls.customize_spec = classmethod(customize)
    cls.supported_kv_cache_layouts = classmethod(
        lambda own: (layouts.LBHNC, layouts.BLHNC) if own.layout == "HND" else None
    )


def _builder(state: State, threshold: int | None, gpu_blocks: bool) -> type[Any]:
    class Builder:
        reorder_batch_threshold = threshold

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            a = state.bind("TritonAttentionMetadataBuilder.__init__", *args, **kwargs)
            config = state.current()
            assert config is a.vllm_config
            assert config.compilation_config.cudagraph_capture_sizes, "no capture sizes specified"
            (name,) = a.layer_names
            self.layer = config.compilation_config.static_forward_context[name]
            model = config.model_config
            self.num_heads = model.get_num_attention_heads(config.parallel_config)
            assert model.get_num_kv_heads(config.parallel_config) == a.kv_cache_spec.num_kv_heads
            assert model.get_head_size() == a.kv_cache_spec.head_size
            self.config, self.spec, self.device = config, a.kv_cache_spec, a.device
            if not has_cache_shapes(state.version):
                assert config.cache_config.kv_cache_layout in ("LBNHC", "LBHNC")

        @classmethod
        def get_cudagraph_support(cls, *args: Any, **kwargs: Any) -> Any:
            state.bind("AttentionMetadataBuilder.get_cudagraph_support", *args, **kwargs)
            state.current()  # FLASHINFER asks it
            return SimpleNamespace(name="UNIFORM_BATCH")

        def build(self, *args: Any, **kwargs: Any) -> Any:
            a = state.bind("TritonAttentionMetadataBuilder.build", *args, **kwargs)
            common = a.common_attn_metadata
            assert type(common).__name__ == "CommonAttentionMetadata"
            assert common.seq_lens_cpu_upper_bound is not None
            assert common.num_reqs <= self.config.scheduler_config.max_num_seqs
            tokens = self.config.scheduler_config.max_num_batched_tokens
            assert common.num_actual_tokens <= tokens
            assert common.max_seq_len <= self.config.model_config.max_model_len
            decode = 0
            if threshold is not None:
                lens = common.query_start_loc_cpu.diff().tolist()
                decode = next((i for i, n in enumerate(lens) if n > threshold), len(lens))
            num_blocks = self.config.cache_config.num_gpu_blocks if gpu_blocks else None
            return SimpleNamespace(
                common=common,
                num_blocks=num_blocks,
                num_decodes=decode,
                num_decode_tokens=int(common.query_start_loc_cpu[decode]),
                block_size=self.spec.block_size,
            )

    if "AttentionMetadataBuilder.use_cascade_attention" in _functions(state):
        cascade: Any = Builder
        cascade.use_cascade_attention = lambda self, *args, **kwargs: (
            state.bind(
                "AttentionMetadataBuilder.use_cascade_attention", *args, **kwargs
            ).common_prefix_len
            >= 256
        )
    return Builder


def _functions(state: State) -> Any:
    from tests.backends.vllm.fake_vllm import RECORDED

    return RECORDED[state.version]["functions"]


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


def _impl(
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


def _mla_impl(state: State, pad: int | None) -> type[Any]:
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

    return Impl
