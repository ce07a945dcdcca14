"""What a captured graph reads is filled anew by the next build, where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.backends.mla.cases import BACKENDS
from tests.backends.mla.conftest import Install
from tests.backends.mla.test_mla_libraries import PREFILL, put
from tests.backends.mla.workloads import SMALL
from tests.backends.running import Run


def _schedule(metadata: Any) -> tuple[torch.Tensor, ...]:
    schedule = metadata.decode.schedule
    return schedule if isinstance(schedule, tuple) else (schedule,)


def _table(metadata: Any) -> tuple[torch.Tensor, ...]:
    return (metadata.decode.block_table,)


@pytest.mark.parametrize(
    ("record", "backend", "variant", "more", "kept"),
    [
        ("vllm-0.22.1 flashmla", "FLASHMLA", "VLLM", "block=64 kv=fp8_e4m3", _schedule),
        (PREFILL, "FLASH_ATTN_MLA", "FA3", "", _schedule),
        # 70 tokens are three blocks, which the kernel wants to be four.
        ("flashinfer-0.6.11.post2", "FLASHINFER_MLA", "TRTLLM_GEN", "block=32", _table),
    ],
)
def test_the_next_build_fills_the_same_memory(
    install: Install,
    record: str,
    backend: str,
    variant: str,
    more: str,
    kept: Callable[[Any], tuple[torch.Tensor, ...]],
) -> None:
    put(install, record)
    run = Run(BACKENDS[backend], f"3q1s70 {SMALL} {more}", variant)
    common = run.batch.metadata
    captured = kept(run.builder.build_for_cudagraph_capture(common))
    before = [tensor.clone() for tensor in captured]
    # Another step, in the engine's own tensors.
    common.seq_lens -= 3
    if common.seq_lens_cpu is not None:
        common.seq_lens_cpu -= 3
    common.block_table_tensor.copy_(common.block_table_tensor.flip(0))
    eager = kept(run.builder.build(0, common))
    fresh: Any = type(run.builder)(run.batch.spec, ["layers.0.attn"], run.batch.device, variant)
    wanted = kept(fresh.build_for_cudagraph_capture(common))
    assert all(torch.equal(a, b) for a, b in zip(captured, before, strict=True))
    again = kept(run.builder.build_for_cudagraph_capture(common))
    for tensor, next_one, other, right in zip(captured, again, eager, wanted, strict=True):
        assert next_one.data_ptr() == tensor.data_ptr() != other.data_ptr()
        assert torch.equal(tensor, right)


def test_flashinfer_s_graph_wrapper_is_planned_in_its_own_tables(install: Install) -> None:
    calls = put(install, "flashinfer-0.6.11.post2")
    run = Run(BACKENDS["FLASHINFER_MLA"], f"3q1s70 {SMALL} block=32", "FA2")
    common = run.batch.metadata
    captured = run.builder.build_for_cudagraph_capture(common)
    made = [c.arguments for c in calls if c.name.endswith("__init__")]
    assert [m.use_cuda_graph for m in made] == [False, True]
    table = made[1].kv_indices
    assert (table.dtype, len(table)) == (torch.int32, common.block_table_tensor.numel())
    assert [len(made[1].qo_indptr), len(made[1].kv_indptr), len(made[1].kv_len_arr)] == [4, 4, 3]
    again = run.builder.build_for_cudagraph_capture(common)
    assert again.decode.plan.wrapper is captured.decode.plan.wrapper
    # What is built for no graph, meanwhile or later, has a wrapper of its own.
    assert run.builder.build(0, common).decode.plan.wrapper is not captured.decode.plan.wrapper
    del captured, again
    assert run.builder.build(0, common).decode.plan.wrapper is not made[1].self
