"""Trace files: what each format means, what is refused and where, and the parts of a trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from attnbench.errors import UsageError
from attnbench.traffic import trace_csv, trace_json
from attnbench.traffic.schedule import schedule
from attnbench.traffic.schedule_settings import SchedulerSettings
from attnbench.traffic.step_clock import LinearStepSeconds
from attnbench.traffic.trace import first_requests, load_trace, poisson_arrivals, scale_rate, window
from attnbench.traffic.types import Trace

REAL = Path(__file__).resolve().parents[3] / "shared" / "traces"
PLAIN = "arrival_s,input_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def load(tmp_path: Path, text: str | bytes, **options: Any) -> Trace:
    path = tmp_path / "trace.dat"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_trace(path, **options)


def rows(trace: Trace) -> list[tuple[float, int, int]]:
    columns = (trace.arrival_s, trace.input_tokens, trace.output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def moon(*lines: dict[str, object]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def line(timestamp: object, input_length: object = 600, output_length: object = 5) -> Any:
    row = {"timestamp": timestamp, "input_length": input_length, "output_length": output_length}
    return row | {"hash_ids": [1, 2]}


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (PLAIN + "10.5,100,5\n11.75,200,6\n", "csv"),
        ("model,Output_Tokens,input_tokens,arrival_s\nx,5,100,10.5\ny,6,200,11.75\n", "csv"),
        (
            AZURE + "2023-11-16 18:17:03.9799600,100,5\r\n2023-11-16 18:17:05.2299600,200,6\r\n",
            "azure",
        ),
        (
            AZURE
            + "2024-05-10 00:00:00.009930+00:00,100,5\n2024-05-10 00:00:01.259930+00:00,200,6\n",
            "azure",
        ),
        (BURST + "10.5,GPT-4,100,5,105,API log\n11.75,ChatGPT,200,6,206,API log\n", "burstgpt"),
        (moon(line(0, 100, 5), line(1250, 200, 6)), "mooncake"),
    ],
)
def test_each_format_is_found_by_its_contents(tmp_path: Path, text: str, format: str) -> None:
    expected = [(0.0, 100, 5), (1.25, 200, 6)]
    for data in (
        text.encode(),
        b"\xef\xbb\xbf" + text.encode(),
        gzip.compress(text.encode()),
        gzip.compress(text[:60].encode()) + gzip.compress(text[60:].encode()),
        text.replace("\n", "\r\n").replace("\r\r", "\r").encode(),
        ("\n" + text.rstrip()).encode(),
    ):
        trace = load(tmp_path, data)
        assert rows(trace) == expected
        assert rows(load(tmp_path, data, format=format)) == expected
    assert trace.name == "trace.dat"


def test_hash_ids_are_kept_request_by_request(tmp_path: Path) -> None:
    text = moon(
        {"timestamp": 0, "input_length": 900, "output_length": 1, "hash_ids": [7, 8]},
        {"timestamp": 1, "input_length": 9000, "output_length": 1, "hash_ids": list(range(18))},
        {"timestamp": 2, "input_length": 5, "output_length": 0, "hash_ids": [9]},
        {"timestamp": 3, "input_length": 700, "output_length": 1, "hash_ids": [7, 9]},
    )
    trace = load(tmp_path, text, max_model_len=1000)
    assert (trace.num_rejected, trace.num_empty) == (1, 1)
    assert trace.hash_offsets.tolist() == [0, 2, 4]
    assert trace.hash_ids.tolist() == [7, 8, 7, 9]
    assert trace.hash_block_tokens == 512
    last = window(trace, 0.001)
    assert (last.hash_offsets.tolist(), last.hash_ids.tolist()) == ([0, 2], [7, 9])


def test_a_conversation_is_its_first_two_messages(tmp_path: Path) -> None:
    conversations: list[dict[str, object]] = [
        {
            "conversations": [
                {"from": "human", "value": "abcdefghi"},
                {"from": "gpt", "value": "häé"},
                {"from": "human", "value": "more"},
            ]
        },
        {"conversations": [{"from": "human", "value": "alone"}]},
        {
            "messages": [
                {"role": "user", "content": "x", "num_tokens": 50},
                {"role": "assistant", "num_tokens": 7},
            ]
        },
    ]
    whole = json.dumps(conversations, indent=1, ensure_ascii=False)
    lines = moon(*conversations)
    for text in (whole, lines):
        trace = load(tmp_path, text, request_rate=4.0, seed=3)
        assert trace.input_tokens.tolist() == [3, 50]
        assert trace.output_tokens.tolist() == [2, 7]
        assert trace.num_empty == 1
        assert rows(trace) == rows(load(tmp_path, text, request_rate=4.0, seed=3))
        assert rows(trace) != rows(load(tmp_path, text, request_rate=4.0, seed=4))
    with pytest.raises(UsageError, match="--request-rate"):
        load(tmp_path, whole)
    with pytest.raises(UsageError, match="--rate-scale"):
        load(tmp_path, PLAIN + "0,1,1\n", request_rate=1.0)


def test_poisson_arrivals_have_the_rate_asked_for(tmp_path: Path) -> None:
    trace = load(tmp_path, PLAIN + "0,1,1\n" * 20_000)
    gaps = np.diff(poisson_arrivals(trace, 8.0).arrival_s)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.05)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="request rate"):
            poisson_arrivals(trace, rate)


WRONG = [
    (PLAIN + "0,1,1\n\n1,-5,1\n", "line 4: input_tokens is '-5'"),
    (PLAIN + "0,1,1\n1,nan,1\n", "line 3: input_tokens is 'nan': give a whole number"),
    (PLAIN + "0,1,1\nnan,1,1\n", "line 3: arrival_s is 'nan': give a time in seconds"),
    (PLAIN + "inf,1,1\n", "line 2: arrival_s is 'inf'"),
    (PLAIN + "0,1,1\n1,,1\n", "line 3: input_tokens is missing"),
    (PLAIN + "0,1,1\n1,1\n", "line 3: 2 fields where the header has 3"),
    (PLAIN + "0,1,1,9\n", "line 2: 4 fields"),
    (PLAIN + "0,1,1000000000\n", "line 2: output_tokens is '1000000000', more than 100,000,000"),
    (PLAIN + f"0,{'9' * 6000},1\n", "line 2: input_tokens is '9999"),
    (PLAIN + "5,1,1\n4,1,1\n", "line 3: arrival_s is '4', before the line above it"),
    (PLAIN + "-5,1,1\n4,1,1\n", "line 2: arrival_s is '-5': a time cannot be negative"),
    (PLAIN + "0,1.5,1\n", "line 2: input_tokens is '1.5'"),
    (PLAIN + "0,0x10,1\n", "line 2: input_tokens is '0x10'"),
    (PLAIN + "0,1_0,1\n", "line 2: input_tokens is '1_0'"),
    (PLAIN + "0,1,1\n1e300,1,1\n", "line 3: arrival_s is '1e300', centuries"),
    (PLAIN + "0,\x1b[31mred\x07,1\n", r"line 2: input_tokens is '\x1b[31mred\x07'"),
    (PLAIN + "0,[bold]x[/bold],1\n", "line 2: input_tokens is '[bold]x[/bold]'"),
    (PLAIN + f'0,"{"x" * 200_000}",1\n', "line 2: not a line of CSV"),
    (PLAIN + '0,"1\n2",1\n', r"line 3: input_tokens is '1\n2'"),
    (AZURE + "2023-11-16 18:17:03,1,1\nyesterday,1,1\n", "line 3: TIMESTAMP is 'yesterday'"),
    (AZURE + "2023-02-30 18:17:03,1,1\n", "line 2: TIMESTAMP is '2023-02-30 18:17:03'"),
    (AZURE + ",1,1\n", "line 2: TIMESTAMP is missing"),
    (
        AZURE + "9999-11-16 18:17:03,1,1\n",
        "line 2: TIMESTAMP is '9999-11-16 18:17:03': give a year from 1970",
    ),
    (BURST + "1,GPT-4,1,1,2\n", "line 2: 5 fields where the header has 6"),
    (moon(line(0), line(-1)), "line 2: timestamp is '-1': a time cannot"),
    (moon(line(9), line(8)), "line 2: timestamp is '8', before the line above it"),
    (moon(line(0, None)), "line 1: input_length is missing"),
    (moon(line(0, "many")), "line 1: input_length is 'many'"),
    (moon(line(0, True)), "line 1: input_length is 'True'"),
    (moon(line(0, 10**9)), "line 1: input_length is '1000000000', more than"),
    (moon(line(0, 10**200)), "line 1: input_length is 'a number', more than"),
    (moon(line(float("nan"))), "line 1: timestamp is 'nan'"),
    (moon(line(0), {"input_length": 5, "output_length": 5}), "line 2: timestamp is missing"),
    (moon(line(0) | {"hash_ids": "all"}), "line 1: hash_ids is 'all'"),
    (moon(line(0) | {"hash_ids": [1, -1]}), "line 1: hash_ids has '-1'"),
    (moon(line(0)) + '{"timestamp": 5', "line 2: not JSON"),
    (moon(line(0)) + "[" * 100_000, "line 2: not JSON (nested too deeply)"),
    (moon(line(0)) + "17\n", "line 2: '17' is not a JSON object"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_the_first_wrong_row_is_named_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text)
    said = str(caught.value)
    assert said.startswith("trace.dat, " + message)
    assert said.isprintable()
    assert len(said) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n \n", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (PLAIN.encode(), "has no requests"),
        (b"[]", "no requests"),
        (b"a,b,c\n1,2,3\n", "of no known trace format"),
        (b"hello\x1b[2J\n", r"hello\\x1b\[2J' *, of no known"),
        (b"{}\n", "of no known trace format"),
        (gzip.compress(PLAIN.encode() + b"0,1,1\n" * 999, mtime=0)[:-20], "cut short"),
        (gzip.compress(PLAIN.encode() + b"0,1,1\n", mtime=0)[:-5] + b"wrong", "damaged gzip"),
        (b"\x1f\x8bjunk", "damaged gzip"),
        (b"PK\x03\x04 and so on", "zip file"),
        ("arrival_s,input_tokens".encode("utf-16"), "UTF-8"),
        (b"\0\0\0\0", "not a text file"),
        (b"arrival_s,input_tokens,output_tokens,arrival_s\n0,1,1,0\n", "twice"),
        (b'[{"conversations": 5}]', "conversation 1: has no list"),
        (b'[{"conversations": [5, 6]}]', "conversation 1: a message is '5'"),
        (b'[{"messages": [{"content": null}]}]', "conversation 1: a message has the text"),
        (b'[{"messages": [{"num_tokens": -1}]}]', "conversation 1: num_tokens is '-1'"),
        (b'[{"messages": [\n}]', "line 2: not JSON"),
        (b"[17]", "conversation 1: '17' is not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, data, request_rate=1.0 if data[:1] == b"[" else None)
    assert str(caught.value).isprintable()


def test_a_file_that_is_not_there_or_a_format_nobody_knows(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_trace(path)
    with pytest.raises(UsageError, match="one of azure, burstgpt, csv, mooncake, sharegpt"):
        load(tmp_path, PLAIN + "0,1,1\n", format="parquet")
    with pytest.raises(UsageError, match="line 1: the column 'TIMESTAMP' is there not at all"):
        load(tmp_path, PLAIN + "0,1,1\n", format="azure")


def test_an_unpacked_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.traffic.trace.MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="larger than"):
        load(tmp_path, gzip.compress(PLAIN.encode() + b"0,1,1\n" * 1000))


def test_long_and_empty_requests_are_left_out_and_counted(tmp_path: Path) -> None:
    text = PLAIN + "3,90,11\n4,90,10\n5,0,7\n6,7,0\n7,5,5\n"
    trace = load(tmp_path, text, max_model_len=100)
    assert rows(trace) == [(0.0, 90, 10), (3.0, 5, 5)]
    assert (trace.num_rejected, trace.num_empty) == (1, 2)
    with pytest.raises(UsageError, match="all of its 5 requests are longer than max_model_len 9"):
        load(tmp_path, text, max_model_len=9)
    with pytest.raises(UsageError, match="none of its 1 requests has both"):
        load(tmp_path, PLAIN + "0,5,0\n")
    with pytest.raises(UsageError, match="give 2 or more"):
        load(tmp_path, text, max_model_len=0)


def test_unsorted_times_are_sorted_where_asked_for(tmp_path: Path) -> None:
    trace = load(tmp_path, PLAIN + "5,1,1\n3,2,1\n5,3,1\n4,4,1\n", sort_arrivals=True)
    assert rows(trace) == [(0.0, 2, 1), (1.0, 4, 1), (2.0, 1, 1), (2.0, 3, 1)]


def test_windows_and_rates(tmp_path: Path) -> None:
    trace = load(tmp_path, PLAIN + "0,1,1\n1,2,1\n2,3,1\n3,4,1\n")
    assert rows(window(trace, 1.0, 3.0)) == [(0.0, 2, 1), (1.0, 3, 1)]
    assert rows(window(trace)) == rows(trace)
    assert scale_rate(trace, 4.0).arrival_s.tolist() == [0.0, 0.25, 0.5, 0.75]
    assert rows(first_requests(trace, 2)) == rows(trace)[:2]
    assert len(first_requests(trace, 99)) == 4
    for start, end in ((5.0, 6.0), (2.0, 1.0)):
        with pytest.raises(UsageError, match="window"):
            window(trace, start, end)
    with pytest.raises(UsageError, match="1 or more"):
        first_requests(trace, 0)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="rate scale"):
            scale_rate(trace, factor)


FIELDS = st.one_of(
    st.integers(0, 9999).map(str),
    st.floats(0, 1e6, allow_nan=False).map(repr),
    st.sampled_from(
        ["", " 7 ", "-1", "nan", "1e3", "5.", "5.0", "+5", "x", '"8"', "0x1f", "1e999"]
    ),
)


@given(
    st.lists(st.tuples(FIELDS, FIELDS, FIELDS).map(",".join), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_fast_csv_reader_never_differs_from_the_slow_one(lines: list[str], end: str) -> None:
    form = trace_csv.CSV_FORMATS[2]
    data = (PLAIN + end.join(lines)).encode()
    header, body, _ = trace_csv.split_header(data, "x")
    fast = trace_csv._fast(body, form, [0, 1, 2], len(header))
    if fast is None or not fast.is_valid(may_be_unsorted=True):
        return
    slow = trace_csv._slow(data, "x", form, [0, 1, 2], 3, sort_arrivals=True)
    for name in ("time", "input_tokens", "output_tokens"):
        assert np.array_equal(getattr(fast, name), getattr(slow, name))


def test_the_fast_readers_take_ordinary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("read row by row")

    monkeypatch.setattr(trace_csv, "_slow", refuse)
    monkeypatch.setattr(trace_json, "_lines", refuse)
    assert len(load(tmp_path, PLAIN + "0,1,1\n")) == 1
    assert len(load(tmp_path, AZURE + "2023-11-16 18:17:03.9799600,1,1\n")) == 1
    assert len(load(tmp_path, AZURE + "2024-05-10 00:00:00.009930+00:00,1,1\n")) == 1
    assert len(load(tmp_path, BURST + "5,GPT-4,1,1,2,API log\n")) == 1
    assert len(load(tmp_path, moon(line(0), line(1)))) == 2


@pytest.mark.parametrize(
    ("file", "num_requests", "inputs", "outputs", "last"),
    [
        ("azure_llm_2023_code.csv", 8819, 18_059_974, 245_896, 3435.948056),
        ("mooncake_synthetic.jsonl", 3993, 61_194_628, 595_432, 1022.025),
    ],
)
def test_real_traces_load_and_schedule(
    file: str, num_requests: int, inputs: int, outputs: int, last: float
) -> None:
    path = REAL / file
    if not path.exists():
        pytest.skip(f"{file} is not beside this checkout: fetch the published trace to run this")
    trace = load_trace(path)
    assert len(trace) == num_requests
    assert (trace.input_tokens.sum(), trace.output_tokens.sum()) == (inputs, outputs)
    assert trace.arrival_s[-1] == pytest.approx(last)
    settings = SchedulerSettings(max_num_seqs=256, num_gpu_blocks=30_000)
    steps = schedule(trace, settings, LinearStepSeconds(5e-3, 15e-6, 3e-8))
    assert steps.produces.sum() == outputs
    assert steps.num_blocks.max() < 30_000
    if trace.has_prefixes:
        assert steps.query_len.sum() < inputs
    elif not steps.num_preempted.any():
        assert steps.query_len.sum() == inputs + outputs - num_requests


def test_a_device_is_no_trace() -> None:
    """/dev/zero would never end; here one that does."""
    with pytest.raises(UsageError, match="is a device: give a trace file"):
        load_trace("/dev/null")


@pytest.mark.parametrize("factor", [1e-320, 1e-300, 1e-10])
def test_a_rate_that_spreads_a_trace_over_centuries_is_refused(
    tmp_path: Path, factor: float
) -> None:
    trace = load(tmp_path, PLAIN + "0,1,1\n20,1,1\n")
    with pytest.raises(UsageError, match="over centuries: give a larger one"):
        scale_rate(trace, factor)
    assert scale_rate(trace, 1e-8).arrival_s[-1] == pytest.approx(2e9)
