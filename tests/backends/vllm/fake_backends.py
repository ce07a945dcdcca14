"""Backends of the fake vLLM: the forms of cache, block, layout and builder the real ones have."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tests.backends.vllm.fake_impls import make_impl, make_mla_impl
from tests.backends.vllm.fake_state import (
    RECORDED,
    State,
    has_cache_shapes,
    layouts_of,
    signature_of,
)

_ATTN_TYPES = {
    "CrossAttentionSpec": "encoder_decoder",
    "EncoderOnlyAttentionSpec": "encoder_only",
}


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
        "TRITON_ATTN": backend("TRITON_ATTN", make_impl(state), None, pair=1),
        "FLASH_ATTN": backend(
            "FLASH_ATTN",
            make_impl(state, quant_query=True),
            None,
            get_supported_kernel_block_sizes=with_config,
            **pair_first,
        ),
        "FLASHINFER": backend(
            "FLASHINFER",
            make_impl(state, layout="HND"),
            1,
            pair=1,
            layout="HND",
            get_supported_kernel_block_sizes=lambda: [16, 32, 64],
        ),
        "FLEX_ATTENTION": backend(
            "FLEX_ATTENTION", make_impl(state, gpu_blocks=True), None, pair=0
        ),
        "ROCM_AITER_FA": backend("ROCM_AITER_FA", make_impl(state), None, pair=0, planes=True),
        "FLASH_ATTN_DIFFKV": backend("FLASH_ATTN_DIFFKV", make_impl(state), None, pair=-1),
    }
    # HPC_ATTN is the one of 0.30 on whose forward writes the cache, CPU_ATTN that of 0.22.1.
    for name in ("CPU_ATTN", "HPC_ATTN"):
        impl = make_impl(state, writes=True)
        found[name] = backend(name, impl, None, pair=0, forward_includes_kv_cache_update=True)
    # One slot with all heads for each of K and V: with one or two heads the usual forms' numbers.
    found["ROCM_ATTN"] = backend("ROCM_ATTN", make_impl(state), None, pair=0, folded=True)
    for name, threshold, pad, sizes in (
        ("TRITON_MLA", 1, None, [multiple_of(16)]),
        ("FLASHMLA", 128, None, [64]),
        ("CUTLASS_MLA", 1, 128, [128]),
    ):
        found[name] = backend(
            name,
            make_mla_impl(state, pad),
            threshold,
            mla=True,
            forward_includes_kv_cache_update=True,
            get_supported_kernel_block_sizes=lambda sizes=sizes: sizes,
        )
    found["FLASHMLA_SPARSE"] = backend(
        "FLASHMLA_SPARSE", make_mla_impl(state, None), None, mla=True, sparse=True
    )
    return base, found


def _base(state: State) -> type[Any]:
    class AttentionBackend:
        forward_includes_kv_cache_update = False
        pair = 1
        planes = False
        folded = False
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
    layouts = layouts_of(state.version)

    def customize(own: Any, spec: Any) -> Any:
        if own.pair == -1:
            return replace(spec, state_content_bytes=5)
        if own.folded:
            size = spec.num_kv_heads * spec.head_size * spec.dtype.itemsize
            return replace(spec, num_head_slots=2, state_content_bytes=size)
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
            # FLEX_ATTENTION and CPU_ATTN read no cache, or another, by the spec's kind.
            kind = type(self.spec).__name__
            is_cross = common.encoder_seq_lens is not None
            if not common.causal:
                wanted = "CrossAttentionSpec" if is_cross else "EncoderOnlyAttentionSpec"
                assert kind == wanted, kind
            else:
                assert kind in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec")
            assert self.layer.attn_type == _ATTN_TYPES.get(kind, "decoder")
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

        def build_for_cudagraph_capture(self, *args: Any, **kwargs: Any) -> Any:
            a = state.bind("AttentionMetadataBuilder.build_for_cudagraph_capture", *args, **kwargs)
            common = a.common_attn_metadata
            assert common.max_seq_len == self.config.model_config.max_model_len
            made = self.build(0, common)
            # As TRITON_ATTN and ROCM_ATTN do, which capture with contexts of one token.
            common.seq_lens.fill_(1)
            common.query_start_loc.zero_()
            common.query_start_loc_cpu.zero_()
            return made

    if "AttentionMetadataBuilder.use_cascade_attention" in RECORDED[state.version]["functions"]:
        cascade: Any = Builder
        cascade.use_cascade_attention = lambda self, *args, **kwargs: (
            state.bind(
                "AttentionMetadataBuilder.use_cascade_attention", *args, **kwargs
            ).common_prefix_len
            >= 256
        )
    return Builder
