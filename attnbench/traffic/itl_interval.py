"""How sure latencies are, when attention was measured on representatives.

These errors are carried to the result, each draw having all of them:

- noise of the measurement: every representative's samples are drawn again with replacement, and the
  model is fitted to their medians;
- the rest of a step, where it was measured: `MeasuredRest.drawn`;
- the reduction: around each representative all steps are wrong together, by a normal error as large
  as leaving it out was wrong; and all steps everywhere, by one as large as the mean of those.

Batches stay as they are in a draw: the effect of a draw's times on who shares a step is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from attnbench.errors import UsageError
from attnbench.traffic.itl import QUANTILES, Gaps, retimed, token_gaps
from attnbench.traffic.latency_costs import quantile
from attnbench.traffic.latency_measured import MeasuredLatency
from attnbench.traffic.types import Floats, StepBatches, Trace

NUM_DRAWS = 100
CONFIDENCE = 0.95
#: Gaps a draw looks at; of more, every so-manieth.
_MAX_GAPS = 1_000_000
#: A left-out error above this says nothing about how much faster a step could be.
_MOST_ERROR = 0.9


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the limits that `CONFIDENCE` of the draws lie in."""

    low: float
    value: float
    high: float


def intervals(
    trace: Trace,
    steps: StepBatches,
    measured: MeasuredLatency,
    samples: Sequence[Floats],
    rest_s: Floats | None = None,
    *,
    drawn_rest: Callable[[np.random.Generator], Floats] | None = None,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of ITL and TTFT quantiles, attention's share of TTFT and total, tokens per second.

    Args:
        steps: scheduled with `measured` (and the rest) as the clock.
        samples: of each batch of `measured`, seconds of one layer; where a batch was measured by
            several processes, the medians of each, since processes differ more than calls do.
        rest_s: (num_steps,) the part of each step that is not attention; None: none.
        drawn_rest: the same in one draw of its errors; None: it has none.

    Raises:
        UsageError: samples of another number of batches, or a batch without any.
    """
    if len(samples) != len(measured.seconds) or not all(len(values) for values in samples):
        raise UsageError(
            f"samples of {len(samples)} batches, the model has {len(measured.seconds)}; give at "
            "least one for each"
        )
    rng = np.random.default_rng(seed)
    rest = np.zeros(len(steps)) if rest_s is None else rest_s
    between = measured.between(steps.step_offsets, steps.query_len, steps.context_len)
    nearest = between.neighbours[np.arange(len(steps)), between.shares.argmax(axis=1)]
    left_out = measured.left_out_errors()
    spread, common = np.minimum(np.abs(left_out), _MOST_ERROR), abs(float(left_out.mean()))
    gaps = token_gaps(steps, len(trace))

    def statistics(attention_s: Floats, rest_s: Floats) -> dict[str, float]:
        return _statistics(trace, steps, gaps, attention_s, attention_s + rest_s)

    slopes, ratios = measured.refitted(measured.seconds)
    value = statistics(measured.predicted(between, slopes, ratios), rest)
    draws = []
    for _ in range(num_draws):
        medians = [float(np.median(rng.choice(values, len(values)))) for values in samples]
        slopes, ratios = measured.refitted(np.array(medians))
        wrong = spread * rng.standard_normal(len(spread)) + common * rng.standard_normal()
        wrong = np.maximum(1.0 + wrong, 1.0 - _MOST_ERROR)
        attention_s = measured.predicted(between, slopes, ratios) * wrong[nearest]
        draws.append(statistics(attention_s, rest if drawn_rest is None else drawn_rest(rng)))
    tail = (1.0 - CONFIDENCE) / 2.0
    found = {}
    for name, here in value.items():
        drawn = np.array([draw[name] for draw in draws])
        low, high = np.quantile(drawn, tail), np.quantile(drawn, 1.0 - tail)
        found[name] = Interval(min(float(low), here), here, max(float(high), here))
    return found


def _statistics(
    trace: Trace, steps: StepBatches, gaps: Gaps, attention_s: Floats, step_s: Floats
) -> dict[str, float]:
    _, ends = retimed(steps, step_s)
    every = slice(None, None, -(-len(gaps.step) // _MAX_GAPS) or 1)
    tokens = gaps.num_tokens[every]
    itl = (ends[gaps.step[every]] - ends[gaps.step_before[every]]) / tokens
    served = np.flatnonzero(gaps.first_token_step >= 0)
    ttft = ends[gaps.first_token_step[served]] - trace.arrival_s[served]
    weights = None if tokens.max(initial=1) == 1 else tokens.astype(np.float64)
    found = {"attention_s": float(attention_s.sum())}
    for share in QUANTILES:
        found[f"itl_p{round(100 * share)}_s"] = quantile(itl, share, weights)
        found[f"ttft_p{round(100 * share)}_s"] = quantile(ttft, share)
    first, last = gaps.first_step[served], gaps.first_token_step[served]
    attention = np.concatenate((np.zeros(1), attention_s.cumsum()))
    spent = (attention[last + 1] - attention[first]) / ttft
    found["ttft_attention_share"] = quantile(spent, 0.5)
    num_tokens = int(steps.produces.sum())
    found["tokens_per_s"] = num_tokens / float(ends[-1] - trace.arrival_s[0])
    found["tokens_per_busy_s"] = num_tokens / float(step_s.sum())
    return found
