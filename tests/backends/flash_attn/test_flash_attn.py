"""Every variant against the reference, through libraries with the recorded signatures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output, poison_, row_tolerance
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flash_attn import FlashAttentionBackend as Backend
from attnbench.backends.flash_attn import FlashAttentionImpl
from attnbench.backends.flash_attn_library import LIBRARIES
from attnbench.backends.paged_ops import quantize
from attnbench.backends.reference import reference_attention
from attnbench.errors import UsageError
from attnbench.workload import Workload
from tests.backends.flash_attn.conftest import Install
from tests.backends.flash_attn.fake_library import RECORDED
from tests.backends.flash_attn.workloads import WORKLOADS
from tests.backends.running import Run, config_of

SM90, SM100 = cuda_device(9, 0), cuda_device(10, 0)
BUILDS = [(record, variant) for record, facts in RECORDED.items() for variant in facts["variants"]]
FA3_BUILDS = [(record, variant) for record, variant in BUILDS if LIBRARIES[variant].version == 3]


def refused(variant: str, text: str, device: Device = SM90) -> str | None:
    config = config_of(Workload.parse(text))
    reasons = Backend.validate_configuration(config, device)
    return "; ".join(reasons) or Backend.variant_refusal(variant, config, device)


def runnable(record: str, variant: str, device: Device) -> list[Any]:
    texts = WORKLOADS
    if variant == "FA2_UPSTREAM":
        texts = {n: text if "block=" in text else f"{text} block=256" for n, text in texts.items()}
    return [
        pytest.param(record, variant, device, text, id=f"{record} {device} {variant} {name}")
        for name, text in texts.items()
        if refused(variant, text, device) is None
    ]


CASES = [
    case
    for record, variant in BUILDS
    for device in (SM90, SM100)
    if device == SM90 or LIBRARIES[variant].version == 4
    for case in runnable(record, variant, device)
]


def test_every_workload_runs_somewhere_and_most_run_everywhere() -> None:
    names = [str(case.id).rpartition(f"{case.values[1]} ")[2] for case in CASES]
    assert set(names) == set(WORKLOADS)
    assert len(CASES) > 0.6 * (len(BUILDS) + 2) * len(WORKLOADS)


@pytest.mark.parametrize(("record", "variant", "device", "text"), CASES)
def test_output_equals_the_reference(
    install: Install, record: str, variant: str, device: Device, text: str
) -> None:
    assert device.capability is not None
    calls = install(record, device.capability.major)
    check = Run(Backend, text, variant).check()
    assert check.ok, check.reason
    assert calls
    for call in calls:
        # Only what is declared, and so checked when a library is loaded, is passed.
        assert call.given <= set(LIBRARIES[variant].functions[call.name])


@pytest.mark.parametrize(("record", "variant"), FA3_BUILDS)
def test_the_schedule_is_made_once_a_step_and_used(
    install: Install, record: str, variant: str
) -> None:
    """A schedule made for another call is refused by the library: softcap and window included."""
    calls = install(record)
    run = Run(Backend, "q1s70_q20s60 heads=4/2 head_size=64 window=30 softcap=20", variant)
    assert [call.name for call in calls] == ["get_scheduler_metadata"]
    run.attend()
    run.attend()
    _, *used = calls
    assert [call.name for call in used] == [used[0].name] * 2
    assert all(call.arguments.scheduler_metadata is not None for call in used)
    drafted = run.builder.build_for_drafting(run.batch.metadata, 1)
    assert drafted.scheduler_metadata is None
    run.metadata = drafted
    assert run.check().ok
    run.metadata = run.builder.build(0, run.batch.metadata.replace(max_query_len=64))
    run.metadata.max_query_len = 20
    with pytest.raises(RuntimeError, match="made for another call"):
        run.attend()


@pytest.mark.parametrize(("record", "variant"), BUILDS)
def test_metadata_for_a_captured_graph(install: Install, record: str, variant: str) -> None:
    install(record)
    run = Run(Backend, "4q1s70 heads=4/2 head_size=64 block=256", variant)
    is_fa3 = LIBRARIES[variant].version == 3
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert run.metadata.max_num_splits == (32 if is_fa3 else 0)
    assert run.check().ok
    wanted = AttentionCGSupport.ALWAYS if is_fa3 else AttentionCGSupport.UNIFORM_BATCH
    assert run.builder.cudagraph_support is wanted
    assert run.builder.get_cudagraph_support(run.batch.spec) is AttentionCGSupport.UNIFORM_BATCH
    again = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    if is_fa3:
        # The same memory: a captured graph reads the new schedule.
        first, second = run.metadata.scheduler_metadata, again.scheduler_metadata
        assert first.data_ptr() == second.data_ptr()
    else:
        assert again.scheduler_metadata is None


@pytest.mark.parametrize(("major", "splits"), [(9, 1), (10, 0)])
def test_fa4_splits_contexts_where_it_can(install: Install, major: int, splits: int) -> None:
    """0: it chooses, as vLLM lets it. On Hopper FlashAttention's own package refuses to."""
    calls = install("flash-attn-4-4.0.0b36", major)
    run = Run(Backend, "3q1s70 heads=4/2 head_size=64", "FA4_UPSTREAM")
    run.attend()
    assert calls[-1].arguments.num_splits == splits
    calls = install("vllm-0.22.1", major)
    run = Run(Backend, "3q1s70 heads=4/2 head_size=64", "FA4")
    run.metadata = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    run.attend()
    assert (calls[-1].arguments.num_splits, calls[-1].arguments.fa_version) == (0, 4)


def test_a_running_sum_that_a_graph_reads_stays_where_it_is(install: Install) -> None:
    install("flash-attn-2.8.3.post2")
    run = Run(Backend, "2q1s40 heads=4/2 head_size=64 block=256", "FA2_UPSTREAM")
    captured = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    place = captured.key_start_loc.data_ptr()
    assert captured.key_start_loc.tolist() == [0, 40, 80]
    run.batch.metadata.seq_lens.fill_(30)
    assert run.builder.build(0, run.batch.metadata).key_start_loc.data_ptr() != place
    assert captured.key_start_loc.tolist() == [0, 40, 80]
    again = run.builder.build_for_cudagraph_capture(run.batch.metadata)
    assert again.key_start_loc.data_ptr() == place
    assert captured.key_start_loc.tolist() == [0, 30, 60]


def test_many_tokens_are_captured_without_a_bound_on_the_splits(install: Install) -> None:
    """32 parts of a long prefill would take gigabytes; vLLM captures at most 512 tokens."""
    install("vllm-0.22.1")
    run = Run(Backend, "q513 heads=1/1 head_size=8", "FA3")
    assert run.builder.build_for_cudagraph_capture(run.batch.metadata).max_num_splits == 0


def test_another_block_table_is_another_view_of_the_same_lengths(install: Install) -> None:
    install("vllm-0.22.1")
    run = Run(Backend, "2q1s40 heads=4/2 head_size=64", "FA3")
    table, slots = torch.zeros(1), torch.ones(1)
    changed = run.builder.update_block_table(run.metadata, table, slots)
    assert changed.block_table is table
    assert changed.slot_mapping is slots
    assert changed.seq_lens is run.metadata.seq_lens
    assert run.metadata.block_table is not table


@pytest.mark.parametrize("text", ["q1s70_q1s9", "2q20s60 softcap=20", "q1s70 sinks=1"])
@pytest.mark.parametrize(("record", "variant"), BUILDS)
def test_lse_equals_the_reference(install: Install, record: str, variant: str, text: str) -> None:
    install(record)
    text = f"{text} heads=4/2 head_size=64 block=256"
    if refused(variant, text):
        return
    run = Run(Backend, text, variant)
    out = poison_(torch.empty_like(run.batch.query))
    lse = run.impl.forward_with_lse(
        run.batch.layer, run.batch.query, run.kv_cache, run.metadata, out
    )
    truth = reference_attention(run.batch)
    assert check_output(out, truth, "bf16", "bf16").ok
    torch.testing.assert_close(lse.double(), truth.lse, atol=2e-3, rtol=0)


def test_where_there_is_no_lse(install: Install) -> None:
    install("vllm-0.22.1")
    for text in ("2q9 attn=encoder_only", "q1s70 alibi=1"):
        run = Run(Backend, f"{text} heads=4/2 head_size=64", "FA2")
        with pytest.raises(UsageError, match="LSE over a KV cache and without ALiBi"):
            run.impl.forward_with_lse(
                run.batch.layer, run.batch.query, run.kv_cache, run.metadata, run.batch.query
            )


@pytest.mark.parametrize("variant", ["FA3", "FA3_UPSTREAM"])
def test_a_query_that_comes_quantised_is_taken_as_it_is(install: Install, variant: str) -> None:
    calls = install("vllm-0.22.1" if variant == "FA3" else "hopper-2.8.3")
    run = Run(Backend, "3q1s70 heads=4/2 head_size=64 kv=fp8_e4m3", variant)
    plain = run.attend()
    batch = run.batch
    run.batch.query = quantize(batch.query, torch.float8_e4m3fn, 1.0)
    out = torch.empty_like(plain)
    run.impl.forward(
        batch.layer, batch.query, batch.key, batch.value, run.kv_cache, run.metadata, out
    )
    assert calls[-1].arguments.q.data_ptr() == batch.query.data_ptr()
    assert torch.equal(out, plain)
    assert calls[-1].arguments.k_descale.shape == (3, 2)


def test_fp8_scales_are_each_in_their_place(install: Install) -> None:
    """Query, key and value have different scales here: none may stand for another."""
    install("vllm-0.22.1")
    run = Run(Backend, "3q1s70 heads=4/2 head_size=64 kv=fp8_e4m3", "FA3")
    run.batch.layer._q_scale.fill_(0.125)
    run.batch.layer._q_scale_float = 0.125
    check = run.check()
    assert check.ok, check.reason
    assert check.rel_error < row_tolerance("bf16", "fp8_e4m3") / 2


def test_padding_is_neither_read_nor_written(install: Install) -> None:
    install("vllm-0.22.1")
    run = Run(Backend, "3q1s70 heads=4/2 head_size=64", "FA3")
    batch = run.batch
    right = run.attend()
    query = torch.cat([batch.query, torch.full_like(batch.query, float("nan"))])
    out = torch.full_like(query, 7.0)
    run.impl.forward(batch.layer, query, batch.key, batch.value, run.kv_cache, run.metadata, out)
    assert torch.equal(out[:3], right)
    assert bool((out[3:] == 7.0).all())


def test_a_quantised_output_is_refused(install: Install) -> None:
    install("vllm-0.22.1")
    run = Run(Backend, "q1s70 heads=4/2 head_size=64", "FA3")
    batch = run.batch
    tensors = (batch.query, batch.key, batch.value, run.kv_cache, run.metadata, batch.query)
    with pytest.raises(UsageError, match="does not quantise its output"):
        run.impl.forward(batch.layer, *tensors, output_scale=torch.ones(1))


def test_a_variant_must_be_named(install: Install) -> None:
    install("vllm-0.22.1")
    shape = Workload.parse("q1s9").shape
    for name in ("", "fa3", "FA5"):
        with pytest.raises(UsageError, match=r"no variant .*FA3, FA4, FA2, FA3_UPSTREAM"):
            FlashAttentionImpl(shape, variant=name)
