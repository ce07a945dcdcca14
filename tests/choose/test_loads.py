"""Curves and other loads of a trace, against numbers counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attnbench.choose.loads import SHARES, concurrency, curves
from attnbench.traffic.itl import UserLatency
from attnbench.traffic.types import StepBatches
from tests.choose.day import write_day
from tests.choose.verbs import typed

ITL = np.array([0.4, 0.1, 0.2, 0.3])
TOKENS = np.array([1, 5, 3, 1])


def latency(itl: np.ndarray, tokens: np.ndarray) -> UserLatency:
    requests = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.9]])
    ttft = np.linspace(0.01, 2.0, 200)
    nothing = np.zeros(200)
    return UserLatency(itl, tokens, requests, ttft, nothing, nothing, 1.0, 1.0, "")


def test_a_curve_counts_every_token() -> None:
    """The same as writing each gap as often as it has tokens and taking nearest ranks."""
    found = curves(latency(ITL, TOKENS))
    spelled = np.sort(np.repeat(ITL, TOKENS))
    for share, value in zip(SHARES, found["itl_s"], strict=True):
        rank = max(int(np.ceil(round(share * len(spelled), 9))) - 1, 0)
        assert value == spelled[rank], share
    assert found["itl_request_p99_s"][0] == 0.3
    assert found["itl_request_p99_s"][-1] == 0.9
    places = dict(zip(SHARES, found["ttft_s"], strict=True))
    assert (places[0.0], places[1.0]) == (0.01, 2.0)
    assert places[0.5] == pytest.approx(1.0)


def test_what_has_no_values_has_no_curve() -> None:
    one = latency(np.zeros(0), np.zeros(0, dtype=np.int64))
    assert "itl_s" not in curves(one)


def test_concurrency_is_weighted_by_time() -> None:
    ones = np.ones(5, dtype=np.int64)
    steps = StepBatches(
        step_offsets=np.array([0, 1, 5]), start_s=np.array([0.0, 3.0]),
        duration_s=np.array([3.0, 1.0]), num_blocks=ones[:2], num_preempted=ones[:2],
        request=ones, query_len=ones, context_len=ones, produces=ones,
    )  # fmt: skip
    assert concurrency(steps) == pytest.approx((1 * 3 + 4 * 1) / 4)


def test_the_answer_at_other_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_day(tmp_path, 301, gap_s=0.5)
    words = (str(trace), "--representatives", "24", "--results", str(trace.parent / "none"))
    _, out, _ = typed(capsys, "itl", *words, "-f", "json", "--load", "0.5", "--load", "20")
    answer = json.loads(out)
    assert answer["kind"] == "itl"
    assert (answer["trace"], answer["requests"], answer["timer"]) == ("day.csv", 301, None)
    (one,) = answer["backends"]
    assert [load["load"] for load in one["loads"]] == [0.5, 1, 20]
    assert [load["requests_per_s"] for load in one["loads"]] == pytest.approx([1, 2, 40])
    # At its own rate the answer itself; at twenty times it requests share steps.
    for name in ("itl_p50_ms", "itl_p99_ms", "ttft_p50_ms", "tokens_per_s"):
        assert one["loads"][1][name] == pytest.approx(one[name]["value"])
    assert one["loads"][0]["concurrency"] == pytest.approx(1, abs=0.01)
    assert one["loads"][2]["concurrency"] > 2
    assert one["loads"][2]["itl_p50_ms"] > one["loads"][0]["itl_p50_ms"]
    middle = answer["shares"].index(0.5)
    assert one["curves"]["itl_ms"][middle] == pytest.approx(one["itl_p50_ms"]["value"])
    assert one["curves"]["itl_ms"][99] == pytest.approx(one["itl_p99_ms"]["value"])
    for bad in (["--load", "2"], ["-f", "json", "--load", "0"], ["-f", "json", "--load", "nan"]):
        code, _, err = typed(capsys, "itl", *words, *bad)
        assert code == 2
        assert "--load" in err or "rate scale" in err
        assert "Traceback" not in err
