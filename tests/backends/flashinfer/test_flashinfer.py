"""Every variant against the reference, through libraries with the recorded signatures."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output, poison_, row_tolerance
from attnbench.backends.device import cuda_device
from attnbench.backends.flashinfer import FlashInferBackend as Backend
from attnbench.backends.flashinfer import FlashInferImpl, FlashInferMetadataBuilder
from attnbench.backends.flashinfer_library import VARIANTS, uses
from attnbench.backends.flashinfer_wrappers import Span, page_table
from attnbench.backends.paged_ops import quantize
from attnbench.backends.reference import reference_attention
from attnbench.errors import UsageError
from attnbench.workload import AttentionType, Workload
from tests.backends.flashinfer.conftest import CURRENT, Install
from tests.backends.flashinfer.fake_library import RECORDED
from tests.backends.flashinfer.running import FlashInferRun, fitted, refused
from tests.backends.flashinfer.workloads import WORKLOADS

SM90, SM100 = cuda_device(9, 0), cuda_device(10, 0)
SMALL = "heads=4/2 head_size=64"


def where(variant: str, text: str) -> Any:
    """A device on which the variant takes the workload, or None."""
    return next((d for d in (SM90, SM100) if refused(variant, text, d) is None), None)


CASES = [
    pytest.param(variant, fitted(variant, text), id=f"{variant} {name}")
    for variant in VARIANTS
    for name, text in WORKLOADS.items()
    if where(variant, fitted(variant, text)) is not None
]


def test_every_workload_runs_somewhere_and_every_variant_on_many() -> None:
    names = {str(case.id).removeprefix(f"{case.values[0]} ") for case in CASES}
    assert names == set(WORKLOADS)
    counts = {v: sum(case.values[0] == v for case in CASES) for v in VARIANTS}
    assert counts.pop("CASCADE") == 3
    assert min(counts.values()) >= 25, counts


@pytest.mark.parametrize(("variant", "text"), CASES)
def test_output_equals_the_reference(install: Install, variant: str, text: str) -> None:
    calls = install(CURRENT)
    check = FlashInferRun(text, variant).check()
    assert check.ok, check.reason
    wanted = uses(VARIANTS[variant])
    for call in calls:
        # Only what is declared, and so checked when the library is loaded, is passed.
        assert call.given <= set(wanted[call.path]), call.path


@pytest.mark.parametrize("record", [r for r in RECORDED if r != CURRENT])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_recorded_versions_are_called_right(
    install: Install, record: str, variant: str
) -> None:
    install(record)
    texts = ["q20s90_3q1s100_q9s80 heads=4/2 head_size=64 prefix=64 layout=HND"]
    if variant != "CASCADE":
        texts.append(f"3q1s70_q9 {SMALL} kv=fp8_e4m3 layout=HND")
    for text in texts:
        check = FlashInferRun(text, variant).check()
        assert check.ok, check.reason


# --- which kernels --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "decode", "prefill"),
    [
        ("FA2", ("fa2", True), "fa2"),
        ("FA3", ("fa2", True), "fa3"),
        ("FA3_DECODE", ("fa3", True), "fa3"),
        ("CUDA_CORES", ("fa2", False), "fa2"),
    ],
)
def test_a_variant_s_wrappers_are_of_its_kernels(
    install: Install, variant: str, decode: tuple[str, bool], prefill: str
) -> None:
    calls = install(CURRENT)
    run = FlashInferRun(f"q40_3q1s70 {SMALL}", variant)
    made = {call.path: call.arguments for call in calls if call.path.endswith("__init__")}
    first = made["decode.BatchDecodeWithPagedKVCacheWrapper.__init__"]
    assert (first.backend, first.use_tensor_cores) == decode
    assert made["prefill.BatchPrefillWithPagedKVCacheWrapper.__init__"].backend == prefill
    assert run.metadata.num_decode_tokens == 3
    # All is planned with the metadata, and only run with the call.
    planned = len(calls)
    assert sum(call.path.endswith(".plan") for call in calls) == 2
    run.attend()
    assert [call.path.rpartition(".")[2] for call in calls[planned:]] == ["run", "run"]


def test_xqa_and_trtllm_gen_are_asked_for_by_name(install: Install) -> None:
    calls = install(CURRENT)
    FlashInferRun(f"q40_3q1s70 {SMALL}", "XQA").attend()
    assert calls[-2].path == "decode.trtllm_batch_decode_with_kv_cache"
    assert calls[-2].arguments.backend == "xqa"
    assert calls[-1].path == "prefill.BatchPrefillWithPagedKVCacheWrapper.run"
    calls.clear()
    FlashInferRun(f"q40_3q1s70 {SMALL} layout=HND", "TRTLLM_GEN").attend()
    assert [call.path.partition(".")[2] for call in calls] == [
        "trtllm_batch_decode_with_kv_cache",
        "trtllm_batch_context_with_kv_cache",
    ]
    assert calls[0].arguments.backend == "trtllm-gen"


def test_a_uniform_few_tokens_are_decoded_by_trtllm_gen_only(install: Install) -> None:
    calls = install(CURRENT)
    for variant, tokens in (("TRTLLM_GEN", 12), ("FA2", 0), ("XQA", 0)):
        run = FlashInferRun(f"3q4s70 {SMALL} layout=HND", variant)
        assert run.metadata.num_decode_tokens == tokens
        assert run.check().ok
    ragged = FlashInferRun(f"3q4s70_q2s9 {SMALL} layout=HND", "TRTLLM_GEN")
    assert ragged.metadata.num_decode_tokens == 0
    assert any(getattr(call.arguments, "q_len_per_req", None) == 4 for call in calls)


def test_the_cascade_reads_the_shared_pages_once(install: Install) -> None:
    calls = install(CURRENT)
    run = FlashInferRun(f"3q1s90 {SMALL} prefix=64", "CASCADE")
    assert run.check().ok
    (plan,) = [call.arguments for call in calls if call.path.endswith("plan")]
    table = run.batch.metadata.block_table_tensor
    assert plan.paged_kv_indices_arr[0].tolist() == table[0, :4].tolist()
    assert plan.paged_kv_indices_arr[1].tolist() == table[:, 4:6].flatten().tolist()
    assert [t.tolist() for t in plan.paged_kv_indptr_arr] == [[0, 4], [0, 2, 4, 6]]
    builder: Any = run.builder
    with pytest.raises(UsageError, match="share whole blocks"):
        FlashInferMetadataBuilder.build(builder, 0, run.batch.metadata)
    with pytest.raises(UsageError, match="not planned for graphs"):
        run.builder.build_for_cudagraph_capture(run.batch.metadata)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "CASCADE"])
def test_no_other_variant_takes_the_cascade(install: Install, variant: str) -> None:
    install(CURRENT)
    run = FlashInferRun(f"3q1s90 {SMALL} prefix=64 layout=HND", variant)
    assert not run.builder.use_cascade_attention(64, [1], 4, 2, False, False, False, 1, 1)


# --- plans ----------------------------------------------------------------------------------------
def test_pages_are_the_block_table_s() -> None:
    batch = make_batch(Workload.parse("q1s5_q1s130_q1s64_q9s33 block=16"))
    pages = page_table(batch.metadata, 16)
    table = batch.metadata.block_table_tensor
    counts = [1, 9, 4, 3]
    rows = [table[i, :n].tolist() for i, n in enumerate(counts)]
    assert pages.indices.tolist() == [page for row in rows for page in row]
    assert pages.indptr.tolist() == [0, 1, 10, 14, 17]
    assert pages.last_page_len.tolist() == [5, 2, 16, 1]
    part = pages.of(Span(1, 3))
    assert (part.indptr.tolist(), part.indices.tolist()) == ([0, 9, 13], rows[1] + rows[2])
    assert part.last_page_len.tolist() == [2, 16]
    # Where the host does not know the lengths, the device is asked.
    unknown = page_table(batch.metadata.replace(seq_lens_cpu=None), 16)
    assert torch.equal(unknown.indices, pages.indices)


@pytest.mark.parametrize("variant", ["FA2", "FA3_DECODE", "CUDA_CORES", "CASCADE"])
def test_two_batches_of_one_builder_share_no_plan(install: Install, variant: str) -> None:
    """A wrapper holds one plan: the first batch's must still be there after the second's."""
    calls = install(CURRENT)
    run = FlashInferRun(f"3q1s90_q5s100 {SMALL} prefix=64", variant)
    other = make_batch(Workload.parse(f"2q1s80_q20s90 {SMALL} prefix=64"), "cpu", 1)
    kept = run.builder.build(64, other.metadata)
    assert run.check().ok
    made = sum(call.path.endswith("__init__") for call in calls)
    # One that nobody holds any more is planned anew, not made anew.
    for _ in range(5):
        run.metadata = run.builder.build(64, run.batch.metadata)
    del kept
    gc.collect()
    assert run.check().ok
    assert sum(call.path.endswith("__init__") for call in calls) <= made + 2


# --- CUDA graphs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["FA2", "FA3", "FA3_DECODE", "CUDA_CORES"])
@pytest.mark.parametrize("text", [f"3q1s70 {SMALL}", f"3q1s70_q9s40 {SMALL} window=12"])
def test_a_captured_wrapper_runs_the_batch_that_was_planned_last(
    install: Install, variant: str, text: str
) -> None:
    calls = install(CURRENT)
    run = FlashInferRun(text, variant)
    calls.clear()
    captured = run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert run.check().ok
    assert all(c.arguments.use_cuda_graph for c in calls if c.path.endswith("__init__"))
    # Another batch of as many requests: the same wrapper and the same buffers.
    longer = FlashInferRun(text.replace("s70", "s75"), variant)
    run.builder.build_for_cudagraph_capture(longer.batch.metadata)
    longer.metadata = captured
    assert longer.check().ok
    run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert run.check().ok
    # What is built for no graph does not touch it.
    run.builder.build(0, longer.batch.metadata)
    assert run.check().ok


@pytest.mark.parametrize(
    ("variant", "support"),
    [
        ("FA2", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ("XQA", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ("TRTLLM_GEN", AttentionCGSupport.UNIFORM_BATCH),
        ("CASCADE", AttentionCGSupport.NEVER),
    ],
)
def test_graph_support(install: Install, variant: str, support: AttentionCGSupport) -> None:
    install(CURRENT)
    run = FlashInferRun(f"2q1s90 {SMALL} prefix=64 layout=HND", variant)
    assert run.builder.cudagraph_support is support


def test_xqa_and_trtllm_gen_read_the_engine_s_own_tables(install: Install) -> None:
    calls = install(CURRENT)
    for variant in ("XQA", "TRTLLM_GEN"):
        run = FlashInferRun(f"3q1s70 {SMALL} layout=HND", variant)
        run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
        assert run.check().ok
        a, common = calls[-1].arguments, run.batch.metadata
        assert a.seq_lens.data_ptr() == common.seq_lens.data_ptr()
        assert a.block_tables.data_ptr() == common.block_table_tensor.data_ptr()


# --- numbers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["3q1s70", "2q20s60 softcap=20", "q9_2q1s70", "3q1s70 window=20"])
@pytest.mark.parametrize("variant", ["FA2", "FA3", "FA3_DECODE", "CUDA_CORES"])
def test_lse_equals_the_reference(install: Install, variant: str, text: str) -> None:
    install(CURRENT)
    run = FlashInferRun(f"{text} {SMALL}", variant)
    batch = run.batch
    out = poison_(torch.empty_like(batch.query))
    lse = run.impl.forward_with_lse(batch.layer, batch.query, run.kv_cache, run.metadata, out)
    truth = reference_attention(batch)
    assert check_output(out, truth, "bf16", "bf16").ok
    torch.testing.assert_close(lse.double(), truth.lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("variant", ["XQA", "TRTLLM_GEN", "CASCADE"])
def test_where_there_is_no_lse(install: Install, variant: str) -> None:
    install(CURRENT)
    run = FlashInferRun(f"3q1s90 {SMALL} layout=HND prefix=64", variant)
    batch = run.batch
    with pytest.raises(UsageError, match=f"FLASHINFER:{variant} gives no LSE"):
        run.impl.forward_with_lse(batch.layer, batch.query, run.kv_cache, run.metadata, batch.query)


@pytest.mark.parametrize("variant", ["FA2", "FA3", "FA3_DECODE", "XQA", "TRTLLM_GEN"])
def test_fp8_scales_are_each_in_their_place(install: Install, variant: str) -> None:
    """Query, key and value have different scales here: none may stand for another."""
    calls = install(CURRENT)
    run = FlashInferRun(f"3q1s70_q20s60 {SMALL} kv=fp8_e4m3 layout=HND", variant)
    run.batch.layer._q_scale.fill_(0.125)
    run.batch.layer._q_scale_float = 0.125
    check = run.check()
    assert check.ok, check.reason
    assert check.rel_error < row_tolerance("bf16", "fp8_e4m3") / 2
    asked = {c.path: c.arguments for c in calls}
    types = {
        path.split(".")[0]: (a.q if path.endswith(".run") else a.query).dtype
        for path, a in asked.items()
        if path.endswith((".run", "with_kv_cache"))
    }
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    assert (
        types
        == {
            "FA2": {"decode": bf16, "prefill": bf16},
            "FA3": {"decode": bf16, "prefill": fp8},
            "FA3_DECODE": {"decode": fp8, "prefill": fp8},
            "XQA": {"decode": bf16, "prefill": bf16},
            "TRTLLM_GEN": {"decode": fp8, "prefill": fp8},
        }[variant]
    )


def test_a_query_that_comes_quantised_is_taken_as_it_is(install: Install) -> None:
    calls = install(CURRENT)
    run = FlashInferRun(f"3q1s70 {SMALL} kv=fp8_e4m3", "FA3_DECODE")
    plain, batch = run.attend(), run.batch
    query = quantize(batch.query, torch.float8_e4m3fn, 1.0)
    out = torch.empty_like(plain)
    run.impl.forward(batch.layer, query, batch.key, batch.value, run.kv_cache, run.metadata, out)
    assert calls[-1].arguments.q.data_ptr() == query.data_ptr()
    assert torch.equal(out, plain)


def test_padding_is_neither_read_nor_written(install: Install) -> None:
    install(CURRENT)
    for variant in ("FA2", "XQA", "TRTLLM_GEN"):
        run = FlashInferRun(f"3q1s70_q9 {SMALL} layout=HND", variant)
        batch, right = run.batch, run.attend()
        n = len(right)
        query = torch.cat([batch.query, torch.full_like(batch.query, float("nan"))])
        out = torch.full_like(query, 7.0)
        run.impl.forward(
            batch.layer, query, batch.key, batch.value, run.kv_cache, run.metadata, out
        )
        assert torch.equal(out[:n], right)
        assert bool((out[n:] == 7.0).all())


def test_what_an_impl_refuses(install: Install) -> None:
    install(CURRENT)
    run = FlashInferRun(f"q1s70 {SMALL}", "FA2")
    batch = run.batch
    tensors = (batch.query, batch.key, batch.value, run.kv_cache, run.metadata, batch.query)
    with pytest.raises(UsageError, match="does not quantise its output"):
        run.impl.forward(batch.layer, *tensors, output_scale=torch.ones(1))
    shape = run.workload.shape
    for name in ("", "fa2", "FA4"):
        with pytest.raises(UsageError, match=r"no variant .*FA3, FA2"):
            FlashInferImpl(shape, variant=name)
    with pytest.raises(UsageError, match="decoders only"):
        FlashInferImpl(shape, attn_type=AttentionType.ENCODER, variant="FA2")
    assert Backend.get_kv_cache_shape(3, 16, 8, 128) == (3, 2, 16, 8, 128)
