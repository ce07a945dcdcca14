"""The scheduler against a slow, plain one, and against what must hold for any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.step_clock import LinearStepSeconds, RecordedSeconds
from attnbench.traffic.types import Ints, StepBatches, Trace
from tests.traffic.oracle import Oracle
from tests.traffic.strategies import crowds, settings_for, traces

NONE: Ints = np.empty(0, dtype=np.int64)
MODEL = LinearStepSeconds(0.25, 0.03125, 0.0009765625)
EVEN = LinearStepSeconds(0.5, 0.0, 0.0)
"""Steps that end at the very times at which requests arrive."""


def make_trace(
    requests: list[tuple[float, int, int]],
    hash_ids: list[list[int]] | None = None,
    hash_block_tokens: int = 0,
) -> Trace:
    """Requests of (arrival, input tokens, output tokens)."""
    arrival, inputs, outputs = zip(*requests, strict=True)
    offsets = NONE
    if hash_ids is not None:
        offsets = np.cumsum([0, *(len(row) for row in hash_ids)]).astype(np.int64)
    return Trace(
        name="made",
        arrival_s=np.array(arrival, dtype=np.float64),
        input_tokens=np.array(inputs, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        hash_offsets=offsets,
        hash_ids=np.array([i for row in hash_ids or [] for i in row], dtype=np.int64),
        hash_block_tokens=hash_block_tokens,
    )


def entries(steps: StepBatches) -> list[list[tuple[int, ...]]]:
    """Of each step: (request, query length, context length, tokens produced)."""
    columns = (steps.request, steps.query_len, steps.context_len, steps.produces)
    return [
        list(zip(*(column[steps.entries_of(i)].tolist() for column in columns), strict=True))
        for i in range(len(steps))
    ]


@given(st.data())
@hypothesis_settings(max_examples=250, deadline=None)
def test_the_batches_are_those_of_the_plain_scheduler(data: st.DataObject) -> None:
    trace = data.draw(traces())
    settings = data.draw(settings_for(trace))
    same_as_plain(trace, settings, data.draw(st.sampled_from([MODEL, EVEN])))


@given(crowds(), st.sampled_from([MODEL, EVEN]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_they_are_too_where_the_cache_is_always_too_small(
    crowd: tuple[Trace, SchedulerSettings], model: LinearStepSeconds
) -> None:
    same_as_plain(*crowd, model)


def same_as_plain(trace: Trace, settings: SchedulerSettings, model: LinearStepSeconds) -> None:
    # The plain one has no unlimited cache: as many blocks as everything ever asks for.
    total = int((trace.input_tokens + trace.output_tokens + 8).sum())
    blocks = 4 * total if settings.num_gpu_blocks is None else settings.num_gpu_blocks - 1

    def seconds(query_lens: list[int], context_lens: list[int]) -> float:
        return model(np.array(query_lens), np.array(context_lens))

    expected = Oracle(trace, settings, seconds, blocks).run()
    # With the model's short cut for a run of decodes, and without.
    for clock in (model, model.__call__):
        steps = schedule(trace, settings, clock)
        assert entries(steps) == [step.entries for step in expected]
        assert steps.num_preempted.tolist() == [step.preempted for step in expected]
        assert steps.num_blocks.tolist() == [step.blocks_used for step in expected]
        assert steps.start_s.tolist() == [step.start for step in expected]
        assert steps.duration_s.tolist() == [step.seconds for step in expected]


@given(st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_what_must_hold_for_any_schedule(data: st.DataObject) -> None:
    trace = data.draw(traces(max_requests=40))
    settings = data.draw(settings_for(trace))
    steps = schedule(trace, settings, MODEL)
    again = schedule(trace, settings, MODEL)
    for name in StepBatches.__slots__:
        assert np.array_equal(getattr(steps, name), getattr(again, name)), name

    # Budget, seats, blocks, time.
    sizes = np.add.reduceat(steps.query_len, steps.step_offsets[:-1])
    assert sizes.max() <= settings.token_budget
    assert np.diff(steps.step_offsets).min() >= 1
    assert np.diff(steps.step_offsets).max() <= settings.max_num_seqs
    if settings.num_gpu_blocks is not None:
        assert steps.num_blocks.max() <= settings.num_gpu_blocks - 1
    ends = steps.start_s + steps.duration_s
    assert np.all(steps.start_s[1:] >= ends[:-1])
    assert steps.query_len.min() >= 1

    # Each request by itself: every token computed once, in order, or again from where a
    # preemption left it; nothing before its arrival; output only with the last known token.
    step_of = np.repeat(np.arange(len(steps)), np.diff(steps.step_offsets))
    num_restarts = 0
    for request in range(len(trace)):
        mine = np.flatnonzero(steps.request == request)
        assert steps.start_s[step_of[mine[0]]] >= trace.arrival_s[request]
        assert len(set(step_of[mine].tolist())) == len(mine)
        known = int(trace.input_tokens[request])
        total = known + int(trace.output_tokens[request])
        in_cache = None
        for entry in mine.tolist():
            query, context = int(steps.query_len[entry]), int(steps.context_len[entry])
            if in_cache is None or context != in_cache:
                num_restarts += in_cache is not None
                # A start or restart begins at a block another request or it itself has filled.
                assert context % settings.block_size == 0
                assert context < known
                assert settings.enable_prefix_caching or context == 0
            made = int(steps.produces[entry])
            end = context + query
            if made:
                assert known <= end <= known + settings.num_speculative_tokens
                assert made <= 1 + end - known
                known += made
                end = known - 1 if known < total else end
            else:
                assert end < known
            in_cache = end
        assert known == total
    assert num_restarts <= steps.num_preempted.sum()
    if not settings.enable_prefix_caching and not settings.num_speculative_tokens:
        # Whatever was preempted was computed again, exactly: nothing else is computed twice.
        assert num_restarts == steps.num_preempted.sum()
        recomputed = 0
        for request in range(len(trace)):
            mine = steps.request == request
            context, query = steps.context_len[mine], steps.query_len[mine]
            restarts = np.flatnonzero(context[1:] == 0) + 1
            recomputed += int((context + query)[restarts - 1].sum())
        wanted = trace.input_tokens + trace.output_tokens - 1
        assert steps.query_len.sum() == wanted.sum() + recomputed


def test_a_prompt_is_cut_into_chunks_mixed_with_decodes() -> None:
    trace = make_trace([(0.0, 4, 4), (0.0, 10, 1)])
    settings = SchedulerSettings(max_num_batched_tokens=6, max_num_seqs=2)
    assert entries(schedule(trace, settings, MODEL)) == [
        [(0, 4, 0, 1), (1, 2, 0, 0)],
        [(0, 1, 4, 1), (1, 5, 2, 0)],
        [(0, 1, 5, 1), (1, 3, 7, 1)],
        [(0, 1, 6, 1)],
    ]


def test_the_last_running_request_is_preempted_and_computed_again() -> None:
    trace = make_trace([(0.0, 4, 5), (0.0, 4, 5)])
    settings = SchedulerSettings(
        block_size=4, num_gpu_blocks=4, enable_prefix_caching=False, max_num_seqs=2
    )
    steps = schedule(trace, settings, MODEL)
    # Three usable blocks: both prompts, and one more block for the first request's output.
    assert entries(steps)[:3] == [
        [(0, 4, 0, 1), (1, 4, 0, 1)],
        [(0, 1, 4, 1)],
        [(0, 1, 5, 1)],
    ]
    assert steps.num_preempted.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0][: len(steps)]
    # Four tokens of prompt and the one it had produced.
    assert entries(steps)[5] == [(1, 5, 0, 1)]


def test_a_common_prefix_is_computed_once() -> None:
    trace = make_trace(
        [(0.0, 12, 1), (0.0, 12, 1), (50.0, 12, 2)],
        hash_ids=[[1, 2, 3], [1, 2, 4], [1, 2, 3]],
        hash_block_tokens=4,
    )
    settings = SchedulerSettings(block_size=2)
    assert entries(schedule(trace, settings, MODEL)) == [
        # Found in the very step that computes it; the last block of an equal prompt is not used,
        # because its last token is computed again.
        [(0, 12, 0, 1), (1, 4, 8, 1)],
        [(2, 2, 10, 1)],
        [(2, 1, 12, 1)],
    ]
    without = replace(settings, enable_prefix_caching=False)
    assert schedule(trace, without, MODEL).query_len.sum() == 37


def test_freed_blocks_of_a_prefix_are_evicted_oldest_first() -> None:
    trace = make_trace(
        [(0.0, 4, 1), (10.0, 4, 1), (20.0, 8, 1), (30.0, 4, 1), (40.0, 4, 1)],
        hash_ids=[[1, 2], [3, 4], [5, 6, 7, 8], [3, 4], [1, 2]],
        hash_block_tokens=2,
    )
    settings = SchedulerSettings(block_size=2, num_gpu_blocks=7)
    steps = entries(schedule(trace, settings, MODEL))
    # Six usable: the third takes two never used and then the first request's two.
    assert [step[0][2] for step in steps] == [0, 0, 0, 2, 0]


def test_drafts_are_checked_and_the_rejected_ones_forgotten() -> None:
    trace = make_trace([(0.0, 5, 9)])
    all_in = SchedulerSettings(num_speculative_tokens=3, acceptance_rate=1.0)
    assert entries(schedule(trace, all_in, MODEL)) == [
        [(0, 5, 0, 1)],
        [(0, 4, 5, 4)],
        [(0, 4, 9, 4)],
    ]
    none_in = replace(all_in, acceptance_rate=0.0)
    assert entries(schedule(trace, none_in, MODEL))[1:3] == [[(0, 4, 5, 1)], [(0, 4, 6, 1)]]


def test_as_many_drafts_are_accepted_as_the_rate_says() -> None:
    trace = make_trace([(float(i), 10, 500) for i in range(40)])
    settings = SchedulerSettings(num_speculative_tokens=3, acceptance_rate=0.6)
    steps = schedule(trace, settings, LinearStepSeconds(1e-3, 0.0, 0.0))
    per_step = steps.produces[(steps.query_len == 4) & (steps.context_len < 480)]
    assert len(per_step) > 5000
    expected = 1 + 0.6 + 0.6**2 + 0.6**3
    assert abs(per_step.mean() - expected) < 0.05
    other = schedule(trace, replace(settings, seed=1), LinearStepSeconds(1e-3, 0.0, 0.0))
    assert not np.array_equal(other.produces, steps.produces)


def test_the_clock_skips_what_is_idle() -> None:
    trace = make_trace([(0.0, 4, 2), (100.0, 4, 1)])
    steps = schedule(trace, SchedulerSettings(), MODEL)
    assert steps.start_s.tolist() == [0.0, float(steps.duration_s[0]), 100.0]


def test_recorded_times_drive_the_clock_and_must_suffice() -> None:
    trace = make_trace([(0.0, 4, 3), (1.5, 4, 1)])
    steps = schedule(trace, SchedulerSettings(), RecordedSeconds(np.array([1.0, 2.0, 3.0])))
    assert steps.duration_s.tolist() == [1.0, 2.0, 3.0]
    assert entries(steps)[2] == [(0, 1, 5, 1), (1, 4, 0, 1)]
    with pytest.raises(UsageError, match="2 recorded step times"):
        schedule(trace, SchedulerSettings(), RecordedSeconds(np.array([1.0, 2.0])))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(UsageError, match="step time of step 0"):
        schedule(make_trace([(0.0, 1, 1)]), SchedulerSettings(), lambda q, c: seconds)


def test_a_request_that_can_never_run_is_refused() -> None:
    trace = make_trace([(0.0, 1, 1), (0.0, 60, 20)])
    with pytest.raises(UsageError, match=r"request 1 needs 5 blocks .* give 6 or more"):
        schedule(trace, SchedulerSettings(num_gpu_blocks=5), MODEL)
    assert len(schedule(trace, SchedulerSettings(num_gpu_blocks=6), MODEL)) > 0
    with pytest.raises(UsageError, match="reaches 80 tokens"):
        schedule(trace, SchedulerSettings(max_model_len=79), MODEL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_num_batched_tokens": 100}, "less than max_num_seqs"),
        ({"num_gpu_blocks": 1}, "null block"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"acceptance_rate": 1.5}, "probability"),
        ({"speculative_method": "medusa"}, "eagle, draft_model or ngram"),
        (
            {
                "num_speculative_tokens": 1,
                "speculative_method": "draft_model",
                "max_num_batched_tokens": 1024,
            },
            "leaves nothing",
        ),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SchedulerSettings(**wrong)  # type: ignore[arg-type]


def test_the_defaults_of_a_gpu_are_those_of_vllm() -> None:
    gib = 1 << 30
    for memory, name, tokens, seqs in (
        (141 * gib, "NVIDIA H200", 8192, 1024),
        (80 * gib, "NVIDIA A100-SXM4-80GB", 2048, 256),
        (24 * gib, "NVIDIA L4", 2048, 256),
    ):
        settings = SchedulerSettings.for_gpu(memory, name)
        assert (settings.max_num_batched_tokens, settings.max_num_seqs) == (tokens, seqs)


@pytest.mark.parametrize(
    ("limit", "requests"),
    [("MAX_STEPS", [(0.0, 5, 2000)]), ("MAX_ENTRIES", [(0.0, 5, 20)] * 60)],
)
def test_a_schedule_that_fits_no_memory_is_refused_while_it_is_made(
    limit: str, requests: list[tuple[float, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"attnbench.traffic.schedule_record.{limit}", 1000)
    monkeypatch.setattr("attnbench.traffic.schedule._RUN_ENTRIES", 64)
    with pytest.raises(UsageError, match=r"--requests\), or leave out"):
        schedule(make_trace(requests), SchedulerSettings(), MODEL)
