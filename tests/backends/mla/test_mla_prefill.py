"""The expanded form: which keys each call sees, and long contexts cut and merged."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from attnbench.backends import mla_prefill
from attnbench.backends.device import Device, cuda_device
from attnbench.backends.flash_attn_library import LIBRARIES
from attnbench.backends.metadata import CommonAttentionMetadata
from attnbench.backends.mla_prefill import PrefillChunk, plan_chunks
from attnbench.backends.mla_prefill_library import (
    PREFILLS,
    default_prefill,
    prefill_refusal,
    takes_widths,
    usual_prefills,
)
from tests.backends.flash_attn import fake_library as flash_attn
from tests.backends.mla.cases import BACKENDS
from tests.backends.mla.conftest import Install
from tests.backends.mla.test_mla_libraries import PREFILL, check_with_lse
from tests.backends.mla.workloads import SMALL
from tests.backends.running import Run

BLOCK = 64


def common_of(requests: list[tuple[int, int]]) -> CommonAttentionMetadata:
    """Requests of (new tokens, context), each in blocks of its own: block `100 * request + n`."""
    query_lens = torch.tensor([query_len for query_len, _ in requests])
    seq_lens = torch.tensor([query_len + context for query_len, context in requests])
    starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
    starts[1:] = query_lens.cumsum(0)
    blocks = -(-int(seq_lens.max()) // BLOCK)
    table = torch.arange(len(requests))[:, None] * 10_000 + torch.arange(blocks)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(torch.int32),
        seq_lens_cpu=seq_lens.to(torch.int32),
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table.to(torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
    )


def keys_of(chunk: PrefillChunk) -> list[tuple[int, int]]:
    """(request, position) of every key a chunk reads from the cache."""
    assert chunk.key_block is not None
    assert chunk.key_slot is not None
    position = chunk.key_block % 10_000 * BLOCK + chunk.key_slot
    return list(zip((chunk.key_block // 10_000).tolist(), position.tolist(), strict=True))


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.sampled_from([0, 0, 1, 63, 64, 65, 200, 700])),
        min_size=1,
        max_size=5,
    ),
    num_decodes=st.integers(0, 4),
    limit=st.sampled_from([10, 64, 100, 192, 400, 10_000]),
)
def test_every_query_sees_each_of_its_keys_once(
    requests: list[tuple[int, int]], num_decodes: int, limit: int
) -> None:
    num_decodes = min(num_decodes, len(requests) - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_prefill, "CHUNK_TOKENS", limit)
        common = common_of(requests)
        chunks = plan_chunks(common, num_decodes, BLOCK)
    starts = (common.query_start_loc_cpu - common.query_start_loc_cpu[num_decodes]).tolist()
    request = num_decodes
    for chunk in chunks:
        count = len(chunk.query_start_loc) - 1
        assert chunk.tokens == slice(starts[request], starts[request + count])
        members = range(request, request + count)
        lens = [requests[r] for r in members]
        assert chunk.query_start_loc.diff().tolist() == [query_len for query_len, _ in lens]
        assert chunk.max_query_len == max(query_len for query_len, _ in lens)
        assert chunk.causal
        every = [(r, n) for r in members for n in range(sum(requests[r]))]
        for part in (chunk, *chunk.context):
            assert part.max_seq_len == int(part.key_start_loc.diff().max())
            assert part.query_start_loc.dtype is part.key_start_loc.dtype is torch.int32
        if chunk.context:
            query_len, context = lens[0]
            assert count == 1
            assert query_len + context > limit
            assert chunk.key_block is None
            assert chunk.key_start_loc.tolist() == [0, query_len]
            seen = []
            for part in chunk.context:
                assert not part.causal
                assert part.tokens == chunk.tokens
                assert part.key_start_loc.tolist() == [0, len(keys_of(part))]
                assert len(keys_of(part)) <= max(limit, BLOCK)
                seen += keys_of(part)
            assert seen == every[:context]
            # As vLLM rounds: every part but the last is whole blocks.
            assert all(len(keys_of(p)) % BLOCK == 0 for p, _ in pairwise(chunk.context))
        else:
            assert chunk.key_start_loc.diff().tolist() == [sum(of) for of in lens]
            assert count == 1 or chunk.key_start_loc[-1] <= limit
            if any(context for _, context in lens):
                assert keys_of(chunk) == every
            else:
                assert chunk.key_block is None
        request += count
    assert request == len(requests)


def test_vllm_s_workspace_is_the_limit_and_new_tokens_are_not_cut() -> None:
    limit = 64 * 1024
    (chunk,) = plan_chunks(common_of([(100, limit - 100)]), 0, BLOCK)
    assert chunk.context == ()
    (chunk,) = plan_chunks(common_of([(101, limit - 100)]), 0, BLOCK)
    assert [part.max_seq_len for part in chunk.context] == [limit - 100]
    (chunk,) = plan_chunks(common_of([(1, 2 * limit + 5)]), 0, BLOCK)
    assert [part.max_seq_len for part in chunk.context] == [limit, limit, 5]
    (chunk,) = plan_chunks(common_of([(limit + 1, 0)]), 0, BLOCK)
    assert chunk.context == ()
    assert chunk.key_block is None


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("several parts", f"q150s650 {SMALL}"),
        ("one part", f"q150s340 {SMALL}"),
        ("among others", f"q1s70_q140_q150s650_q130s190_q135s900 {SMALL}"),
        ("fp16", f"q150s650 {SMALL} dtype=fp16"),
        ("fp8", f"q150s650 {SMALL} kv=fp8_e4m3"),
        ("other widths", "q150s650 heads=2/1 mla=512+64:16+24"),
    ],
)
def test_a_context_cut_and_merged_is_the_whole(
    install: Install, monkeypatch: pytest.MonkeyPatch, name: str, text: str, prefill: str
) -> None:
    calls = install(PREFILL)
    install("vllm-0.22.1 flashmla")
    monkeypatch.setattr(mla_prefill, "CHUNK_TOKENS", 200)
    run = Run(BACKENDS["FLASHMLA"], f"{text} block={BLOCK}", f"VLLM+{prefill}")
    assert check_with_lse(run) == ""
    cut = [chunk for chunk in run.metadata.prefill if chunk.context]
    assert len(cut) == (2 if name == "among others" else 1)
    context = [call.arguments for call in calls if not call.arguments.causal]
    assert len(context) == sum(len(chunk.context) for chunk in cut)
    assert all(a.max_seqlen_k <= 192 for a in context)
    assert {a.return_softmax_lse for a in context} == {True}
    # Where nothing is merged the library writes the output itself, if it takes the widths.
    whole = [call for call in calls if not call.arguments.return_softmax_lse]
    assert all(("out" in call.given) == (prefill != "FA2") for call in whole)


@pytest.mark.parametrize(
    ("variant", "qk", "v", "takes"),
    [
        ("FA3", 192, 128, True),
        ("FA3", 136, 104, True),
        ("FA3", 192, 96, False),
        ("FA3", 192, 136, False),
        ("FA3", 128, 104, False),
        ("FA3", 200, 128, False),
        ("FA3", 64, 512, True),
        ("FA3", 72, 64, False),
        ("FA3", 256, 256, True),
        ("FA2", 192, 192, True),
        ("FA2", 192, 128, False),
        ("FA2", 64, 512, False),
        ("FA4", 192, 128, True),
        ("FA4", 24, 16, True),
    ],
)
def test_value_widths_a_library_has_kernels_for(variant: str, qk: int, v: int, takes: bool) -> None:
    """FA3: Q/K in (128, 192] with V in (96, 128], or Q/K up to 64 with V up to 512
    (hopper/flash_api.cpp)."""
    assert takes_widths(LIBRARIES[variant], qk, v) is takes


SM90, SM100 = cuda_device(9, 0), cuda_device(10, 0)


@pytest.mark.parametrize(
    ("device", "widths", "variant"),
    [
        (cuda_device(8, 0), (192, 128), "FA2"),
        (SM90, (192, 128), "FA3"),
        (SM90, (256, 256), "FA3"),
        (SM100, (192, 128), "FA4"),
        (cuda_device(10, 3), (192, 128), "FA4"),
        (SM100, (96, 64), "FA4"),
        (SM100, (160, 128), "FA2"),  # vLLM's fallback, of the keys' width
        (SM100, (192, 96), "FA2"),
        (cuda_device(11, 0), (192, 128), "FA2"),
        (cuda_device(12, 0), (192, 128), "FA2"),
        (Device("cpu"), (192, 128), "FA2"),
    ],
)
def test_the_library_a_device_gets_unless_another_is_named(
    device: Device, widths: tuple[int, int], variant: str
) -> None:
    assert default_prefill(device, *widths) == variant
    assert variant in usual_prefills(device)
    assert usual_prefills(device)[0] == default_prefill(device, 192, 128)


@pytest.mark.parametrize(
    ("device", "widths", "takes"),
    [
        (SM90, (192, 128), True),
        (SM90, (192, 96), True),
        (SM90, (512, 512), True),
        (SM90, (576, 512), False),
        (SM90, (196, 128), False),
        (SM100, (192, 128), True),
        (SM100, (128, 64), True),
        (SM100, (256, 256), True),
        (SM100, (192, 192), False),
        (SM100, (160, 128), False),
        (SM100, (136, 136), False),
    ],
)
def test_widths_fa4_has_kernels_for(device: Device, widths: tuple[int, int], takes: bool) -> None:
    """flash_attn/cute/interface.py of vLLM 0.22.1's wheel: _validate_head_dims."""
    reason = prefill_refusal("FA4", device, *widths)
    assert (reason is None) is takes
    assert reason is None or "ask for +FA2" in reason


@pytest.mark.parametrize(
    ("major", "text"), [(9, "q150s650 heads=2/1 mla=512+64:128+96"), (10, f"q150s650 {SMALL}")]
)
def test_fa4_is_given_values_of_their_own_width(
    monkeypatch: pytest.MonkeyPatch, install: Install, major: int, text: str
) -> None:
    calls = install(PREFILL)
    install("vllm-0.22.1 flashmla")
    monkeypatch.setitem(flash_attn.ARCH, "major", major)
    run = Run(BACKENDS["FLASHMLA"], f"{text} block={BLOCK}", "VLLM+FA4")
    assert check_with_lse(run) == ""
    (call,) = calls
    assert (call.arguments.q.shape[-1], call.arguments.v.shape[-1]) in ((192, 96), (192, 128))
    assert call.arguments.fa_version == 4
