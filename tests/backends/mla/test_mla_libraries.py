"""Every variant against the reference, through libraries with the recorded signatures."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from attnbench.backends import cutlass_mla, flash_attn_mla, mla_prefill
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output, poison_
from attnbench.backends.mla_builder import QueryLenSupport, count_decodes
from attnbench.backends.mla_libraries import MLA_LIBRARIES
from attnbench.backends.mla_prefill_library import PREFILLS
from attnbench.backends.paged_ops import quantize
from attnbench.backends.reference import reference_attention
from attnbench.errors import BackendUnavailableError, UsageError
from tests.backends.flash_attn.fake_library import Call
from tests.backends.mla.cases import BACKENDS, BUILDS, refused, with_block
from tests.backends.mla.conftest import Install
from tests.backends.mla.workloads import SMALL, WORKLOADS
from tests.backends.running import Run

PREFILL = "vllm-0.22.1 flash_attn"
CASES = [
    pytest.param(record, backend, variant, text, id=f"{record} {backend} {variant} {name}")
    for record, backend, variant in BUILDS
    for name, plain in WORKLOADS.items()
    for text in [with_block(backend, plain)]
    if refused(backend, variant, text) is None
]


def put(install: Install, record: str) -> list[Call]:
    """The library, and the one for prefills beside it where they are not the same."""
    if record != PREFILL:
        install(PREFILL)
    return install(record)


def check_with_lse(run: Run) -> str:
    """Compares the output and, where the kernel returned one, its LSE; "" when both are right."""
    run.lse = None
    out = run.attend()
    workload = run.workload
    return check_output(
        out,
        reference_attention(run.batch),
        workload.dtype,
        workload.resolved_kv_cache_dtype,
        lse=run.lse,
    ).reason


def test_every_workload_runs_somewhere_and_most_run_everywhere() -> None:
    names = [name for name in WORKLOADS if any(str(case.id).endswith(f" {name}") for case in CASES)]
    assert names == list(WORKLOADS)
    assert len(CASES) > 0.6 * len(BUILDS) * len(WORKLOADS)


@pytest.mark.parametrize(("record", "backend", "variant", "text"), CASES)
def test_output_and_lse_equal_the_reference(
    install: Install, record: str, backend: str, variant: str, text: str
) -> None:
    calls = put(install, record)
    run = Run(BACKENDS[backend], text, variant)
    assert check_with_lse(run) == ""
    if run.metadata.num_decode_tokens:
        assert calls
        gives_lse = variant not in ("TRTLLM_GEN", "CUTE_DSL")
        assert (run.lse is not None) == gives_lse
    library = MLA_LIBRARIES[backend][variant]
    for call in calls:
        if call.name in library.functions and call.name != "get_mla_metadata":
            # Only what is declared, and so checked when a library is loaded, is passed.
            assert call.given <= set(library.functions[call.name]) or call.arguments.q_v is None


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("name", ["prefill", "prefill, odd widths", "extend", "mixed"])
def test_each_prefill_library_gives_the_reference(
    install: Install, name: str, prefill: str
) -> None:
    calls = install(PREFILL)
    install("vllm-0.22.1 flashmla")
    run = Run(BACKENDS["FLASHMLA"], f"{WORKLOADS[name]} block=64", f"VLLM+{prefill}")
    assert check_with_lse(run) == ""
    assert {call.arguments.fa_version for call in calls} == {int(prefill[-1])}


def test_prefill_chunks_of_whole_requests(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(PREFILL)
    install("vllm-0.22.1 flashmla")
    monkeypatch.setattr(mla_prefill, "CHUNK_TOKENS", 700)
    text = f"q1s70_q200s650_q150s300_q130s400_q200 {SMALL} block=64"
    run = Run(BACKENDS["FLASHMLA"], text, "VLLM+FA3")
    assert [len(c.query_start_loc) - 1 for c in run.metadata.prefill] == [1, 2, 1]
    assert [c.key_block is None for c in run.metadata.prefill] == [False, False, True]
    assert check_with_lse(run) == ""
    assert len(calls) == 3


def test_new_tokens_alone_are_not_read_from_the_cache(install: Install) -> None:
    install(PREFILL)
    install("vllm-0.22.1 flashmla")
    run = Run(BACKENDS["FLASHMLA"], f"2q150 {SMALL} block=64", "VLLM")
    run.kv_cache.fill_(float("nan"))
    assert check_with_lse(run) == ""


# --- which requests are decodes -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("query_lens", "threshold", "support", "count"),
    [
        ([1, 1, 1], 1, QueryLenSupport.SINGLE_ONLY, 3),
        ([1, 1, 2], 16, QueryLenSupport.SINGLE_ONLY, 2),
        ([2, 2], 16, QueryLenSupport.SINGLE_ONLY, 0),
        ([4, 4, 4], 16, QueryLenSupport.UNIFORM, 3),
        ([4, 4, 1, 4], 16, QueryLenSupport.UNIFORM, 2),
        ([1, 1, 100], 128, QueryLenSupport.UNIFORM, 2),
        ([200, 1], 128, QueryLenSupport.UNIFORM, 0),
        ([4, 1, 100, 600], 512, QueryLenSupport.VARLEN, 3),
        ([513], 512, QueryLenSupport.VARLEN, 0),
    ],
)
def test_decodes_are_split_off_as_vllm_does(
    query_lens: list[int], threshold: int, support: QueryLenSupport, count: int
) -> None:
    assert count_decodes(query_lens, threshold, support) == count


@pytest.mark.parametrize(
    ("record", "backend", "variant", "threshold"),
    [
        ("vllm-0.22.1 flashmla", "FLASHMLA", "VLLM", 128),
        ("vllm-0.22.1 flash_attn", "FLASH_ATTN_MLA", "FA3", 512),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "TRTLLM_GEN", 16),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "CUTE_DSL", 4),
        ("vllm-0.22.1 cutlass", "CUTLASS_MLA", "SM100", 1),
    ],
)
def test_the_most_new_tokens_of_a_decode(
    install: Install, record: str, backend: str, variant: str, threshold: int
) -> None:
    """vLLM 0.22.1's numbers; CUTE_DSL's is its kernel's, FLASHINFER_MLA's the most drafted here."""
    put(install, record)
    text = with_block(backend, f"q{threshold} heads=1/1 mla=512+64:8+8")
    assert Run(BACKENDS[backend], text, variant).metadata.num_decodes == 1
    text = with_block(backend, f"q{threshold + 1} heads=1/1 mla=512+64:8+8")
    assert Run(BACKENDS[backend], text, variant).metadata.num_decodes == 0


@pytest.mark.parametrize(
    ("record", "backend", "variant", "decodes"),
    [
        ("vllm-0.22.1 flashmla", "FLASHMLA", "VLLM", 1),
        ("vllm-0.22.1 flash_attn", "FLASH_ATTN_MLA", "FA3", 5),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "FA2", 5),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "TRTLLM_GEN", 1),
        ("vllm-0.22.1 cutlass", "CUTLASS_MLA", "SM100", 2),
    ],
)
def test_a_ragged_speculative_batch(
    install: Install, record: str, backend: str, variant: str, decodes: int
) -> None:
    put(install, record)
    text = with_block(backend, WORKLOADS["speculative, ragged"])
    run = Run(BACKENDS[backend], text, variant)
    assert (run.metadata.num_decodes, run.metadata.num_prefills) == (decodes, 5 - decodes)


# --- schedules and plans --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "variant"),
    [("vllm-0.22.1 flash_attn", "FA3"), ("hopper-2.8.3 flash_attn", "FA3_UPSTREAM")],
)
def test_fa3_s_schedule_is_made_once_a_step_and_used(
    install: Install, record: str, variant: str
) -> None:
    calls = put(install, record)
    run = Run(BACKENDS["FLASH_ATTN_MLA"], f"q1s70_q4s60 {SMALL}", variant)
    assert [call.name for call in calls] == ["get_scheduler_metadata"]
    for _ in range(2):
        run.attend()
        assert calls[-1].arguments.scheduler_metadata is run.metadata.decode.schedule
    drafted = run.builder.build_for_drafting(run.batch.metadata, 1)
    assert drafted.decode.schedule is None
    run.metadata = drafted
    assert check_with_lse(run) == ""
    captured = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert captured.decode.max_num_splits == 32
    again = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert captured.decode.schedule.data_ptr() == again.decode.schedule.data_ptr()
    run.metadata = captured
    assert check_with_lse(run) == ""


@pytest.mark.parametrize(("limit", "num_splits"), [(5, 32), (4, 0)])
def test_fa3_s_splits_are_bounded_for_graphs_of_few_tokens(
    install: Install, monkeypatch: pytest.MonkeyPatch, limit: int, num_splits: int
) -> None:
    monkeypatch.setattr(flash_attn_mla, "GRAPH_MAX_TOKENS", limit)
    calls = put(install, PREFILL)
    run = Run(BACKENDS["FLASH_ATTN_MLA"], f"q1s70_q4s60 {SMALL}", "FA3")
    assert run.metadata.decode.max_num_splits == 0
    captured = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert captured.decode.max_num_splits == num_splits
    assert calls[-1].arguments.num_splits == num_splits


def test_flashmla_s_schedule_belongs_to_one_step(install: Install) -> None:
    install("vllm-0.22.1 flashmla")
    run = Run(BACKENDS["FLASHMLA"], f"3q1s70 {SMALL} block=64", "VLLM")
    run.attend()
    first = run.metadata.decode.schedule
    run.attend()
    common = run.batch.metadata
    shorter = common.replace(seq_lens=common.seq_lens - 1, seq_lens_cpu=common.seq_lens - 1)
    run.metadata = run.builder.build(0, shorter)
    assert run.metadata.decode.schedule is not first
    run.attend()


def test_flashinfer_metadata_in_use_keeps_its_plan(install: Install) -> None:
    """A wrapper holds one plan: building the next step must not change the one before."""
    calls = install("flashinfer-0.6.11.post2")
    run = Run(BACKENDS["FLASHINFER_MLA"], f"q1s70_q2s90 {SMALL} block=32", "FA2")
    common = run.batch.metadata
    other = run.builder.build(0, common.replace(seq_lens_cpu=common.seq_lens - 5))
    assert other.decode.plan.wrapper is not run.metadata.decode.plan.wrapper
    assert check_with_lse(run) == ""
    used = other.decode.plan.wrapper
    del other, calls[:]
    gc.collect()
    assert run.builder.build(0, common).decode.plan.wrapper is used


def test_flashinfer_plans_without_a_mask_only_where_none_is_needed(install: Install) -> None:
    calls = install("flashinfer-0.6.11.post2")
    for text, causal in (("2q1s70", False), ("2q3s70", True)):
        Run(BACKENDS["FLASHINFER_MLA"], f"{text} {SMALL} block=64", "FA3")
        plan = next(c for c in reversed(calls) if c.name.endswith("plan"))
        assert plan.arguments.causal is causal


def test_trtllm_gets_page_tables_of_whole_128_tokens(install: Install) -> None:
    calls = install("flashinfer-0.6.11.post2")
    run = Run(BACKENDS["FLASHINFER_MLA"], f"2q1s70 {SMALL} block=32", "TRTLLM_GEN")
    assert check_with_lse(run) == ""
    assert calls[-1].arguments.block_tables.shape == (2, 4)


def in_wider_rows(table: torch.Tensor, more: int) -> torch.Tensor:
    """The same table as a part of a wider one, as an engine may keep it."""
    wide = torch.cat([table, torch.full((len(table), more), 10**6, dtype=table.dtype)], 1)
    return wide[:, : table.shape[1]]


@pytest.mark.parametrize(
    ("record", "backend", "variant", "block"),
    [
        ("vllm-0.22.1 cutlass", "CUTLASS_MLA", "SM100", 128),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "TRTLLM_GEN", 64),
        ("vllm-0.22.1 flashmla", "FLASHMLA", "VLLM", 64),
    ],
)
def test_rows_of_a_page_table_may_be_parts_of_longer_ones(
    install: Install, record: str, backend: str, variant: str, block: int
) -> None:
    """Kernels that take rows to follow each other get a table of its own."""
    install(record)
    run = Run(BACKENDS[backend], f"3q1s250 {SMALL} block={block}", variant)
    common = run.batch.metadata
    table = in_wider_rows(common.block_table_tensor, 3)
    run.metadata = run.builder.build(0, common.replace(block_table_tensor=table))
    assert check_with_lse(run) == ""


def test_each_kind_of_flashinfer_call_has_its_own_workspace(install: Install) -> None:
    """TRTLLM-GEN counts in zeros it finds there; what others leave would hang or spoil it."""
    install("flashinfer-0.6.11.post2")
    text = "2q1s70 heads=128/1 mla=512+64:16+16 block=64"
    for variant in ("FA2", "TRTLLM_GEN", "CUTE_DSL", "TRTLLM_GEN"):
        assert check_with_lse(Run(BACKENDS["FLASHINFER_MLA"], text, variant)) == ""


@pytest.mark.parametrize(("query_len", "num_decodes"), [(1, 2), (4, 2), (5, 0)])
def test_cute_dsl_decodes_up_to_four_new_tokens(
    install: Install, query_len: int, num_decodes: int
) -> None:
    calls = put(install, "flashinfer-0.6.11.post2")
    text = f"2q{query_len}s70 heads=128/1 mla=512+64:16+16 block=64"
    run = Run(BACKENDS["FLASHINFER_MLA"], text, "CUTE_DSL")
    assert run.metadata.num_decodes == num_decodes
    assert check_with_lse(run) == ""
    assert {call.arguments.backend for call in calls} == ({"cute-dsl"} if num_decodes else set())


# --- fp8, padding, outputs ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "backend", "variant"),
    [
        ("vllm-0.22.1 flashmla", "FLASHMLA", "VLLM"),
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "TRTLLM_GEN"),
    ],
)
def test_fp8_scales_and_queries(install: Install, record: str, backend: str, variant: str) -> None:
    """The query's scale is another than the cache's; one that comes quantised is taken as is."""
    install(record)
    run = Run(BACKENDS[backend], f"2q1s70 {SMALL} kv=fp8_e4m3 block=64", variant)
    layer = run.batch.layer
    layer._q_scale.fill_(0.125)
    layer._q_scale_float = 0.125
    assert check_with_lse(run) == ""
    q = torch.randn((2, 4, 576), dtype=torch.bfloat16)
    outs = [torch.empty((2, 4, 512), dtype=torch.bfloat16) for _ in range(2)]
    for query, out in zip((q, quantize(q, torch.float8_e4m3fn, 0.125)), outs, strict=True):
        run.impl.forward_mqa(layer, query, run.kv_cache, run.metadata, out)
    assert torch.equal(*outs)


def test_flashmla_writes_the_output_itself(install: Install) -> None:
    calls = install("vllm-0.22.1 flashmla")
    run = Run(BACKENDS["FLASHMLA"], f"2q3s70 {SMALL} block=64", "VLLM")
    q = torch.randn((6, 4, 576), dtype=torch.bfloat16)
    out = poison_(torch.empty((6, 4, 512), dtype=torch.bfloat16))
    lse = run.impl.forward_mqa(run.batch.layer, q, run.kv_cache, run.metadata, out)
    assert calls[-1].arguments.out.data_ptr() == out.data_ptr()
    assert bool(out.isfinite().all())
    assert lse.shape == (6, 4)
    assert lse.is_contiguous()


def test_cutlass_pads_to_its_128_heads(install: Install) -> None:
    calls = install("vllm-0.22.1 cutlass")
    run = Run(BACKENDS["CUTLASS_MLA"], f"2q1s70 {SMALL} block=128", "SM100")
    assert check_with_lse(run) == ""
    assert calls[-1].arguments.q_nope.shape == (2, 128, 512)
    assert bool((calls[-1].arguments.q_nope[:, 4:] == 0).all())
    graphs = run.builder.cudagraph_support
    assert graphs is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_cutlass_s_workspace_is_for_contexts_that_fill_the_page_table(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel splits by the table's width, whatever the longest context is, and does not check
    the size of what it is given."""
    monkeypatch.setattr(cutlass_mla, "MIN_WORKSPACE_BYTES", 16)
    calls = install("vllm-0.22.1 cutlass")
    run = Run(BACKENDS["CUTLASS_MLA"], f"2q1s70 {SMALL} block=128", "SM100")
    common = run.batch.metadata
    wide = torch.nn.functional.pad(common.block_table_tensor, (0, 7))
    first = run.metadata
    run.metadata = run.builder.build(0, common.replace(block_table_tensor=wide))
    assert (calls[-1].arguments.max_seq_len, calls[-1].arguments.num_batches) == (8 * 128, 2)
    assert len(run.metadata.decode.workspace) == 8 * 128 * 2
    assert check_with_lse(run) == ""
    assert len(first.decode.workspace) == 128 * 2, "metadata in use keeps its own"
    again = run.builder.build(0, common)
    assert again.decode.workspace is run.metadata.decode.workspace


# --- a batch that needs a library that is not here -----------------------------------------------
def test_a_prefill_without_its_library_is_refused_by_name(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flash_mla-02fe0d0")
    monkeypatch.setattr("attnbench.backends.flash_attn_library.find_spec", lambda name: None)
    assert check_with_lse(Run(BACKENDS["FLASHMLA"], f"2q1s70 {SMALL} block=64", "UPSTREAM")) == ""
    words = r"FLASHMLA decodes only: 2 requests .* through FLASH_ATTN:FA3; .*vllm==0\.22\.1"
    with pytest.raises(BackendUnavailableError, match=words):
        Run(BACKENDS["FLASHMLA"], f"q1s70_2q150 {SMALL} block=64", "UPSTREAM+FA3")


def test_a_variant_must_be_named(install: Install) -> None:
    install("vllm-0.22.1 flashmla")
    impl: Any = BACKENDS["FLASHMLA"].get_impl_cls()
    shape = Run(BACKENDS["FLASHMLA"], f"q1s9 {SMALL} block=64", "VLLM").workload.shape
    for name in ("", "FA3", "VLLM+FA5", "VLLM+"):
        with pytest.raises(UsageError, match=r"no variant .*DECODE one of VLLM, UPSTREAM"):
            impl(shape, variant=name)
