"""What a captured graph runs: the metadata an engine captures with, filled anew for each step.

FLASH_ATTN through the recorded library, which refuses a schedule made for other lengths; each call
is a kernel on the simulated device, named and timed by the splits it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from attnbench.backends import triton_attn_launch
from attnbench.backends.batch import make_batch
from attnbench.backends.builder import AttentionCGSupport
from attnbench.backends.check import check_output
from attnbench.backends.cpu_attn_metadata import CPUAttentionMetadataBuilder
from attnbench.backends.flash_attn import GRAPH_MAX_NUM_SPLITS, FlashAttentionMetadataBuilder
from attnbench.backends.flash_attn_kernels import VllmKernels
from attnbench.backends.reference import reference_attention
from attnbench.errors import SelectionError
from attnbench.measure import point as point_room
from attnbench.measure.plan import PlannedPoint
from attnbench.measure.prepare import prepare
from attnbench.store.record import Metric, Status
from attnbench.workload import Workload
from tests.backends.flash_attn import fake_library
from tests.backends.flash_attn.conftest import forget, write_on_the_cpu
from tests.measure.gpu.simulated import SimulatedGpu
from tests.measure.gpu.test_gpu_point import measured

DECODE = Workload.parse("3q1s70 heads=4/2 head_size=64")
KERNEL = "flash::FlashAttnFwdSm90 splits {}"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    """A device on which FA3 takes 20 µs, and 10 with a bound on its splits."""
    found = SimulatedGpu()
    forget()
    fake_library.install(monkeypatch, "vllm-0.22.1")
    monkeypatch.setattr(triton_attn_launch, "write_kv_launch", write_on_the_cpu)
    monkeypatch.setattr(point_room, "refusals", lambda *_: [])
    paged = VllmKernels.paged

    def launched(
        self: VllmKernels,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        output: torch.Tensor,
        metadata: Any,
        *rest: Any,
    ) -> None:
        splits = metadata.max_num_splits

        def run() -> None:
            paged(self, query, key_cache, value_cache, output, metadata, *rest)

        data = {f"kv-{key_cache.data_ptr()}": 10_000_000}
        seconds = 10e-6 if splits else 20e-6
        found.kernel(KERNEL.format(splits), seconds, data=data, effect=run)

    monkeypatch.setattr(VllmKernels, "paged", launched)
    yield found
    forget()


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each metadata was built, in order."""
    calls: list[str] = []

    def count(name: str) -> None:
        real: Callable[..., Any] = getattr(FlashAttentionMetadataBuilder, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(FlashAttentionMetadataBuilder, name, counted)

    count("build")
    count("build_for_cudagraph_capture")
    return calls


@pytest.mark.parametrize(
    ("timer", "way", "splits", "seconds"),
    [
        ("graph", "build_for_cudagraph_capture", GRAPH_MAX_NUM_SPLITS, 10e-6),
        ("event", "build", 0, 20e-6),
        ("cupti_span", "build", 0, 20e-6),
    ],
)
def test_each_execution_is_timed_with_its_own_metadata(
    gpu: SimulatedGpu, builds: list[str], timer: str, way: str, splits: int, seconds: float
) -> None:
    rows = {
        row.metric: row
        for row in measured(gpu, timer, ("hot",), DECODE, "FLASH_ATTN", variant="FA3")
    }
    row = rows[Metric.ATTENTION]
    assert row.status == Status.OK, row.reasons
    assert row.samples == pytest.approx([seconds] * len(row.samples), abs=2e-6)
    if timer != "event":
        assert row.kernel_names == (KERNEL.format(splits),)
    assert set(builds) == {way}
    # Beside the first one, those that were timed: other work for a graph, and another series.
    metadata = rows[Metric.METADATA_BUILD]
    assert len(builds) > len(metadata.samples) > 1
    assert (metadata.timer, metadata.execution) == ("wall", row.execution)
    assert row.execution == ("graph" if timer == "graph" else "eager")


def test_the_copies_of_a_rotation_have_schedules_of_their_own(
    gpu: SimulatedGpu, builds: list[str]
) -> None:
    # Small enough a cache that a few copies rotate.
    gpu.l2_bytes = 100_000
    row = measured(gpu, "graph", ("cold",), DECODE, "FLASH_ATTN", variant="FA3")[0]
    assert (row.status, row.l2_state) == (Status.OK, "cold"), row.reasons
    point = prepare(PlannedPoint(DECODE, "FLASH_ATTN", "FA3"), make_batch(DECODE), True)
    twin: Any = point.twin()
    mine: Any = point
    schedules = [one.metadata.scheduler_metadata for one in (mine, twin)]
    assert torch.equal(*schedules)
    assert schedules[0].data_ptr() != schedules[1].data_ptr()
    assert twin.metadata.block_table.data_ptr() != mine.metadata.block_table.data_ptr()


def test_a_replay_runs_the_step_that_was_built_last(gpu: SimulatedGpu) -> None:
    """Other lengths in the engine's tensors, a build, a replay: no new capture."""
    with torch.no_grad():
        batch = make_batch(DECODE)
        point: Any = prepare(PlannedPoint(DECODE, "FLASH_ATTN", "FA3"), batch, True)
        captured = point.metadata
        graph = gpu.capture(point.attend)
        shorter = make_batch(Workload.parse("3q1s66 heads=4/2 head_size=64"))
        following: Any = prepare(PlannedPoint(DECODE, "FLASH_ATTN", "FA3"), shorter)
        # What the graph reads: the engine's tensors keep their places, too.
        point.kv_cache.copy_(following.kv_cache)
        batch.query.copy_(shorter.query)
        for name in ("seq_lens", "block_table_tensor", "query_start_loc"):
            getattr(batch.metadata, name).copy_(getattr(shorter.metadata, name))
        step = shorter.metadata.replace(
            seq_lens=batch.metadata.seq_lens,
            block_table_tensor=batch.metadata.block_table_tensor,
            query_start_loc=batch.metadata.query_start_loc,
            max_seq_len=batch.metadata.max_seq_len,  # fixed when it was captured
        )
        with pytest.raises(RuntimeError, match="made for another call"):
            graph.replay()
        point.batch.metadata = step
        point.build_metadata()
        assert point.metadata.scheduler_metadata.data_ptr() == (
            captured.scheduler_metadata.data_ptr()
        )
        point.poison()
        graph.replay()
        found = check_output(point.output(), reference_attention(shorter), "bf16", "bf16")
        assert found.ok, found.reason


def test_a_graph_has_no_pass_for_a_shared_prefix(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def ask(*arguments: object) -> bool:
        asked.append(arguments)
        return False

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "use_cascade_attention", ask)
    planned = PlannedPoint(DECODE.replace(common_prefix_len=32), "FLASH_ATTN", "FA3")
    prepare(planned, make_batch(planned.workload), True)
    assert asked == []
    prepare(planned, make_batch(planned.workload))
    assert len(asked) == 1


NEVER, SINGLE, UNIFORM, ALWAYS = sorted(AttentionCGSupport)


@pytest.mark.parametrize(
    ("batch", "support", "words"),
    [
        ("3q1s40", NEVER, "graphs of no batches, this one has 1 new"),
        ("3q1s40", SINGLE, ""),
        ("3q4s40", SINGLE, "one new token per request only, this one has 4 new tokens"),
        ("3q4s40", UNIFORM, ""),
        ("q1s40_q4s40", UNIFORM, "one query length only, this one has 1 to 4 new tokens"),
        ("q1s40_q4s40", SINGLE, "one new token per request only, this one has 1 to 4"),
        ("q1s40_q4s40", ALWAYS, ""),
    ],
)
def test_a_batch_no_engine_captures_is_unsupported_by_graph_and_by_no_other_timer(
    monkeypatch: pytest.MonkeyPatch, batch: str, support: AttentionCGSupport, words: str
) -> None:
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "_cudagraph_support", support)
    workload = Workload.parse(f"{batch} heads=4/2 head_size=32 dtype=fp32")
    made = make_batch(workload)
    planned = PlannedPoint(workload, "CPU_ATTN")
    prepare(planned, made)
    if not words:
        prepare(planned, made, for_graph=True)
        return
    with pytest.raises(SelectionError, match=words):
        prepare(planned, made, for_graph=True)
    (row,) = measured(SimulatedGpu(), "graph", workload=workload)
    assert (row.status, row.execution, row.timer) == (Status.UNSUPPORTED, "graph", "graph")
    assert words in row.reasons[0]
    assert row.reasons[0].startswith("CPU_ATTN builds metadata for CUDA graphs of ")
    assert row.reasons[0].endswith("; use --timer event")
