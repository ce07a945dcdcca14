"""What users of a schedule feel: inter-token latency, time to first token, tokens per second.

Every number is of the schedule's own clock (`StepBatches.duration_s`). The closed-loop rule: a
schedule follows from its step times (a slower step lets more requests arrive, so the next batch is
larger), so the times of another backend make another schedule. There is no way to put them on this
one; `serve` schedules the trace anew with each backend's model as its clock, and `check_own_clock`
refuses a schedule that another clock drove.

A token is out when its step ends. Inter-token latency is from one step that brought a request
tokens to the next one that did, preemption and other requests' prompts included; of a step that
brings several (speculative decoding) each token has an equal part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.latency import StepModel, SumOfParts
from attnbench.traffic.latency_costs import quantile
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.types import Floats, Ints, StepBatches, Trace

QUANTILES = (0.5, 0.9, 0.99)
ATTENTION_ONLY = "attention only"
#: A step's time may differ by rounding between its clock and the model asked again.
_SAME_CLOCK = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Gaps:
    """Which steps the gaps between tokens lie between, whatever the clock.

    Attributes:
        request: (num_gaps,) sorted.
        step_before, step: (num_gaps,) the step that brought the token before, and this one.
        num_tokens: (num_gaps,) tokens the step brought: 1 without speculative decoding.
        first_step, first_token_step: (num_requests,) of each request's first entry and of its
            first token; -1: it has none.
    """

    request: Ints
    step_before: Ints
    step: Ints
    num_tokens: Ints
    first_step: Ints
    first_token_step: Ints


@dataclass(frozen=True, slots=True, eq=False)
class UserLatency:
    """Latencies of a served trace, in seconds.

    Attributes:
        itl_s, itl_tokens: (num_gaps,) inter-token latency, and the tokens that have it.
        request_itl_s: (num_requests with two tokens or more, 3) p50, p90 and p99 of each request.
        ttft_s: (num_served,) from arrival to the end of the step with the first token.
        wait_s: (num_served,) the part of it before the request's first step.
        ttft_attention_share: (num_served,) the part of it spent in attention (the request's own
            and that of whoever shares its steps), 0 to 1.
        tokens_per_s: output tokens over the time from the first arrival to the last token; where
            the engine waits for requests this is what was asked for, not what it can do.
        tokens_per_busy_s: output tokens over the time steps ran.
        scope: what a step's time is made of, in words.
    """

    itl_s: Floats
    itl_tokens: Ints
    request_itl_s: Floats
    ttft_s: Floats
    wait_s: Floats
    ttft_attention_share: Floats
    tokens_per_s: float
    tokens_per_busy_s: float
    scope: str

    def summary(self) -> dict[str, float]:
        """Quantiles over tokens and over requests, by name; NaN where there is nothing."""
        weights = self.itl_tokens.astype(np.float64)
        found = {}
        for column, share in enumerate(QUANTILES):
            name = f"p{round(100 * share)}"
            found[f"itl_{name}_s"] = quantile(self.itl_s, share, weights)
            # Half of the requests have a p99 of at most this.
            found[f"itl_request_{name}_s"] = quantile(self.request_itl_s[:, column], 0.5)
            found[f"ttft_{name}_s"] = quantile(self.ttft_s, share)
        found["ttft_attention_share"] = quantile(self.ttft_attention_share, 0.5)
        found["ttft_wait_share"] = float(self.wait_s.sum() / max(self.ttft_s.sum(), 1e-300))
        found["tokens_per_s"] = self.tokens_per_s
        found["tokens_per_busy_s"] = self.tokens_per_busy_s
        return found


def serve(
    trace: Trace,
    settings: SchedulerSettings,
    attention: StepModel,
    rest: StepModel | None = None,
    scope: str = "",
) -> tuple[StepBatches, UserLatency]:
    """Schedule the trace with this backend's times as the clock, and say what its users feel.

    Args:
        attention: all attention layers of the model, on this backend.
        rest: everything else of a step; None: excluded, and the result is "attention only".
        scope: how `rest` was found, e.g. "linear layers at the roofline".

    Raises:
        UsageError: what `schedule` raises.
    """
    clock = attention if rest is None else SumOfParts([attention, rest])
    steps = schedule(trace, settings, clock)
    words = ATTENTION_ONLY if rest is None else f"attention, and {scope or 'the rest of the step'}"
    return steps, user_latency(trace, steps, attention.of_steps(steps), words)


def check_own_clock(steps: StepBatches, clock: StepModel) -> None:
    """Refuse a schedule that another clock drove.

    Raises:
        UsageError: a step's time is not what `clock` says.
    """
    expected = clock.of_steps(steps)
    off = np.abs(steps.duration_s - expected) > _SAME_CLOCK * np.abs(expected)
    if off.any():
        step = int(off.argmax())
        raise UsageError(
            f"step {step} took {steps.duration_s[step]:.6g} s in this schedule and takes "
            f"{expected[step]:.6g} s by this model: other times make other batches, so schedule "
            "the trace again with this model as its clock (attnbench.traffic.itl.serve)"
        )


def user_latency(
    trace: Trace, steps: StepBatches, attention_s: Floats, scope: str = ATTENTION_ONLY
) -> UserLatency:
    """The latencies of a schedule by its own clock.

    Args:
        attention_s: (num_steps,) the part of each step that is attention.

    Raises:
        UsageError: no steps, or more attention in a step than the step takes.
    """
    if not len(steps):
        raise UsageError("the schedule has no steps; give a trace with requests")
    if np.any(attention_s > steps.duration_s * (1.0 + _SAME_CLOCK)):
        raise UsageError(
            "a step of this schedule is shorter than its attention: another clock drove it; "
            "schedule the trace again with these times (attnbench.traffic.itl.serve)"
        )
    gaps = token_gaps(steps, len(trace))
    ends = steps.start_s + steps.duration_s
    itl = (ends[gaps.step] - ends[gaps.step_before]) / gaps.num_tokens
    served = np.flatnonzero(gaps.first_token_step >= 0)
    first, last = gaps.first_step[served], gaps.first_token_step[served]
    ttft = ends[last] - trace.arrival_s[served]
    attention = np.concatenate((np.zeros(1), attention_s.cumsum()))
    num_tokens = int(steps.produces.sum())
    return UserLatency(
        itl_s=itl,
        itl_tokens=gaps.num_tokens,
        request_itl_s=_quantiles_by_request(gaps, itl),
        ttft_s=ttft,
        wait_s=np.maximum(steps.start_s[first] - trace.arrival_s[served], 0.0),
        ttft_attention_share=(attention[last + 1] - attention[first]) / ttft,
        tokens_per_s=num_tokens / float(ends[-1] - trace.arrival_s[0]),
        tokens_per_busy_s=num_tokens / float(steps.duration_s.sum()),
        scope=scope,
    )


def token_gaps(steps: StepBatches, num_requests: int) -> Gaps:
    """Where tokens come, without their times. About a second for ten million entries."""
    counts = np.diff(steps.step_offsets)
    step_of_entry = np.repeat(np.arange(len(steps), dtype=np.int64), counts)
    first_step = np.full(num_requests, -1, dtype=np.int64)
    # Assigned from the last entry to the first: the earliest stays.
    first_step[steps.request[::-1]] = step_of_entry[::-1]
    producing = np.flatnonzero(steps.produces)
    order = producing[np.argsort(steps.request[producing], kind="stable")]
    request, step = steps.request[order], step_of_entry[order]
    first_token = np.full(num_requests, -1, dtype=np.int64)
    first_token[request[::-1]] = step[::-1]
    again = np.flatnonzero(request[1:] == request[:-1]) + 1
    return Gaps(
        request=request[again],
        step_before=step[again - 1],
        step=step[again],
        num_tokens=steps.produces[order][again],
        first_step=first_step,
        first_token_step=first_token,
    )


def _quantiles_by_request(gaps: Gaps, itl: Floats) -> Floats:
    """(num_requests with a gap, 3) nearest-rank quantiles of each request's tokens."""
    by_size = np.argsort(itl)
    order = by_size[np.argsort(gaps.request[by_size], kind="stable")]
    if not len(order):
        return np.zeros((0, len(QUANTILES)))
    starts = np.flatnonzero(np.diff(gaps.request, prepend=-1))
    running = gaps.num_tokens[order].cumsum()
    before = running[starts] - gaps.num_tokens[order][starts]
    totals = np.diff(np.append(before, running[-1]))
    columns = []
    for share in QUANTILES:
        rank = before + np.ceil(share * totals)
        columns.append(itl[order][np.searchsorted(running, rank, side="left")])
    return np.stack(columns, axis=1)


def retimed(steps: StepBatches, seconds: Floats) -> tuple[Floats, Floats]:
    """Starts and ends of the same batches with slightly other times: for the error of a result.

    A step starts when the one before has ended; where the engine was idle, not before it did. Only
    for times inside the error of the schedule's clock: others make other batches.
    """
    ends = steps.start_s + steps.duration_s
    idle = np.ones(len(steps), dtype=bool)
    idle[1:] = steps.start_s[1:] - ends[:-1] > _SAME_CLOCK * np.maximum(ends[:-1], 1.0)
    done = seconds.cumsum()
    ahead = np.where(idle, steps.start_s - (done - seconds), -np.inf)
    new_ends = done + np.maximum.accumulate(ahead)
    return new_ends - seconds, new_ends
