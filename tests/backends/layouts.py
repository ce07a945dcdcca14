"""Backends that only have a cache layout, and a strategy of small workloads."""

from __future__ import annotations

from typing import Any, NoReturn

from hypothesis import strategies as st

from attnbench.backends.abstract import AttentionBackend
from attnbench.workload import Workload


class PairFirst(AttentionBackend):
    """(2, num_blocks, block_size, num_kv_heads, head_size), vLLM's FLASH_ATTN."""

    @staticmethod
    def get_name() -> str:
        return "PAIR_FIRST"

    @staticmethod
    def get_impl_cls() -> NoReturn:
        raise AssertionError("a layout has no impl")

    @staticmethod
    def get_builder_cls() -> NoReturn:
        raise AssertionError("a layout has no builder")

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4) if kv_cache_layout == "NHD" else (0, 1, 3, 2, 4)


class BlockFirst(PairFirst):
    """(num_blocks, 2, block_size, num_kv_heads, head_size), vLLM's FLASHINFER and TRITON_ATTN."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, 2, block_size, num_kv_heads, head_size)


class HeadsFirst(PairFirst):
    """(2, num_blocks, num_kv_heads, block_size, head_size), vLLM's CPU_ATTN; no stride order."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (2, num_blocks, num_kv_heads, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        raise NotImplementedError


class Latent(PairFirst):
    """(num_blocks, block_size, kv_lora_rank + qk_rope_head_dim): MLA."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False, kv_cache_layout: str = "NHD"
    ) -> tuple[int, ...]:
        return (0, 1, 2)


def layout_of(workload: Workload) -> type[AttentionBackend]:
    return Latent if workload.shape.is_mla else PairFirst


@st.composite
def small_workloads(
    draw: st.DrawFn,
    attn_types: tuple[str, ...] = ("decoder", "encoder", "encoder_only", "encoder_decoder"),
    mla: bool | None = None,
    dtypes: tuple[str, ...] = ("fp32",),
    kv_cache_dtypes: tuple[str, ...] = ("auto", "fp8_e4m3", "fp8_e5m2"),
    max_block_size: int = 20,
) -> Workload:
    """Workloads of at most four requests of at most 40 tokens, every feature included."""

    def maybe(key: str, values: st.SearchStrategy[Any]) -> str:
        value = draw(st.none() | values)
        return "" if value is None else f" {key}={value}"

    attn_type = draw(st.sampled_from(attn_types))
    block_size = draw(st.integers(1, max_block_size))
    prefix_blocks = draw(st.integers(0, 2)) if attn_type == "decoder" else 0
    prefix = prefix_blocks * block_size
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        query_len = draw(st.integers(1, 12))
        context = 0 if attn_type.startswith("encoder") else draw(st.integers(0, 28)) + prefix
        if attn_type == "encoder_decoder":
            context = draw(st.integers(0, 28))
        requests.append(f"q{query_len}s{query_len + context}")
    text = "_".join(requests) + f" block={block_size} seed={draw(st.integers(0, 5))}"
    is_mla = draw(st.booleans()) if mla is None else mla
    if is_mla and attn_type == "decoder":
        text += f" heads={draw(st.integers(1, 4))}/1 mla=16+8:12+20"
    else:
        kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        text += f" heads={kv_heads * group}/{kv_heads} head_size={draw(st.sampled_from([8, 12]))}"
        text += maybe("v_head_size", st.sampled_from([4, 16]))
        text += maybe("layout", st.just("HND"))
        if attn_type != "encoder_decoder":
            text += maybe("window", st.integers(1, 30))
        text += maybe("softcap", st.sampled_from([3.0, 30.0]))
        text += maybe("sinks", st.just(1)) + maybe("alibi", st.just(1))
    if prefix:
        text += f" prefix={prefix}"
    if attn_type != "decoder":
        text += f" attn={attn_type}"
    dtype = draw(st.sampled_from(dtypes))
    kv_cache_dtype = draw(st.sampled_from(kv_cache_dtypes))
    return Workload.parse(f"{text} dtype={dtype} kv={kv_cache_dtype}")
