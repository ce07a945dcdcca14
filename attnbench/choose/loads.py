"""Latencies of a served trace as curves, and of the same trace at other loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from attnbench.traffic.itl import UserLatency
from attnbench.traffic.types import Floats, StepBatches

SHARES = (0.0, *(percent / 100 for percent in range(1, 100)), 0.995, 0.999, 1.0)
"""Where curves are known: dense enough that straight lines between are the distribution."""


@dataclass(frozen=True, slots=True)
class Load:
    """A trace at another rate, served by the same latency model.

    Attributes:
        load: times the rate that was asked for; 1: that rate.
        requests_per_s: that came in, first to last.
        concurrency: requests in a step, mean over the time steps ran.
        values: seconds and tokens per second, by the names of `UserLatency.summary`.
        beyond: as of `Answer`; 0 for the roofline.
    """

    load: float
    requests_per_s: float
    concurrency: float
    values: Mapping[str, float]
    beyond: float


def curves(latency: UserLatency) -> dict[str, tuple[float, ...]]:
    """Seconds at `SHARES` of the tokens (`itl_s`) and of the requests (`itl_request_p99_s`,
    `ttft_s`); one without values is left out."""
    weights = latency.itl_tokens.astype(np.float64)
    found = {
        "itl_s": _curve(latency.itl_s, weights),
        "itl_request_p99_s": _curve(latency.request_itl_s[:, -1]),
        "ttft_s": _curve(latency.ttft_s),
    }
    return {name: values for name, values in found.items() if values}


def concurrency(steps: StepBatches) -> float:
    """Requests in a step, mean over the time that steps ran."""
    counts = np.diff(steps.step_offsets)
    return float((counts * steps.duration_s).sum() / steps.duration_s.sum())


def _curve(values: Floats, weights: Floats | None = None) -> tuple[float, ...]:
    """Nearest ranks, as `quantile` has them, all at once."""
    if not len(values):
        return ()
    order = np.argsort(values, kind="stable")
    running = (np.ones(len(values)) if weights is None else weights[order]).cumsum()
    ranks = np.searchsorted(running, np.array(SHARES) * running[-1], side="left")
    return tuple(values[order][np.minimum(ranks, len(values) - 1)].tolist())
