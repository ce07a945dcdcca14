"""The rest of a step: the arithmetic of differences, between measured numbers of tokens, errors."""

from __future__ import annotations

import numpy as np
import pytest

from attnbench.errors import UsageError
from attnbench.traffic.itl import token_gaps
from attnbench.traffic.itl_interval import intervals
from attnbench.traffic.latency import SumOfParts
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.latency_rest import MeasuredRest, StepTimes
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.trace import load_trace
from attnbench.traffic.types import StepBatches
from attnbench.workload import Workload

LAYERS = 32


def times(
    tokens: int,
    rest_s: float,
    attention: tuple[float, ...] = (1e-4,),
    layers: tuple[int, ...] = (2, 4),
    fixed_s: float = 3e-4,
    spread: tuple[float, ...] = (1.0,),
) -> StepTimes:
    """A model whose rest takes `rest_s` a layer and `fixed_s` besides, and its attention."""
    alone = float(np.median(attention))
    steps = {k: [s * (fixed_s + k * (rest_s + alone)) for s in spread] for k in layers}
    return StepTimes(f"{tokens} tokens", tokens, steps, attention)


def test_the_rest_is_the_step_of_all_layers_less_their_attention() -> None:
    rest = MeasuredRest([times(1, 2e-4), times(64, 2e-4, (5e-4,)), times(512, 9e-4)], LAYERS)
    expected = [3e-4 + LAYERS * 2e-4, 3e-4 + LAYERS * 2e-4, 3e-4 + LAYERS * 9e-4]
    np.testing.assert_allclose(rest.seconds, expected, rtol=1e-12)
    # Where all layers were measured nothing is extrapolated, whatever fewer took.
    whole = [times(1, 2e-4, layers=(32,)), times(64, 2e-4, layers=(1, 32))]
    whole[1].steps[1][0] = 7.0  # type: ignore[index]
    np.testing.assert_allclose(MeasuredRest(whole, LAYERS).seconds, expected[:2], rtol=1e-12)


def test_steps_lie_on_lines_between_measured_numbers_of_tokens() -> None:
    each = [times(8, 1e-4), times(16, 2e-4), times(16, 4e-4), times(32, 5e-4)]
    rest = MeasuredRest(each, LAYERS)
    fixed = 3e-4
    a, b, c = (fixed + LAYERS * one for one in (1e-4, 3e-4, 5e-4))
    for tokens, expected in (
        (1, a),  # below the smallest: weights are read once all the same
        (8, a),
        (12, (a + b) / 2),
        (16, b),
        (24, (b + c) / 2),
        (32, c),
        (64, c + (c - b) * 2),
    ):
        # Two requests: the tokens of a step count, wherever they are.
        query = np.array([tokens - 1, 1]) if tokens > 1 else np.array([1])
        assert rest(query, np.array([1000, 5])[: len(query)]) == pytest.approx(expected), tokens


@pytest.mark.parametrize(
    ("each", "said"),
    [
        ([times(1, 1e-4)], "1 number of tokens"),
        ([], "0 number of tokens"),
        ([times(1, 1e-4), times(8, 1e-4, layers=(2,))], "--step-layers 2 --step-layers 4"),
        ([times(1, 1e-4), times(8, -4e-4)], "8 tokens: a step takes no longer"),
    ],
)
def test_what_says_nothing_is_refused(each: list[StepTimes], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        MeasuredRest(each, LAYERS)


def batch_of(tokens: int) -> StepBatches:
    one = np.array([1], dtype=np.int64)
    return StepBatches(
        step_offsets=np.array([0, 1]),
        start_s=np.zeros(1),
        duration_s=np.ones(1),
        num_blocks=one,
        num_preempted=one * 0,
        request=one * 0,
        query_len=one * tokens,
        context_len=one * 0,
        produces=one,
    )


def test_errors_of_the_parts_are_drawn() -> None:
    """Three processes a per cent apart: the slope of 2 layers over 2 is taken 16 times."""
    rng = np.random.default_rng(0)
    exact = MeasuredRest([times(1, 2e-4), times(64, 2e-4), times(512, 2e-4)], LAYERS)
    steps = batch_of(64)
    assert exact.drawn(steps, rng) == pytest.approx(exact.of_steps(steps), rel=1e-12)
    noisy = MeasuredRest([times(n, 2e-4, spread=(0.99, 1.0, 1.01)) for n in (1, 64, 512)], LAYERS)
    drawn = np.array([noisy.drawn(steps, rng)[0] for _ in range(400)])
    # A median of three drawn from three: 20/27 of the variance of one, 2/3 of a squared per cent.
    one = np.sqrt(2 / 3 * 1e-4 * 14 / 27 / (2 / 3))
    s2, s4 = (3e-4 + k * 3e-4 for k in (2, 4))
    expected = np.hypot((1 - 15) * s2 * one, 15 * s4 * one)
    assert drawn.std() == pytest.approx(expected, rel=0.15)
    # Attention by itself that differs between processes is part of the difference.
    uneven = MeasuredRest([times(n, 2e-4, (8e-5, 1e-4, 1.2e-4)) for n in (1, 64)], LAYERS)
    drawn = np.array([uneven.drawn(steps, rng)[0] for _ in range(400)])
    assert drawn.std() == pytest.approx(LAYERS * 2e-5 * np.sqrt(14 / 27), rel=0.15)


def test_what_lies_between_is_as_unsure_as_leaving_it_out_says() -> None:
    rest = MeasuredRest([times(0, 2e-4), times(64, 4e-4), times(128, 2e-4)], LAYERS)
    ends = 3e-4 + LAYERS * 2e-4
    middle = 3e-4 + LAYERS * 4e-4
    np.testing.assert_allclose(rest.left_out_errors(), [0, ends / middle - 1, 0], rtol=1e-12)
    rng = np.random.default_rng(1)
    drawn = np.array([rest.drawn(batch_of(64), rng)[0] for _ in range(400)])
    assert drawn.std() / middle == pytest.approx((1 - ends / middle) / 2, rel=0.15)


def test_the_errors_of_the_rest_reach_the_latencies(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "t.csv"
    lines = [f"{i},{40 + i},8" for i in range(20)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]), encoding="utf-8")
    trace = load_trace(path)
    batches = [Workload.parse(f"{1 + n % 3}q1s{20 + 3 * n} layers=1") for n in range(16)]
    attention = MeasuredLatency(batches, np.full(16, 1e-3))
    limits = []
    for spread in ((1.0,), (0.97, 1.0, 1.03)):
        rest = MeasuredRest([times(n, 2e-4, spread=spread) for n in (1, 16, 64)], LAYERS)
        steps = schedule(trace, SchedulerSettings(), SumOfParts([attention, rest]))
        assert len(token_gaps(steps, len(trace)).step)
        found = intervals(
            trace,
            steps,
            attention,
            [np.full(3, 1e-3)] * 16,
            rest.of_steps(steps),
            drawn_rest=lambda rng, rest=rest, steps=steps: rest.drawn(steps, rng),  # type: ignore[misc]
        )
        one = found["itl_p50_s"]
        assert one.value == pytest.approx(1e-3 + 3e-4 + LAYERS * 2e-4, rel=1e-9)
        limits.append(one.high / one.low)
    assert limits[0] == pytest.approx(1.0)
    assert limits[1] > 1.1
