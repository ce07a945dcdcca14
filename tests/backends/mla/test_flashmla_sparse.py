"""FLASHMLA_SPARSE against the reference, through a FlashMLA with the recorded signatures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.backends import flashmla_sparse, triton_mla_launch, triton_sparse_launch
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.declared.families import families
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.ds_mla import dequantize_rows, write_rows
from attnbench.backends.flashmla_sparse import FlashMLASparseBackend
from attnbench.backends.mla_libraries import MLA_LIBRARIES, load_functions, variants_of
from attnbench.backends.registry import (
    get_backend_class,
    runnable_backend_names,
)
from attnbench.backends.topk import topk_slots
from attnbench.errors import BackendUnavailableError, UsageError
from attnbench.selection import config_of, consider, select
from attnbench.workload import Workload
from tests.backends.flash_attn.fake_library import Call
from tests.backends.mla import fake_sparse
from tests.backends.mla.conftest import forget, write_on_the_cpu
from tests.backends.mla.fake_library import RECORDED, signature_of
from tests.backends.mla.sparse_workloads import SMALL, WIDE, WORKLOADS, reason
from tests.backends.running import Run
from tests.backends.running import config_of as asked

NAME = "FLASHMLA_SPARSE"
SM80, SM90, SM100 = cuda_device(8, 0), cuda_device(9, 0), cuda_device(10, 0)
RECORDS = {"vllm-0.22.1 flashmla": "VLLM", "flash_mla-02fe0d0": "UPSTREAM"}
Install = Callable[[str], list[Call]]

CASES = [
    pytest.param(record, f"{text}{kv}", id=f"{record} {name}{kv}")
    for record in RECORDS
    for name, text in WORKLOADS.items()
    for kv in ("", " kv=fp8_ds_mla")
]


def on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """The Triton launches around the library, by their oracles in torch."""

    def slots(
        out: torch.Tensor,
        indices: torch.Tensor,
        request: torch.Tensor,
        table: torch.Tensor,
        block_size: int,
        workspace_start: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        def run() -> None:
            out.fill_(-1)
            there = topk_slots(indices, request, table, block_size)
            if workspace_start is not None:
                moved = (workspace_start[:, None] >= 0) & (indices >= 0)
                there = torch.where(moved, workspace_start[:, None] + indices, there)
            out[:, : indices.shape[1]] = there

        return SimpleNamespace(run=run)

    def read(output: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor) -> SimpleNamespace:
        def run() -> None:
            output.copy_(dequantize_rows(cache.flatten(0, 1)[rows.long()], output.dtype))

        return SimpleNamespace(run=run)

    def write(*arguments: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(run=lambda: write_rows(*arguments))

    patch.setattr(triton_sparse_launch, "topk_slots_launch", slots)
    patch.setattr(triton_sparse_launch, "read_ds_mla_launch", read)
    patch.setattr(triton_sparse_launch, "write_ds_mla_launch", write)
    patch.setattr(triton_mla_launch, "write_latent_launch", write_on_the_cpu)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    forget()
    on_the_cpu(monkeypatch)
    yield lambda record: fake_sparse.install(monkeypatch, record)
    forget()


@pytest.mark.parametrize(("record", "text"), CASES)
def test_output_and_lse_equal_the_reference(put: Install, record: str, text: str) -> None:
    calls = put(record)
    variant = RECORDS[record]
    config = asked(Workload.parse(text))
    assert FlashMLASparseBackend.validate_configuration(config, SM90) == []
    assert FlashMLASparseBackend.variant_refusal(variant, config, SM90) is None
    run = Run(FlashMLASparseBackend, text, variant)
    assert run.metadata.num_decode_tokens == run.workload.num_tokens
    assert reason(run) == ""
    assert reason(run) == "", "the second call"
    library = MLA_LIBRARIES[NAME][variant]
    for call in calls:
        # Only what is declared, and so checked when a library is loaded, is passed.
        assert call.given <= set(library.functions[call.name])


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 100)), min_size=1, max_size=4),
    topk=st.integers(1, 140),
    pattern=st.sampled_from(["random", "prefix", "window"]),
    heads=st.sampled_from([1, 4, 32, 40]),
    kv=st.sampled_from(["", " kv=fp8_ds_mla"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_any_batch(
    lengths: list[tuple[int, int]], topk: int, pattern: str, heads: int, kv: str, seed: int
) -> None:
    spec = "_".join(f"q{query}s{query + context}" for query, context in lengths)
    text = f"{spec} block=64 heads={heads}/1 mla=512+64:8+8 topk={topk}:{pattern} seed={seed}{kv}"
    with pytest.MonkeyPatch.context() as patch:
        on_the_cpu(patch)
        fake_sparse.install(patch, "vllm-0.22.1 flashmla")
        assert reason(Run(FlashMLASparseBackend, text, "VLLM")) == ""


# --- which kernel runs what -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "names"),
    [
        (WORKLOADS["mixed"], ["flash_mla_sparse_fwd"]),
        (f"{WORKLOADS['mixed']} kv=fp8_ds_mla", ["flash_mla_with_kvcache"]),
        (f"{WORKLOADS['wide, decode']} kv=fp8_ds_mla", ["flash_mla_with_kvcache"]),
        (f"{WORKLOADS['wide, prefill']} kv=fp8_ds_mla", ["flash_mla_sparse_fwd"]),
        (
            f"{WORKLOADS['wide, mixed']} kv=fp8_ds_mla",
            ["flash_mla_with_kvcache", "flash_mla_sparse_fwd"],
        ),
    ],
)
def test_the_kernels_are_those_vllm_calls(put: Install, text: str, names: list[str]) -> None:
    calls = put("vllm-0.22.1 flashmla")
    run = Run(FlashMLASparseBackend, text, "VLLM")
    calls.clear()
    assert reason(run) == ""
    assert [call.name for call in calls] == names


def test_all_tokens_of_few_heads_are_one_request_of_the_fp8_kernel(put: Install) -> None:
    calls = put("vllm-0.22.1 flashmla")
    run = Run(FlashMLASparseBackend, f"{WORKLOADS['mixed']} kv=fp8_ds_mla", "VLLM")
    run.attend()
    arguments = calls[-1].arguments
    assert arguments.q.shape == (1, 63, 64, 576)
    assert arguments.indices.shape == (1, 63, 128)
    assert arguments.k_cache.dtype is torch.uint8


def test_decodes_of_many_heads_keep_their_requests(put: Install) -> None:
    calls = put("vllm-0.22.1 flashmla")
    run = Run(FlashMLASparseBackend, f"{WORKLOADS['wide, mixed']} kv=fp8_ds_mla", "VLLM")
    calls.clear()
    run.attend()
    assert calls[0].arguments.q.shape == (2, 2, 64, 576)
    assert calls[1].arguments.kv.shape == (20 + 50, 1, 576)


def test_prefills_are_upconverted_in_chunks_of_whole_requests(
    put: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = put("vllm-0.22.1 flashmla")
    monkeypatch.setattr(flashmla_sparse, "WORKSPACE_TOKENS", 100)
    text = f"q17s60_q18s40_q19s120_q17s30 {WIDE} topk=16:random kv=fp8_ds_mla"
    run = Run(FlashMLASparseBackend, text, "VLLM")
    calls.clear()
    assert reason(run) == ""
    assert [call.arguments.kv.shape[0] for call in calls] == [100, 120, 30]


@pytest.mark.parametrize(("heads", "padded"), [(4, 64), (64, 64), (96, 128), (128, 128)])
@pytest.mark.parametrize("kv", ["", " kv=fp8_ds_mla"])
def test_heads_are_padded_to_64_or_128_and_fitting_outputs_are_written_directly(
    put: Install, heads: int, padded: int, kv: str
) -> None:
    calls = put("vllm-0.22.1 flashmla")
    text = f"2q1s70 block=64 heads={heads}/1 mla=512+64:8+8 topk=16:random{kv}"
    run = Run(FlashMLASparseBackend, text, "VLLM")
    q = torch.randn((2, heads, 576), dtype=torch.bfloat16)
    out = torch.full((2, heads, 512), torch.nan, dtype=torch.bfloat16)
    lse = run.impl.forward_mqa(run.batch.layer, q, run.kv_cache, run.metadata, out)
    assert calls[-1].arguments.q.shape[-2] == padded
    assert bool(out.isfinite().all())
    assert lse.shape == (2, heads)
    given = calls[-1].arguments.out
    assert (given is not None and given.data_ptr() == out.data_ptr()) == (heads == padded)


def test_blackwell_gets_128_heads_from_the_prefill_kernel(
    put: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = put("vllm-0.22.1 flashmla")
    monkeypatch.setattr(flashmla_sparse, "_is_blackwell", lambda device: True)
    assert reason(Run(FlashMLASparseBackend, WORKLOADS["decode"], "VLLM")) == ""
    assert calls[-1].arguments.q.shape[1] == 128


def test_a_schedule_belongs_to_one_step_and_metadata_for_graphs_keeps_its_memory(
    put: Install,
) -> None:
    put("vllm-0.22.1 flashmla")
    run = Run(FlashMLASparseBackend, f"{WORKLOADS['wide, decode']} kv=fp8_ds_mla", "VLLM")
    first = run.metadata.decode.schedule
    assert run.builder.build(0, run.batch.metadata).decode.schedule is not first
    assert run.builder.cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    once, again = (
        run.builder.build_for_cudagraph_capture(run.batch.metadata).decode for _ in range(2)
    )
    assert once.slots.data_ptr() == again.slots.data_ptr()
    assert once.request_of_token.data_ptr() == again.request_of_token.data_ptr()
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert reason(run) == ""


def test_a_dense_batch_is_refused(put: Install) -> None:
    put("vllm-0.22.1 flashmla")
    with pytest.raises(UsageError, match=r"write topk=, e\.g\. topk=2048:random"):
        Run(FlashMLASparseBackend, f"2q1s70 {SMALL}", "VLLM")


# --- libraries and signatures ---------------------------------------------------------------------
@pytest.mark.parametrize("record", RECORDS)
def test_what_is_passed_is_in_the_recorded_signature(record: str) -> None:
    library = MLA_LIBRARIES[NAME][RECORDS[record]]
    assert RECORDED[record]["module"] == library.module
    for path, wanted in library.functions.items():
        parameters = signature_of(record, path).parameters
        assert set(wanted) <= set(parameters), path
        required = {
            n
            for n, p in parameters.items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        }
        assert required <= set(wanted), path


def test_a_library_without_the_sparse_kernel_is_refused_when_it_is_loaded(
    put: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("vllm-0.22.1 flashmla")
    library = MLA_LIBRARIES[NAME]["VLLM"]
    monkeypatch.delattr(sys.modules[library.module], "flash_mla_sparse_fwd")
    with pytest.raises(
        BackendUnavailableError, match=r"has no flash_mla_sparse_fwd\); pip install"
    ):
        load_functions(NAME, library)


def test_nothing_installed_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    for name in [m for m in sys.modules if m.partition(".")[0] in ("vllm", "flash_mla")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("attnbench.backends.mla_libraries.find_spec", lambda name: None)
    missing = FlashMLASparseBackend.variant_unavailable("VLLM", SM90)
    assert missing is not None
    assert "pip install vllm==0.22.1" in missing
    with pytest.raises(BackendUnavailableError, match=f"{NAME} needs vllm or flash_mla"):
        FlashMLASparseBackend.get_impl_cls()


def test_variants_and_the_kernels_they_promise() -> None:
    assert variants_of(NAME, SM90) == variants_of(NAME, SM100) == ("VLLM", "UPSTREAM")
    assert variants_of(NAME, SM80) == ()
    (pattern,) = FlashMLASparseBackend.kernel_patterns("VLLM", SM90)
    for kernel in (
        "void sm90::fwd::sparse_attn_fwd_kernel<sm90::fwd::KernelTemplate<576, false>",
        "void sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel<sm90::decode",
        "void sm100::fwd::head128::sparse_attn_fwd_kernel<",
        "void sm100::fwd_for_small_topk::head128::sparse_attn_fwd_for_small_topk_kernel<",
    ):
        assert re.search(pattern, kernel), kernel
    for other in (
        "void sm90::flash_fwd_splitkv_mla_kernel<",
        "void smxx::decode::flash_fwd_mla_combine_kernel<",
        "topk_slots_kernel",
        "read_ds_mla_kernel",
    ):
        assert not re.search(pattern, other), other
    with pytest.raises(
        UsageError, match="has no variant 'VLLM\\+FA2': its kernels run prefills too"
    ):
        FlashMLASparseBackend.impl_cls(Workload.parse(f"q1 {SMALL}").shape, variant="VLLM+FA2")
    with pytest.raises(UsageError, match=r"no variant 'FA3'.*VLLM or FLASHMLA_SPARSE:UPSTREAM"):
        FlashMLASparseBackend.impl_cls(Workload.parse(f"q1 {SMALL}").shape, variant="FA3")


# --- selection ------------------------------------------------------------------------------------
SPARSE = config_of(Workload.parse("8q1s4k block=64 shape=deepseek-v3.2 topk=2048:random"))
DENSE = config_of(Workload.parse("8q1s4k block=64 shape=deepseek-v3.2"))


def test_sparsity_is_asked_for_by_topk() -> None:
    assert (SPARSE.use_sparse, DENSE.use_sparse) == (True, False)
    assert SPARSE._replace(use_sparse=False) == DENSE


def test_it_is_runnable_and_selected_for_sparse_only() -> None:
    assert NAME in runnable_backend_names()
    assert get_backend_class(NAME) is FlashMLASparseBackend
    sparse = SPARSE._replace(kv_cache_layout=None)
    for device in (SM90, SM100):
        assert (select(sparse, device).backend, select(sparse, device).variant) == (NAME, "VLLM")
        assert select(sparse, device).followed == NAME
    dense = DENSE._replace(kv_cache_layout=None)
    assert select(dense, SM90).backend != NAME
    asked_for = consider(dense, SM90, NAME)
    assert asked_for.candidates[0].reasons == ("non-sparse not supported",)


@pytest.mark.parametrize("device", [Device("cpu"), SM80, SM90, SM100, Device("rocm", "gfx942")])
def test_every_dense_backend_refuses_a_sparse_workload(device: Device) -> None:
    for name in runnable_backend_names():
        backend = get_backend_class(name)
        if backend.is_sparse() or name == "TORCH_MLA":
            continue
        assert "sparse not supported" in backend.validate_configuration(SPARSE, device), name


def test_torch_mla_takes_both_on_the_cpu() -> None:
    for config in (SPARSE, DENSE):
        assert select(config, Device("cpu"), "TORCH_MLA").backend == "TORCH_MLA"


@pytest.mark.parametrize("device", [SM80, SM90, SM100, cuda_device(12, 0), Device("cpu")])
def test_vllm_s_reasons_come_first_and_unchanged(device: Device) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"use_sparse": False},
        {"head_size": 512},
        {"dtype": torch.float16},
        {"kv_cache_dtype": "fp8_ds_mla"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"block_size": 16},
        {"has_sink": True},
    ]
    for change in changes:
        config = SPARSE._replace(**change)
        theirs = families()[NAME].validate_configuration(config, device)
        ours = FlashMLASparseBackend.validate_configuration(config, device)
        assert ours[: len(theirs)] == theirs
        assert len(ours) <= len(theirs) + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 256}, "at most 128 query heads: 256"),
        ({"has_logits_soft_cap": True}, "no logits soft cap"),
        ({"use_alibi": True}, "no ALiBi"),
        ({"kv_lora_rank": 256, "qk_rope_head_dim": 320}, "512+64 numbers, not 256+320"),
    ],
)
def test_what_its_variants_refuse(change: dict[str, Any], words: str) -> None:
    refused = FlashMLASparseBackend.variant_refusal("VLLM", SPARSE._replace(**change), SM90)
    assert refused is not None
    assert words in refused
