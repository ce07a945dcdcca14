"""The batch-spec grammar against cases worked out by hand from vLLM's definition of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from attnbench.errors import WorkloadError
from attnbench.workload import BatchSpec, Phase, Request, format_batch_spec, parse_batch_spec
from attnbench.workload.batch_spec import MAX_REQUESTS, batch_phase, request_phase
from tests.workload.strategies import batch_specs

# text, requests, phase; the first five are the forms vLLM's benchmark documents.
CASES = [
    ("q2k", [(2048, 2048)], Phase.PREFILL),
    ("q1s1k", [(1, 1024)], Phase.DECODE),
    ("8q1s1k", [(1, 1024)] * 8, Phase.DECODE),
    ("q4s1k", [(4, 1024)], Phase.EXTEND),
    ("2q2k_32q1s1k", [(2048, 2048)] * 2 + [(1, 1024)] * 32, Phase.MIXED),
    (
        "q257_7q1s1057_3q4s2051_2q129s4093",
        [(257, 257)] + [(1, 1057)] * 7 + [(4, 2051)] * 3 + [(129, 4093)] * 2,
        Phase.MIXED,
    ),
    ("q1", [(1, 1)], Phase.DECODE),  # both a decode and a prefill: decode wins
    ("q5", [(5, 5)], Phase.PREFILL),
    ("q1ks2k", [(1024, 2048)], Phase.EXTEND),
    ("q1000s1k", [(1000, 1024)], Phase.EXTEND),
    ("4q2_q2s3", [(2, 2)] * 4 + [(2, 3)], Phase.MIXED),
]


@pytest.mark.parametrize(("text", "expected", "phase"), CASES)
def test_meaning(text: str, expected: list[tuple[int, int]], phase: Phase) -> None:
    spec = parse_batch_spec(text)
    assert spec.requests == tuple(Request(*pair) for pair in expected)
    assert batch_phase(spec) is phase
    assert format_batch_spec(spec) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("q2048", "q2k"),
        ("1q1s4096", "q1s4k"),
        ("q1s1k_q1s1024_2q1s1k", "4q1s1k"),
        ("q4s4", "q4"),
        ("q1s1k_q2_q1s1k", "q1s1k_q2_q1s1k"),  # order is kept
        ("008q01s04k", "8q1s4k"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert format_batch_spec(parse_batch_spec(text)) == canonical


@given(batch_specs())
@settings(deadline=None)
def test_round_trip(spec: BatchSpec) -> None:
    text = format_batch_spec(spec)
    assert parse_batch_spec(text) == spec
    assert format_batch_spec(parse_batch_spec(text)) == text


def test_every_request_has_one_phase() -> None:
    assert request_phase(Request(1, 1)) is Phase.DECODE
    assert request_phase(Request(2, 2)) is Phase.PREFILL
    assert request_phase(Request(2, 3)) is Phase.EXTEND


# text, what the message must contain: where, what was expected, an example
BAD = [
    ("", ["empty", "8q1s4k"]),
    ("8q1x4k", ["segment 1 '8q1x4k'", "character 1", "unexpected 'x' at its character 4", "e.g."]),
    ("q2k_8s4", ["segment 2 '8s4'", "character 5", "unexpected 's'", "[count]q<query_len>"]),
    ("q2k_", ["segment 2 ''", "ends too early", "character 5"]),
    ("q", ["ends too early"]),
    ("q1s", ["ends too early"]),
    ("8", ["ends too early"]),
    ("0q1s4k", ["count is 0", "e.g. 8q1s4k"]),
    ("q0s4k", ["query_len is 0", "q1"]),
    ("q8s4", ["seq_len 4", "query_len 8", "write s8 or more"]),
    ("q8s7", ["seq_len 7", "query_len 8", "write s8 or more"]),
    ("q4s0", ["seq_len 0", "write s4 or more"]),
    ("8q1s4m", ["unexpected 'm' at its character 6"]),
    ("8 q1", ["unexpected ' ' at its character 2"]),
    ("-1q1", ["unexpected '-'"]),
    ("q١", ["unexpected '١'"]),  # int() would take Arabic digits
    ("q1kv1k", ["unexpected 'v' at its character 4"]),  # vLLM's older form
    (f"{MAX_REQUESTS + 1}q1", ["more than 65536 requests", "smaller count"]),
    ("40000q1_40000q2", ["segment 2", "more than 65536"]),
    ("q1s3000000k", ["request q1s3000000k", "2147483647"]),
    (f"q{'9' * 5000}", ["more than 18 digits"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_error_messages(text: str, parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        parse_batch_spec(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
