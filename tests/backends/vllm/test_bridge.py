"""Every form of backend against the reference, through a vLLM with the recorded signatures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnbench.backends.batch import make_batch
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output
from attnbench.backends.device import cuda_device
from attnbench.backends.reference import reference_attention
from attnbench.backends.vllm_bridge import vllm_backend
from attnbench.backends.vllm_bridge_engine import Limits
from attnbench.errors import SelectionError, UsageError
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.prepare import prepare
from attnbench.workload import Workload
from tests.backends.running import Run, config_of
from tests.backends.vllm.conftest import Install
from tests.backends.vllm.fake_state import VERSIONS, State, has_cache_shapes
from tests.backends.vllm.workloads import MLA_WORKLOADS, WORKLOADS

SM90 = cuda_device(9, 0)
ORDINARY = (
    *("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "ROCM_AITER_FA", "HPC_ATTN"),
)
MLA = ("TRITON_MLA", "FLASHMLA", "CUTLASS_MLA")
BLOCKS = {"FLASHMLA": " block=64", "CUTLASS_MLA": " block=128"}
DECODE = "3q1s70 heads=4/2 head_size=64"


def reasons(name: str, text: str) -> list[str]:
    return vllm_backend(name).validate_configuration(config_of(Workload.parse(text)), SM90)


def the_call(state: State, name: str) -> Any:
    """The last call of a function."""
    return [arguments for called, arguments in state.calls if called == name][-1]


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("version", VERSIONS)
def test_output_equals_the_reference(install: Install, version: str, name: str) -> None:
    if name not in install(version).names_in_registry():
        pytest.skip(f"vLLM {version} has no {name}")
    for what, text in WORKLOADS.items():
        if name == "FLASHINFER":
            text = text if "layout" in text else f"{text} layout=HND"
        if reasons(name, text):
            assert "block" in text
            continue
        check = Run(vllm_backend(name), text).check()
        assert check.ok, f"{what}: {check.reason}"


@pytest.mark.parametrize("name", MLA)
@pytest.mark.parametrize("version", VERSIONS)
def test_mla_output_equals_the_reference(install: Install, version: str, name: str) -> None:
    state = install(version)
    for what, text in MLA_WORKLOADS.items():
        text += BLOCKS.get(name, "")
        assert reasons(name, text) == []
        check = Run(vllm_backend(name), text).check()
        assert check.ok, f"{what}: {check.reason}"
    assert set(state.names("MLAAttentionImpl.forward")) == {
        "MLAAttentionImpl.forward_mqa",
        "MLAAttentionImpl.forward_mha",
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_the_configuration_is_the_engine_s(install: Install, version: str) -> None:
    state = install(version)
    run = Run(vllm_backend("TRITON_ATTN"), f"{DECODE} kv=fp8_e4m3 layout=HND block=32")
    config = the_call(state, "TritonAttentionMetadataBuilder.__init__").vllm_config
    assert config.cache_config.block_size == 32
    assert config.cache_config.cache_dtype == "fp8_e4m3"
    assert config.scheduler_config.max_num_seqs == 1024
    assert config.compilation_config.max_cudagraph_capture_size == 512
    assert len(config.compilation_config.cudagraph_capture_sizes) == 51
    if has_cache_shapes(version):
        assert state.layout == "HND"
    else:
        assert config.cache_config.kv_cache_layout == "LBHNC"
    assert run.builder.cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    with pytest.raises(AttributeError, match="model_config has no 'tokenizer'"):
        _ = config.model_config.tokenizer
    assert state.workspace == torch.device("cpu")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_above_the_engine_s_sizes_gets_larger_buffers(
    install: Install, version: str
) -> None:
    state = install(version)
    run = Run(vllm_backend("TRITON_ATTN"), "1100q1s2 heads=1/1 head_size=8")
    assert run.check().ok
    made = state.names("TritonAttentionMetadataBuilder.__init__")
    assert len(made) == 2, "once for the usual sizes, once for this batch"
    run.builder.build(0, run.batch.metadata)
    assert len(state.names("TritonAttentionMetadataBuilder.__init__")) == 2


def test_limits_grow_with_a_batch_and_never_shrink() -> None:
    small: Any = SimpleNamespace(num_reqs=1, num_actual_tokens=1, max_seq_len=1)
    assert Limits().fitting(small) == Limits(1024, 16_384, 131_072)
    large: Any = SimpleNamespace(num_reqs=2000, num_actual_tokens=20_000, max_seq_len=200_000)
    assert Limits().fitting(large) == Limits(2000, 20_000, 200_000)
    assert Limits().fitting(large).fitting(small) == Limits(2000, 20_000, 200_000)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_builder_is_told_of_the_window_and_the_block(install: Install, version: str) -> None:
    state = install(version)
    Run(vllm_backend("TRITON_ATTN"), f"{DECODE} window=20 block=32")
    spec = the_call(state, "TritonAttentionMetadataBuilder.__init__").kv_cache_spec
    assert type(spec).__name__ == "SlidingWindowSpec"
    assert (spec.sliding_window, spec.block_size) == (20, 32)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_cache_is_the_memory_itself(install: Install, version: str) -> None:
    """A view that copied would be right once and wrong in a captured graph."""
    state = install(version)
    for layout in ("NHD", "HND"):
        for name in ("TRITON_ATTN", "FLASH_ATTN", "ROCM_AITER_FA"):
            for kv in ("auto", "fp8_e4m3"):
                run = Run(vllm_backend(name), f"{DECODE} layout={layout} kv={kv}")
                run.attend()
                given = the_call(state, "TritonAttentionImpl.forward").kv_cache
                assert given.data_ptr() == run.kv_cache.data_ptr()
                assert (given.dtype is torch.uint8) == (kv != "auto")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_fp8_query_is_made_as_the_layer_makes_it(install: Install, version: str) -> None:
    state = install(version)
    run = Run(vllm_backend("FLASH_ATTN"), f"{DECODE} kv=fp8_e4m3")
    run.batch.layer._q_scale.fill_(0.125)
    run.batch.layer._q_scale_float = 0.125
    assert run.check().ok
    called = the_call(state, "TritonAttentionImpl.forward")
    assert called.query.dtype is torch.float8_e4m3fn
    assert float(called.layer._q_scale) == called.layer._q_scale_float == 0.125
    assert float(called.layer._k_scale) == run.batch.layer._k_scale_float
    if not has_cache_shapes(version):
        assert float(called.layer._v_scale_cpu) == run.batch.layer._v_scale_float


@pytest.mark.parametrize("version", VERSIONS)
def test_scales_are_copied_once_not_at_every_call(install: Install, version: str) -> None:
    """A copy in a captured graph would be timed."""
    state = install(version)
    run = Run(vllm_backend("TRITON_ATTN"), f"{DECODE} kv=fp8_e4m3")
    run.attend()
    layer = the_call(state, "TritonAttentionImpl.forward").layer
    layer._k_scale.fill_(77.0)
    run.attend()
    assert float(layer._k_scale) == 77.0


@pytest.mark.parametrize("version", VERSIONS)
def test_cascade_is_asked_of_vllm_where_it_has_one(install: Install, version: str) -> None:
    state = install(version)
    run = Run(vllm_backend("TRITON_ATTN"), "3q1s600 heads=4/2 head_size=64 prefix=256")
    answer = run.builder.use_cascade_attention(256, [1, 1, 1], 4, 2, False, False, False, 132, 1)
    asked = "AttentionMetadataBuilder.use_cascade_attention" in dict(state.calls)
    assert answer is asked is (version != "0.33.0")
    run.metadata = run.builder.build(0, run.batch.metadata)
    assert run.check().ok


def test_a_write_that_is_part_of_forward_is_not_made_apart(install: Install) -> None:
    install("0.22.1")
    assert vllm_backend("CPU_ATTN").forward_includes_kv_cache_update
    assert not vllm_backend("TRITON_ATTN").forward_includes_kv_cache_update
    assert not vllm_backend("TRITON_MLA").forward_includes_kv_cache_update


def test_a_quantised_output_is_refused(install: Install) -> None:
    install("0.22.1")
    run = Run(vllm_backend("TRITON_ATTN"), DECODE)
    batch = run.batch
    tensors = (batch.query, batch.key, batch.value, run.kv_cache, run.metadata, batch.query)
    with pytest.raises(UsageError, match="without a quantised output"):
        run.impl.forward(batch.layer, *tensors, output_scale=torch.ones(1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("FLASHINFER", f"{DECODE} layout=NHD", "kv_cache_layout NHD not supported"),
        ("FLASHINFER", f"{DECODE} layout=HND block=48", "use block=16 (of 16, 32, 64)"),
        ("FLASHMLA", "q1s70 heads=2 mla=512+64:128+128 block=128", "use block=64 (of 64)"),
        ("TRITON_ATTN", f"{DECODE} v_head_size=32", "v_head_size other than head_size"),
        ("FLASH_ATTN_DIFFKV", DECODE, "neither K and V of one size nor one latent"),
        ("CPU_ATTN", DECODE, "keeps keys in tiles of its own"),
        ("ROCM_ATTN", DECODE, "keeps keys in tiles of its own"),
        ("TRITON_MLA", DECODE, "MLA"),
        ("FLASHMLA_SPARSE", "q1s70 heads=2 mla=512+64:128+128", "sparse"),
        (
            "FLASHMLA_SPARSE",
            "q1s70 block=64 heads=2 mla=512+64:128+128 topk=8:random",
            "its indexer, which chooses what sparse queries attend to, is not run here",
        ),
        ("TRITON_ATTN", f"{DECODE} kv=fp32", "kv_cache_dtype not supported"),
    ],
)
def test_what_is_refused(install: Install, version: str, name: str, text: str, reason: str) -> None:
    install(version)
    assert reason in "; ".join(reasons(name, text))
    assert reasons("TRITON_ATTN", DECODE) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_vllm_s_reasons_come_first_and_as_they_are(install: Install, version: str) -> None:
    state = install(version)
    state.reasons = ["attention sinks not supported"]
    assert reasons("TRITON_ATTN", f"{DECODE} sinks=1") == state.reasons
    asked = the_call(state, "AttentionBackend.validate_configuration")
    assert (asked.has_sink, asked.head_size, asked.block_size) == (True, 64, 16)
    assert (asked.device_capability.major, asked.device_capability.minor) == (9, 0)
    assert asked.kv_cache_dtype == "auto", "bf16 queries and cache: vLLM's default"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TRITON_ATTN", "3q1s600 heads=4/2 head_size=64 prefix=256 kv=fp8_e4m3"),
        ("HPC_ATTN", f"{DECODE} window=20"),
        ("TRITON_MLA", MLA_WORKLOADS["mixed"]),
    ],
)
def test_a_prepared_point_and_its_twin(
    install: Install, version: str, name: str, text: str
) -> None:
    """Everything the measuring room calls, and a second copy of it in other memory."""
    if name not in install(version).names_in_registry():
        pytest.skip(f"vLLM {version} has no {name}")
    planned = PlannedPoint(Workload.parse(text), f"VLLM:{name}")
    threshold = vllm_backend(name).get_builder_cls().reorder_batch_threshold
    batch = make_batch(planned.workload, "cpu", threshold)
    truth = reference_attention(batch)
    kv = planned.workload.resolved_kv_cache_dtype
    with torch.no_grad():
        point = prepare(planned, batch)
        twin = point.twin()
        for one in (point, twin, point):
            one.poison()
            one.attend()
            found = check_output(one.output(), truth, "bf16", kv, one.lse())
            assert found.ok, found.reason
        calls = point.timed_calls()
        assert ("kv_cache_write" in calls) == (name != "HPC_ATTN")
        for call in calls.values():
            call()


@pytest.mark.parametrize("name", ["TRITON_ATTN", "FLASH_ATTN", "TRITON_MLA"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_is_captured_as_vllm_does_and_filled_by_its_build(
    install: Install, version: str, name: str
) -> None:
    state = install(version)
    text = "3q1s70 shape=deepseek-v2-lite" if name == "TRITON_MLA" else DECODE
    planned = PlannedPoint(Workload.parse(text), f"VLLM:{name}")
    batch = make_batch(planned.workload, "cpu", 1)
    with torch.no_grad():
        point: Any = prepare(planned, batch, for_graph=True)
        capture = "AttentionMetadataBuilder.build_for_cudagraph_capture"
        step = "TritonAttentionMetadataBuilder.build"
        assert [n for n in state.names() if n in (capture, step)][-2:] == [step, step]
        captured = point.metadata
        assert captured.theirs.common.max_seq_len == 131_072
        # The engine's own tensors, with this batch in them again.
        assert captured.theirs.common.seq_lens.data_ptr() == batch.metadata.seq_lens.data_ptr()
        point.attend()
        found = check_output(point.output(), reference_attention(batch), "bf16", "bf16")
        assert found.ok, found.reason
        state.calls.clear()
        point.build_metadata()
        assert point.metadata is captured
        assert state.names() == [step]
        twin: Any = point.twin()
        assert twin.metadata is not captured
        assert twin.builder.theirs is not point.builder.theirs


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_vllm_captures_no_graph_of_is_refused(install: Install, version: str) -> None:
    install(version)
    planned = PlannedPoint(Workload.parse("q1s40_q4s40"), "VLLM:TRITON_ATTN")
    with pytest.raises(SelectionError, match=r"VLLM:TRITON_ATTN builds .* one query length only"):
        prepare(planned, make_batch(planned.workload), for_graph=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_later_step_in_higher_blocks(install: Install, version: str) -> None:
    """A cache that grew: the impl must be given the blocks the new table leads to."""
    install(version)
    run = Run(vllm_backend("FLEX_ATTENTION"), f"{DECODE} seed=1")
    common, table = run.batch.metadata, run.batch.metadata.block_table_tensor
    last = run.kv_cache.shape[1 if has_cache_shapes(version) else 0] - 1
    assert last > int(table.max())
    assert run.check().ok, "with the blocks up to the highest in use"
    first = int(table[0, 0])
    axis = 1 if has_cache_shapes(version) else 0
    run.kv_cache.select(axis, last).copy_(run.kv_cache.select(axis, first))
    moved = table.clone()
    moved[0, 0] = last
    run.metadata = run.builder.build(0, common.replace(block_table_tensor=moved))
    assert run.metadata.num_blocks == last + 1
    assert run.check().ok


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tiled_cache_that_is_not_read_is_no_reason(install: Install, version: str) -> None:
    install(version)
    assert reasons("CPU_ATTN", f"{DECODE.replace('q1s70', 'q9')} attn=encoder_only") == []
    assert len(reasons("CPU_ATTN", f"{DECODE} attn=encoder_decoder")) == 1


@pytest.mark.parametrize("version", [v for v in VERSIONS if not has_cache_shapes(v)])
@pytest.mark.parametrize("heads", ["4/1", "4/2", "6/3"])
def test_a_form_is_not_taken_for_another_with_the_same_numbers(
    install: Install, monkeypatch: pytest.MonkeyPatch, version: str, heads: str
) -> None:
    """K and V of two heads folded into one slot each have the numbers of two heads side by side."""
    install(version)
    monkeypatch.setattr("attnbench.backends.vllm_bridge._TILED", ())
    (reason,) = reasons("ROCM_ATTN", f"3q1s70 heads={heads} head_size=64")
    assert "neither K and V of one size nor one latent" in reason
    assert reasons("ROCM_AITER_FA", f"3q1s70 heads={heads} head_size=64") == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_builder_is_made_for_the_kind_of_attention(install: Install, version: str) -> None:
    state = install(version)
    for attn, kind in (
        ("encoder_only", "EncoderOnlyAttentionSpec"),
        ("encoder_decoder", "CrossAttentionSpec"),
    ):
        run = Run(vllm_backend("FLEX_ATTENTION"), f"2q9s9 heads=4/2 head_size=64 attn={attn}")
        made = the_call(state, "TritonAttentionMetadataBuilder.__init__").kv_cache_spec
        assert type(made).__name__ == kind
        assert (made.block_size, made.num_kv_heads, made.head_size) == (16, 2, 64)
        assert made.dtype is torch.bfloat16
        before = len(state.names("TritonAttentionMetadataBuilder.__init__"))
        run.builder.build(0, run.batch.metadata)
        assert len(state.names("TritonAttentionMetadataBuilder.__init__")) == before


@pytest.mark.parametrize("version", VERSIONS)
def test_latents_are_scaled_unless_the_scale_is_one(install: Install, version: str) -> None:
    state = install(version)
    run = Run(vllm_backend("TRITON_MLA"), f"{MLA_WORKLOADS['decode, fp8']} block=64")
    batch, name = run.batch, "MLAAttentionImpl.do_kv_cache_update"
    for scale in (0.25, 1.0):
        batch.layer._k_scale.fill_(scale)
        batch.layer._k_scale_float = scale
        run.impl.do_kv_cache_update(
            batch.layer, batch.key, batch.value, run.kv_cache, batch.metadata.slot_mapping
        )
        asked = the_call(state, name)
        assert float(asked.k_scale) == scale
        if hasattr(asked, "skip_scale"):
            assert asked.skip_scale == (scale == 1.0)
    plain = Run(vllm_backend("TRITON_MLA"), MLA_WORKLOADS["decode"])
    assert plain.check().ok
    assert not getattr(the_call(state, name), "skip_scale", False)
