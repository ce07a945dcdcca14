"""Every capability has its predicate and its own reason; every member of vLLM's API is placed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends import abstract, builder, impl, metadata, subclassing
from attnbench.backends.abstract import (
    AttentionBackend,
    AttentionConfig,
    MultipleOf,
)
from attnbench.backends.device import cuda_device
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.subclassing import (
    subclass_attention_backend,
    subclass_attention_backend_with_overrides,
)
from attnbench.workload.types import AttentionType
from tests.backends.fakes import PLAIN, AcceptsAll, FakeBuilder

DEVICE = cuda_device(9, 0)
CONTRACT = Path(__file__).parents[2] / "docs" / "contract.md"

#: A configuration that uses every capability at once.
EVERYTHING = PLAIN._replace(
    kv_cache_dtype="fp8_e4m3",
    block_size=16,
    use_mm_prefix=True,
    has_sink=True,
    use_per_head_quant_scales=True,
    attn_type=AttentionType.ENCODER,
    use_non_causal=True,
    use_batch_invariant=True,
    v_head_size=64,
    has_sliding_window=True,
    has_logits_soft_cap=True,
    use_alibi=True,
    kv_cache_layout="NHD",
)

#: predicate -> (the answer that refuses, the reason), in the order the reasons are given.
PREDICATES: dict[str, tuple[Any, str]] = {
    "supports_head_size": (False, "head_size not supported"),
    "supports_dtype": (False, "dtype not supported"),
    "supports_kv_cache_dtype": (False, "kv_cache_dtype not supported"),
    "supports_block_size": (False, "block_size not supported"),
    "supports_mm_prefix": (False, "partial multimodal token full attention not supported"),
    "is_mla": (True, "non-MLA not supported"),
    "supports_sink": (False, "attention sinks not supported"),
    "is_sparse": (True, "non-sparse not supported"),
    "supports_per_head_quant_scales": (False, "per-head quant scales not supported"),
    "supports_compute_capability": (False, "compute capability not supported"),
    "supports_attn_type": (False, "attention type encoder not supported"),
    "supports_non_causal": (False, "non-causal attention not supported"),
    "supports_batch_invariance": (False, "batch invariance not supported"),
    "supports_device": (False, "device cuda not supported"),
    "supports_v_head_size": (False, "v_head_size other than head_size not supported"),
    "supports_sliding_window": (False, "sliding window not supported"),
    "supports_logits_soft_cap": (False, "logits soft cap not supported"),
    "supports_alibi": (False, "ALiBi not supported"),
    "supports_kv_cache_layout": (False, "kv_cache_layout NHD not supported"),
    "supports_combination": ("these two do not go together", "these two do not go together"),
}


def refusing(*names: str) -> type[AttentionBackend]:
    """`AcceptsAll` with the named predicates answering no."""
    members = {
        name: classmethod(lambda cls, *args, _answer=PREDICATES[name][0]: _answer) for name in names
    }
    return type("Refusing", (AcceptsAll,), members)


def test_the_accepting_backend_accepts_everything() -> None:
    assert AcceptsAll.validate_configuration(EVERYTHING, DEVICE) == []


@pytest.mark.parametrize("name", PREDICATES)
def test_one_predicate_gives_exactly_its_reason(name: str) -> None:
    reasons = refusing(name).validate_configuration(EVERYTHING, DEVICE)
    assert reasons == [PREDICATES[name][1]]


@given(st.sets(st.sampled_from(sorted(PREDICATES)), min_size=2))
@settings(deadline=None, max_examples=100)
def test_several_predicates_give_all_their_reasons_in_order(names: set[str]) -> None:
    reasons = refusing(*names).validate_configuration(EVERYTHING, DEVICE)
    assert reasons == [reason for name, (_, reason) in PREDICATES.items() if name in names]


def test_every_predicate_of_the_contract_is_walked_above() -> None:
    predicates = {
        name
        for name in vars(AttentionBackend)
        if name.startswith(("supports_", "is_")) and callable(getattr(AttentionBackend, name))
    }
    # vLLM 0.22.1 asks these two elsewhere, never in validate_configuration.
    assert predicates - {"is_ssm", "supports_alibi_sqrt"} == set(PREDICATES)


def test_mla_and_sparse_refuse_in_both_directions() -> None:
    config = PLAIN._replace(use_mla=True, use_sparse=True)
    assert AcceptsAll.validate_configuration(config, DEVICE) == [
        "MLA not supported",
        "sparse not supported",
    ]


@pytest.mark.parametrize(
    ("field", "predicate"),
    [
        ("has_sink", "supports_sink"),
        ("use_mm_prefix", "supports_mm_prefix"),
        ("use_per_head_quant_scales", "supports_per_head_quant_scales"),
        ("use_non_causal", "supports_non_causal"),
        ("use_batch_invariant", "supports_batch_invariance"),
        ("has_sliding_window", "supports_sliding_window"),
        ("has_logits_soft_cap", "supports_logits_soft_cap"),
        ("use_alibi", "supports_alibi"),
    ],
)
def test_a_missing_capability_matters_only_where_it_is_asked_for(
    field: str, predicate: str
) -> None:
    backend = refusing(predicate)
    assert backend.validate_configuration(PLAIN, DEVICE) == []
    change: dict[str, Any] = {field: True}
    asked = PLAIN._replace(**change)
    assert backend.validate_configuration(asked, DEVICE) == [PREDICATES[predicate][1]]


def test_a_free_block_size_and_layout_are_never_refused() -> None:
    backend = subclass_attention_backend_with_overrides(
        "Hnd",
        AcceptsAll,
        {
            "get_required_kv_cache_layout": classmethod(lambda cls: "HND"),
            "get_supported_kernel_block_sizes": classmethod(lambda cls: (64,)),
        },
    )
    assert backend.validate_configuration(PLAIN, DEVICE) == []
    asked = PLAIN._replace(kv_cache_layout="NHD", block_size=16)
    assert backend.validate_configuration(asked, DEVICE) == [
        "block_size not supported",
        "kv_cache_layout NHD not supported",
    ]
    assert (
        backend.validate_configuration(
            PLAIN._replace(kv_cache_layout="HND", block_size=128), DEVICE
        )
        == []
    )


@pytest.mark.parametrize(
    ("sizes", "accepted", "refused", "preferred"),
    [
        ((MultipleOf(16),), (16, 48, 256), (1, 8, 24), 16),
        ((64,), (64, 128, 640), (16, 32, 96), 64),
        ((32, 64), (32, 64, 96), (16, 48), 32),
        ((MultipleOf(1),), (1, 3, 16), (), 16),
    ],
)
def test_a_framework_block_may_be_a_multiple_of_the_kernel_s(
    sizes: tuple[Any, ...], accepted: tuple[int, ...], refused: tuple[int, ...], preferred: int
) -> None:
    backend = subclass_attention_backend_with_overrides(
        "Sized",
        AcceptsAll,
        {"get_supported_kernel_block_sizes": classmethod(lambda cls: sizes)},
    )
    assert all(backend.supports_block_size(size) for size in accepted)
    assert not any(backend.supports_block_size(size) for size in refused)
    assert backend.get_preferred_block_size(16) == preferred


def test_block_dim_and_subclass_helpers() -> None:
    assert AcceptsAll.get_kv_cache_block_dim(16, 8, 128) == 1

    class OtherBuilder(FakeBuilder):
        pass

    other = subclass_attention_backend("Other", AcceptsAll, OtherBuilder)
    assert other.__name__ == "OtherAcceptsAll"
    assert other.get_builder_cls() is OtherBuilder
    assert AcceptsAll.get_builder_cls() is FakeBuilder
    assert other.validate_configuration(EVERYTHING, DEVICE) == []


def _metadata() -> CommonAttentionMetadata:
    # Three requests of 2, 1 and 3 new tokens; the last one and its tokens are padding.
    start = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    lens = torch.tensor([10, 7, 3], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=lens,
        seq_lens_cpu=lens,
        num_reqs=3,
        num_actual_tokens=6,
        max_query_len=3,
        max_seq_len=10,
        block_table_tensor=torch.arange(6, dtype=torch.int32).view(3, 2),
        slot_mapping=torch.arange(6),
        positions=torch.tensor([8, 9, 6, 0, 1, 2]),
        is_prefilling=torch.tensor([True, False, True]),
        encoder_seq_lens=lens + 1,
        seq_lens_cpu_upper_bound=lens,
    )


def test_metadata_helpers() -> None:
    common = _metadata()
    assert common.compute_num_computed_tokens().tolist() == [8, 6, 0]
    assert common.naive_query_lens().tolist() == [2, 1, 3]
    assert common.batch_size() == 3
    assert common.replace(max_seq_len=99).max_seq_len == 99


def test_unpadded_keeps_the_first_requests_and_tokens_only() -> None:
    whole = _metadata()
    part = whole.unpadded(3, 2)
    assert part.num_reqs == 2
    assert part.num_actual_tokens == 3
    assert part.query_start_loc.tolist() == [0, 2, 3]
    assert part.slot_mapping.tolist() == [0, 1, 2]
    assert part.block_table_tensor.shape == (2, 2)
    per_request = ("seq_lens", "seq_lens_cpu", "is_prefilling", "encoder_seq_lens")
    for name in (*per_request, "seq_lens_cpu_upper_bound"):
        assert getattr(part, name).shape == (2,), name
    assert part.positions is not None
    assert part.positions.tolist() == [8, 9, 6]
    assert part.dcp_local_seq_lens is None
    assert whole.num_reqs == 3


# Names of vLLM 0.22.1, vllm/v1/attention/backend.py, private ones that only cache left out.
API: dict[str, tuple[Any, str]] = {
    "AttentionBackend": (
        abstract.AttentionBackend,
        (
            "supported_dtypes supported_kv_cache_dtypes forward_includes_kv_cache_update "
            "get_supported_kernel_block_sizes get_name get_impl_cls get_builder_cls "
            "get_kv_cache_shape get_kv_cache_block_dim get_kv_cache_stride_order full_cls_name "
            "get_supported_head_sizes supports_head_size supports_dtype supports_kv_cache_dtype "
            "supports_block_size get_preferred_block_size is_mla supports_sink supports_alibi_sqrt "
            "supports_mm_prefix is_sparse supports_per_head_quant_scales supports_non_causal "
            "supports_batch_invariance supports_attn_type supports_compute_capability "
            "supports_combination validate_configuration get_required_kv_cache_layout is_ssm"
        ),
    ),
    "CommonAttentionMetadata": (
        metadata.CommonAttentionMetadata,
        (
            "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len "
            "max_seq_len block_table_tensor slot_mapping causal logits_indices_padded "
            "num_logits_indices encoder_seq_lens encoder_seq_lens_cpu dcp_local_seq_lens "
            "dcp_local_seq_lens_cpu positions is_prefilling seq_lens_cpu_upper_bound batch_size "
            "naive_query_lens replace seq_lens_cpu num_computed_tokens_cpu "
            "compute_num_computed_tokens unpadded"
        ),
    ),
    "AttentionMetadataBuilder": (
        builder.AttentionMetadataBuilder,
        (
            "_cudagraph_support reorder_batch_threshold supports_update_block_table "
            "get_cudagraph_support _init_reorder_batch_threshold build update_block_table "
            "build_for_cudagraph_capture build_for_drafting use_cascade_attention"
        ),
    ),
    "AttentionCGSupport": (
        builder.AttentionCGSupport,
        "ALWAYS UNIFORM_BATCH UNIFORM_SINGLE_TOKEN_DECODE NEVER",
    ),
    "AttentionLayer": (
        impl.AttentionLayer,
        (
            "_q_scale _k_scale _v_scale _q_scale_float _k_scale_float _v_scale_float _prob_scale "
            "forward"
        ),
    ),
    "AttentionImplBase": (
        impl.AttentionImplBase,
        (
            "can_return_lse_for_decode supports_pcp "
            "supports_mtp_with_cp_non_trivial_interleave_size "
            "need_to_return_lse_for_decode supports_quant_query_input dcp_world_size dcp_rank "
            "pcp_world_size pcp_rank total_cp_world_size total_cp_rank "
            "process_weights_after_loading"
        ),
    ),
    "AttentionImpl": (
        impl.AttentionImpl,
        (
            "kv_quant_mode forward fused_output_quant_supported fused_rope_kvcache_supported "
            "do_rope_and_kv_cache_update"
        ),
    ),
    "MLAAttentionImpl": (
        impl.MLAAttentionImpl,
        "forward_mha forward_mqa fused_output_quant_supported do_kv_cache_update",
    ),
    "module": (
        SimpleNamespace(**{**vars(abstract), **vars(subclassing)}),
        (
            "AttentionType MultipleOf subclass_attention_backend "
            "subclass_attention_backend_with_overrides AttentionMetadata SparseMLAAttentionImpl"
        ),
    ),
}


def _excused() -> dict[str, str]:
    """`Class.member` -> reason, from the table of docs/contract.md."""
    found = {}
    for line in CONTRACT.read_text().splitlines():
        if match := re.match(r"^\| `([\w.]+)` \| (.+) \|$", line):
            found[match[1]] = match[2].strip()
    return found


def _has(owner: Any, member: str) -> bool:
    annotations: dict[str, Any] = {}
    for cls in getattr(owner, "__mro__", ()):
        annotations |= getattr(cls, "__annotations__", {})
    return hasattr(owner, member) or member in annotations


@pytest.mark.parametrize("name", API)
def test_every_member_of_vllm_s_api_is_here_or_excused(name: str) -> None:
    owner, members = API[name]
    excused = _excused()
    for member in members.split():
        key = f"{name}.{member}" if name != "module" else member
        assert _has(owner, member) != (key in excused), key


def test_no_excuse_is_left_over() -> None:
    known = {
        f"{name}.{member}" if name != "module" else member
        for name, (_, members) in API.items()
        for member in members.split()
    }
    excused = _excused()
    assert excused
    assert set(excused) <= known
    assert all(len(reason) > 20 for reason in excused.values())


def test_config_starts_with_vllm_s_selector_fields() -> None:
    fields = (
        "head_size dtype kv_cache_dtype block_size use_mla has_sink use_sparse use_mm_prefix "
        "use_per_head_quant_scales attn_type use_non_causal use_batch_invariant"
    )
    assert AttentionConfig._fields[:12] == tuple(fields.split())
