"""Steps fed by their own output: the map, the tokens, the blocks, and a chain done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from attnbench.backends.batch import AttentionBatch, make_batch
from attnbench.backends.decode_steps import DecodeSteps, FixedMap, project
from attnbench.backends.paging import NULL_BLOCK
from attnbench.backends.reference import reference_attention
from attnbench.errors import WorkloadError
from attnbench.workload import Workload

PLAIN = Workload.parse("2q1s30_q19 heads=4/2 head_size=32 dtype=fp32")
CASES = [
    "2q1s30_q19 heads=4/2 head_size=32 dtype=fp32",
    "2q1s30_q19 heads=4/2 head_size=32 window=12 softcap=20 sinks=1 kv=fp8_e4m3",
    "3q1s33 heads=4/2 head_size=64 v_head_size=32 alibi=1 dtype=fp16 block=8",
    "2q1s48_q2s40 heads=4/4 head_size=32 prefix=32",
    "q70_2q1s40 heads=4/1 mla=64+32:32+48 dtype=fp32",
]


@pytest.mark.parametrize(("size", "block"), [(64, 16), (96, 32), (48, 48)])
def test_a_fixed_map_is_orthogonal_and_mixes(size: int, block: int) -> None:
    fixed = FixedMap("key 0", size, block)
    matrix = fixed(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    # Every number of the input reaches a whole block, none has all the weight.
    assert float(matrix.abs().max()) < 0.95
    assert torch.equal(matrix, FixedMap("key 0", size, block)(torch.eye(size).double()))
    assert not torch.allclose(matrix, FixedMap("value 0", size, block)(torch.eye(size).double()))


def test_projections_keep_lengths_whatever_the_size() -> None:
    x = torch.randn((5, 96), dtype=torch.float64)
    same = project(x, "query", 96, 32)
    assert torch.allclose(same.norm(dim=1), x.norm(dim=1))
    twice = project(x, "query", 192, 32)
    assert torch.allclose(twice[:, :96], same)
    assert torch.allclose(twice[:, 96:].norm(dim=1), x.norm(dim=1))
    assert project(x, "key", 40, 32).shape == (5, 40)


@pytest.mark.parametrize("text", CASES)
def test_a_step_appends_one_token_and_keeps_the_rest(text: str) -> None:
    workload = Workload.parse(text)
    batch = make_batch(workload)
    steps = DecodeSteps(batch, 3)
    made = [steps.first]
    for _ in range(3):
        output = reference_attention(made[-1]).output
        made.append(steps.feed(output))
    for number, step in enumerate(made[1:], 1):
        for index, request in enumerate(workload.requests):
            length = request.seq_len
            assert (step.requests[index].query_len, step.requests[index].seq_len) == (
                1,
                length + number,
            )
            for old, new in zip(
                batch.keys_values(index, 0, length), step.keys_values(index, 0, length), strict=True
            ):
                assert torch.equal(old, new)
            # The tokens fed in earlier steps are where they were put.
            for earlier in range(1, number + 1):
                at = length + earlier - 1
                key, value = step.keys_values(index, at, at + 1)
                assert torch.equal(key[0], made[earlier].key[index])
                assert torch.equal(value[0], made[earlier].value[index])
        assert step.query.dtype == batch.query.dtype
        assert step.metadata.seq_lens.tolist() == [r.seq_len + number for r in workload.requests]
        assert bool(torch.isfinite(step.query.float()).all())


@pytest.mark.parametrize("text", CASES)
def test_blocks_are_given_when_needed_and_are_nobody_elses(text: str) -> None:
    workload = Workload.parse(text)
    batch = make_batch(workload)
    count = 2 * workload.block_size + 1
    steps = DecodeSteps(batch, count)
    size = workload.block_size
    assert steps.first.num_blocks == batch.num_blocks + len(steps.fresh_blocks)
    assert set(steps.fresh_blocks.tolist()) == set(range(batch.num_blocks, steps.first.num_blocks))
    output = torch.randn(batch.query.shape[0], batch.shape.num_heads, batch.shape.v_head_size)
    seen: list[int] = []
    for _ in range(count):
        step = steps.feed(output)
        output = torch.randn(len(step.requests), batch.shape.num_heads, batch.shape.v_head_size)
        table = step.metadata.block_table_tensor
        for row, request in enumerate(step.requests):
            used = -(-request.seq_len // size)
            assert NULL_BLOCK not in table[row, :used].tolist()
            assert set(table[row, used:].tolist()) <= {NULL_BLOCK}
            at = request.seq_len - 1
            slot = int(table[row, at // size]) * size + at % size
            assert slot == int(step.metadata.slot_mapping[row])
            seen.append(slot)
    assert len(seen) == len(set(seen)), "two tokens were given one slot"


def test_the_next_token_is_what_the_definition_says() -> None:
    """The first step by hand, from the definition: RMS, map, rounding; needles lean, so the query
    is compared on what the chain adds to it."""
    batch = make_batch(PLAIN)
    output = reference_attention(batch).output
    step = DecodeSteps(batch, 1).feed(output)
    for index, last in enumerate((0, 1, 20)):
        x = output[last].reshape(1, -1)
        x = x / x.square().mean().sqrt()
        fixed = FixedMap("key 0", x.shape[1], 32)
        key = fixed(x)[0, : 2 * 32].float().view(2, 32)
        assert torch.equal(step.key[index], key)
        assert math.isclose(float(key.double().square().mean()), 1.0, rel_tol=0.5)


def test_equal_outputs_give_equal_tokens_and_other_outputs_others() -> None:
    batch = make_batch(PLAIN)
    output = reference_attention(batch).output
    one, same = (DecodeSteps(batch, 1).feed(output) for _ in range(2))
    other = DecodeSteps(batch, 1).feed(output + 1e-3 * output.roll(1, 0))
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_the_order_of_requests_changes_no_token() -> None:
    """MLA backends put short requests first; each request's tokens stay its own."""
    workload = Workload.parse("q9_2q1s40 heads=4/1 mla=64+32:32+48 dtype=fp32")

    def second_step(batch: AttentionBatch) -> AttentionBatch:
        steps = DecodeSteps(batch, 2)
        return steps.feed(reference_attention(steps.feed(reference_attention(batch).output)).output)

    plain, reordered = (
        second_step(make_batch(workload)),
        second_step(make_batch(workload, "cpu", 1)),
    )
    assert [r.seq_len for r in reordered.requests] == [42, 42, 11]
    for mine, theirs in ((0, 2), (1, 0), (2, 1)):
        for name in ("query", "key", "value"):
            assert torch.allclose(
                getattr(plain, name)[mine], getattr(reordered, name)[theirs], atol=1e-5
            )


def test_a_wrong_token_shows_in_the_next_step() -> None:
    """What the definition is for: queries lean towards the newest token and a random one."""
    batch = make_batch(PLAIN)
    step = DecodeSteps(batch, 1).feed(reference_attention(batch).output)
    right = reference_attention(step).output
    step.value.neg_()
    step.tokens.value_pool._fed.neg_()  # type: ignore[attr-defined]
    wrong = reference_attention(step).output
    error = (wrong - right).norm(dim=-1) / right.norm(dim=-1)
    assert float(error.min()) > 0.05


def test_only_decoders_generate() -> None:
    batch = make_batch(Workload.parse("2q16 heads=4/2 head_size=32 attn=encoder_only"))
    with pytest.raises(WorkloadError, match="--steps 0"):
        DecodeSteps(batch, 1)
