"""FLEX_ATTENTION: masks and block lists for many workloads without compiling, a few compiled runs.

Uncompiled, torch computes flex_attention densely from the mask and score functions alone; compiled,
it reads only the blocks that the block mask lists. So both are tested, and their agreement.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnbench.backends import flex_attention, flex_metadata
from attnbench.backends.device import Device
from attnbench.backends.flex_attention import FlexAttentionBackend
from attnbench.backends.flex_blocks import kernel_tile, query_block_rows
from attnbench.backends.kv_cache import HIDDEN_POISON
from attnbench.backends.registry import backend_status
from attnbench.workload import Workload
from tests.backends.running import CPU, Run, config_of, refusals
from tests.backends.test_torch_backends import SMALL, WORKLOADS

# torch's compiler itself uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BF16 = "heads=4/2 head_size=64"
ACCEPTED = {
    name: text
    for name, text in WORKLOADS.items()
    if not any(word in text for word in ("sinks=", "HND", "kv=", "encoder"))
    or "encoder_decoder" in text
}
DENSE = [
    "decode, ragged",
    "decode, MQA",
    "decode, wide values",
    "decode, soft cap",
    "decode, ALiBi",
    "decode, bf16",
    "speculative, window",
    "prefill, ALiBi",
    "extend, window",
    "mixed",
    "cross",
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call without a compiler: dense, from the mask and score functions."""

    def captured(*key: Any) -> Callable[..., torch.Tensor]:
        function: Callable[..., torch.Tensor] = torch.compile(
            flex_attention._attend, backend="eager", dynamic=True, fullgraph=True
        )
        return function

    monkeypatch.setattr(flex_attention, "_compiled", captured)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    assert refusals(FlexAttentionBackend, ACCEPTED[name]) == []


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.usefixtures("uncompiled")
def test_mask_and_score_functions(name: str) -> None:
    run = Run(FlexAttentionBackend, ACCEPTED[name])
    # The dense form multiplies every slot by a weight, those of other requests by zero.
    run.kv_cache.nan_to_num_(HIDDEN_POISON)
    result = run.check()
    assert result.ok, result.reason


@pytest.mark.parametrize(
    "text",
    [
        *(ACCEPTED[name] for name in ACCEPTED if "ALiBi" not in name),
        f"33q1s20_q70s100_2q40 {SMALL} block=8",
        f"q70s100_q33_2q3s90 {SMALL} window=37 block=8",
        f"3q40s64 {SMALL} prefix=16",
        f"q64s64_q64s128 {SMALL} attn=encoder_decoder",
    ],
)
def test_block_lists_agree_with_the_mask(text: str) -> None:
    """Every visible slot is in a listed block, fully listed blocks hide nothing, none is twice."""
    assert_lists_agree_with_the_mask(Run(FlexAttentionBackend, text))


def assert_lists_agree_with_the_mask(run: Run) -> None:
    mask = run.metadata.block_mask
    num_tokens, (rows, width) = len(run.batch.query), mask.BLOCK_SIZE
    slots = torch.arange(run.metadata.num_blocks * width)
    tokens = torch.arange(num_tokens)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), tokens[:, None], slots[None])
    assert int(seen.sum(1).min()) >= 1
    for i, first in enumerate(range(0, num_tokens, rows)):
        partial = mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]].tolist()
        full = mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].tolist()
        assert len({*partial, *full}) == len(partial) + len(full)
        blocks = seen[first : first + rows].unflatten(1, (-1, width))
        needed = set(blocks.any(2).any(0).nonzero().flatten().tolist())
        assert needed == {*partial, *full}
        assert all(bool(blocks[:, block].all()) for block in full)


GPU_TEXTS = [
    f"33q1s20_q70s100_2q40 {SMALL} block=16",
    f"q70s100_q33_2q3s90 {SMALL} window=37 block=32",
    f"q150_q1s40 {SMALL} block=16",
    f"17q1s200 {SMALL} block=48",
]


@pytest.mark.parametrize("text", GPU_TEXTS)
@pytest.mark.usefixtures("uncompiled")
def test_the_mask_of_a_gpu(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Its blocks of queries are larger: the same pages, and the right output over them."""
    rows = {0: 0}

    def as_on_a_gpu(max_query_len: int, device_type: str) -> int:
        rows[0] = query_block_rows(max_query_len, "cuda")
        return rows[0]

    monkeypatch.setattr(flex_metadata, "query_block_rows", as_on_a_gpu)
    run = Run(FlexAttentionBackend, text)
    assert (rows[0], run.workload.block_size) == run.metadata.block_mask.BLOCK_SIZE
    assert_lists_agree_with_the_mask(run)
    run.kv_cache.nan_to_num_(HIDDEN_POISON)
    result = run.check()
    assert result.ok, result.reason


def test_blocks_of_queries_by_the_longest_one() -> None:
    assert [query_block_rows(n, "cpu") for n in (1, 2, 4096)] == [1, 32, 32]
    assert [query_block_rows(n, "cuda") for n in (1, 2, 127, 128, 4096)] == [16, 32, 32, 128, 128]
    # What is compiled for tells them apart.
    sm90 = Device("cuda", "sm90")
    keys = [
        FlexAttentionBackend.compilation_key(Workload.parse(f"{spec} {SMALL}"), "", sm90)
        for spec in ("2q1s40", "2q4s40", "2q40", "2q130")
    ]
    assert len(set(keys)) == 3
    assert keys[1] == keys[2]


@pytest.mark.parametrize(
    ("mask_block", "head_size", "dtype", "tile"),
    [
        ((16, 16), 128, torch.bfloat16, (16, 16)),
        ((32, 16), 128, torch.bfloat16, (32, 16)),
        ((128, 16), 128, torch.bfloat16, (128, 16)),
        ((128, 64), 128, torch.bfloat16, (128, 64)),
        ((128, 256), 128, torch.bfloat16, (128, 64)),
        ((128, 48), 128, torch.bfloat16, (128, 16)),
        ((128, 256), 128, torch.float32, (64, 32)),
        ((128, 256), 256, torch.bfloat16, (64, 32)),
        ((128, 256), 512, torch.bfloat16, (32, 32)),
        ((16, 256), 512, torch.bfloat16, (16, 32)),
    ],
)
def test_a_gpu_tile_divides_the_mask_s_block(
    mask_block: tuple[int, int], head_size: int, dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    assert kernel_tile(mask_block, head_size, dtype.itemsize) == tile
    assert [block % size for block, size in zip(mask_block, tile, strict=True)] == [0, 0]


def test_off_the_cpu_it_asks_for_the_one_kernel_it_promises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def seen(query: torch.Tensor, *_: Any, kernel_options: Any, **__: Any) -> torch.Tensor:
        asked.append(kernel_options)
        return query

    monkeypatch.setattr(flex_attention, "flex_attention", seen)
    mask = Run(FlexAttentionBackend, f"3q1s70 {SMALL}").metadata.block_mask
    mask.BLOCK_SIZE = (16, 64)
    for where in ("cpu", "meta"):
        x = torch.empty((1, 4, 2, 128), dtype=torch.bfloat16, device=where)
        flex_attention._attend(x, x, x, None, mask, 1.0)
    assert asked == [None, {"BACKEND": "TRITON", "BLOCK_M": 16, "BLOCK_N": 64}]
    for device, promised in ((Device("cuda", "sm90"), 1), (Device("rocm", "gfx942"), 1), (CPU, 0)):
        patterns = FlexAttentionBackend.kernel_patterns("", device)
        assert len(patterns) == promised
        for pattern in patterns:
            assert re.search(pattern, "triton_tem_fused_flex_attention_0")
            assert not re.search(pattern, "triton_per_fused__softmax_0")


def test_torch_told_not_to_compile_is_no_time_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sm90 = Device("cuda", "sm90")
    assert FlexAttentionBackend.unavailable_reason(sm90) is None
    with torch._dynamo.config.patch(disable=True):
        reason = FlexAttentionBackend.unavailable_reason(sm90)
    assert reason is not None
    assert "unset TORCHDYNAMO_DISABLE" in reason
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert FlexAttentionBackend.unavailable_reason(sm90) == reason


def test_an_error_of_the_compiler_is_an_error_although_torch_is_told_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `suppress_errors` torch runs what it could not compile, unfused."""

    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel")

    function = torch.compile(flex_attention._attend, backend=fails, dynamic=True)
    monkeypatch.setattr(flex_attention, "_compiled", lambda *key: function)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(torch._dynamo.exc.BackendCompilerFailed),
    ):
        Run(FlexAttentionBackend, f"3q1s70 {SMALL}").attend()


def test_a_prefill_has_full_blocks() -> None:
    """Else the mask function would run for every page: right, but slow."""
    mask = Run(FlexAttentionBackend, f"q96 {SMALL}").metadata.block_mask
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 2, 4]
    assert mask.kv_num_blocks[0, 0].tolist() == [2, 2, 2]


@pytest.mark.slow
def test_compiled_once_for_all_lengths() -> None:
    """Batches of every size share one compiled function: nothing here may fall back."""
    torch._dynamo.reset()
    flex_attention._compiled.cache_clear()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for spec in ("3q1s70", "q1", "q1s5_q1s130_2q1s33", "q1s16", "17q1s20"):
        result = Run(FlexAttentionBackend, f"{spec} {SMALL}").check()
        assert result.ok, f"{spec}: {result.reason}"
    assert graphs["unique_graphs"] - before == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts",
    [
        [f"q40_3q1s70_q20s60_q4s9 {SMALL}", f"3q40s64 {SMALL} prefix=16", f"q150 {SMALL}"],
        [f"q70s130_q33_2q3s90 {BF16} window=37 softcap=20 alibi=1 block=33 v_head_size=32"],
    ],
    ids=["mixed", "features"],
)
def test_compiled(texts: list[str]) -> None:
    for text in texts:
        result = Run(FlexAttentionBackend, text).check()
        assert result.ok, f"{text}: {result.reason}"


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_recompile_limit_is_an_error_and_never_a_fallback(
    monkeypatch: pytest.MonkeyPatch, fullgraph: bool
) -> None:
    """Of `fullgraph` alone, and of the setting alone: torch 2.13 takes either for an error."""
    function = torch.compile(
        flex_attention._attend, backend="eager", dynamic=True, fullgraph=fullgraph
    )
    monkeypatch.setattr(flex_attention, "_compiled", lambda *key: function)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        Run(FlexAttentionBackend, f"3q1s70 {SMALL}").attend()
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            Run(FlexAttentionBackend, f"3q1s70 {SMALL} block=32").attend()
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False


def test_refuses_what_it_cannot() -> None:
    text = f"2q40 {SMALL} sinks=1 layout=HND kv=bf16 attn=encoder_only"
    assert refusals(FlexAttentionBackend, text) == [
        "attention sinks not supported",
        "attention type encoder_only not supported",
        "kv_cache_layout HND not supported",
        "the KV cache must have the query's dtype",
    ]
    assert refusals(FlexAttentionBackend, f"2q40 {SMALL} kv=fp8_e4m3")[0] == (
        "kv_cache_dtype not supported"
    )
    small_blocks = config_of(Workload.parse(f"2q40 {SMALL} block=8"))
    gpu = Device("cuda", "sm90")
    assert FlexAttentionBackend.validate_configuration(small_blocks, gpu) == [
        "block_size must be a multiple of 16 on this device"
    ]


def test_says_which_compiler_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    status = backend_status.__wrapped__  # its answer is kept for the life of the process
    reason = status("FLEX_ATTENTION", Device("cpu"))
    assert reason is not None
    assert "'no-such-compiler' does not work; install one (apt-get install g++)" in reason
    # Its other users generate code for their GPU, not C++.
    assert status("FLEX_ATTENTION", Device("cuda", "sm90")) is None
