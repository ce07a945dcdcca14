"""Random valid workloads: every field, every kind of shape."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from attnbench.workload import (
    AttentionShape,
    AttentionType,
    BatchSpec,
    Request,
    Workload,
    get_shape,
    shape_names,
)

_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


@st.composite
def requests(draw: st.DrawFn, context: bool = True) -> Request:
    query_len = draw(st.one_of(st.just(1), st.integers(1, 20), st.sampled_from([1024, 2048, 1000])))
    extra = draw(st.one_of(st.just(0), st.integers(0, 50), st.sampled_from([1024, 4095, 4096])))
    return Request(query_len, query_len + (extra if context else 0))


def batch_specs(context: bool = True) -> st.SearchStrategy[BatchSpec]:
    groups = st.tuples(st.integers(1, 4), requests(context))
    return st.lists(groups, min_size=1, max_size=5).map(
        lambda found: BatchSpec(tuple(r for count, request in found for r in [request] * count))
    )


def _heads() -> st.SearchStrategy[AttentionShape]:
    return st.builds(
        lambda kv, group, size, v_size: AttentionShape(
            num_heads=kv * group, num_kv_heads=kv, head_size=size, v_head_size=v_size or size
        ),
        st.sampled_from([1, 2, 3, 8]),
        st.sampled_from([1, 4, 71]),
        st.sampled_from([64, 96, 128, 100]),
        st.sampled_from([0, 0, 64, 128]),
    )


def _latent() -> st.SearchStrategy[AttentionShape]:
    return st.builds(
        lambda heads, lora, rope, nope, value: AttentionShape(
            num_heads=heads,
            num_kv_heads=1,
            head_size=lora + rope,
            v_head_size=value,
            kv_lora_rank=lora,
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
        ),
        *(st.integers(1, 600) for _ in range(5)),
    )


@st.composite
def _named(draw: st.DrawFn) -> AttentionShape:
    name = draw(st.sampled_from(shape_names()))
    tensor_parallel_size = draw(st.sampled_from([1, 2, 4, 8]))
    if name == "falcon-7b":  # 71 heads
        tensor_parallel_size = 1
    return get_shape(name, tensor_parallel_size)


@st.composite
def shapes(draw: st.DrawFn) -> AttentionShape:
    shape = draw(st.one_of(_named(), _heads(), _latent()))
    for name, values in (
        ("sliding_window", st.sampled_from([0, 1, 7, 128, 4096])),
        ("logits_soft_cap", st.floats(0.0, allow_nan=False, allow_infinity=False)),
        ("has_sink", st.booleans()),
        ("use_alibi", st.booleans()),
        ("num_layers", st.integers(1, 200)),
    ):
        if draw(st.booleans()):
            shape = replace(shape, **{name: draw(values)})  # type: ignore[arg-type]
    return shape


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    shape = draw(shapes())
    attn_type = AttentionType.DECODER
    if not shape.is_mla:
        attn_type = draw(st.sampled_from(AttentionType))
    if attn_type is AttentionType.ENCODER_DECODER:
        shape = replace(shape, sliding_window=0)
    spec = draw(batch_specs(context=attn_type not in _ENCODERS))
    block_size = draw(st.sampled_from([1, 3, 16, 64, 256]))
    context = min(r.seq_len - r.query_len for r in spec.requests)
    dtype = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    kv_cache_dtypes = ["auto", "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]
    if dtype == "bf16" and (shape.kv_lora_rank, shape.qk_rope_head_dim) == (512, 64):
        kv_cache_dtypes.append("fp8_ds_mla")
    is_sparse = shape.is_mla and not shape.sliding_window and draw(st.booleans())
    return Workload(
        batch_spec=spec,
        shape=shape,
        dtype=dtype,
        kv_cache_dtype=draw(st.sampled_from(kv_cache_dtypes)),
        topk_tokens=draw(st.sampled_from([1, 7, 64, 2048])) if is_sparse else 0,
        topk_pattern=draw(st.sampled_from(["random", "prefix", "window"])) if is_sparse else "",
        block_size=block_size,
        kv_cache_layout="NHD" if shape.is_mla else draw(st.sampled_from(["NHD", "HND"])),
        attn_type=attn_type,
        common_prefix_len=draw(st.integers(0, context // block_size)) * block_size,
        lengths=draw(
            st.one_of(
                st.sampled_from(["", "geometric", "uniform:0.5", "uniform:1", "uniform:.250"]),
                st.floats(1e-12, 1.0).map(lambda jitter: f"uniform:{jitter!r}"),
            )
        ),
        seed=draw(st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))),
    )
