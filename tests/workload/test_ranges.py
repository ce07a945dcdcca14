"""Brace ranges against lists written out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import WorkloadError
from attnbench.workload import Workload, expand_ranges, expand_workloads


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8q1s4k", ["8q1s4k"]),
        ("{1,8,64}q1s4k", ["1q1s4k", "8q1s4k", "64q1s4k"]),
        ("q1s{1k..16k*2}", ["q1s1k", "q1s2k", "q1s4k", "q1s8k", "q1s16k"]),
        ("q{128..512+128}", ["q128", "q256", "q384", "q512"]),
        ("q{1..4}", ["q1", "q2", "q3", "q4"]),
        ("q{1..10*3}", ["q1", "q3", "q9"]),  # a last step beyond the bound is left out
        ("q{10..25+10}", ["q10", "q20"]),
        ("q{5..5}", ["q5"]),
        ("q{512..2k*2}", ["q512", "q1k", "q2k"]),
        ("q{512..2048*2}", ["q512", "q1024", "q2048"]),
        ("q{0,4..8+4,x}", ["q0", "q4", "q8", "qx"]),
        ("q{0..2k+1k}", ["q0", "q1k", "q2k"]),
        ("q{a}", ["qa"]),
        (
            "{1,2}q1 dtype={bf16,fp16}",
            ["1q1 dtype=bf16", "1q1 dtype=fp16", "2q1 dtype=bf16", "2q1 dtype=fp16"],
        ),
        ("{1,2}{3,4}", ["13", "14", "23", "24"]),
    ],
)
def test_expansion(text: str, expected: list[str]) -> None:
    assert expand_ranges(text) == expected


words = st.text("abq0123 =_", max_size=6)
items = st.lists(st.text("abk0123", min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.lists(st.tuples(words, items), max_size=3), words)
@settings(deadline=None)
def test_braces_are_a_cartesian_product(parts: list[tuple[str, list[str]]], end: str) -> None:
    text = "".join(f"{word}{{{','.join(choices)}}}" for word, choices in parts) + end
    expected = [
        "".join(f"{word}{choice}" for (word, _), choice in zip(parts, chosen, strict=True)) + end
        for chosen in itertools.product(*(choices for _, choices in parts))
    ]
    assert expand_ranges(text) == expected


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 40))
@settings(deadline=None)
def test_additive_range_is_pythons(low: int, span: int, step: int) -> None:
    expected = [str(value) for value in range(low, low + span + 1, step)]
    assert expand_ranges(f"{{{low}..{low + span}+{step}}}") == expected


BAD = [
    ("q{1,2", ["character 2", "never closed", "add '}'"]),
    ("q1}", ["character 3", "without a '{'"]),
    ("q{1,{2,3}}", ["character 5", "do not nest"]),
    ("q{}", ["character 3", "empty item"]),
    ("q{1,,2}", ["character 5", "empty item"]),
    ("q{1, 2}", ["character 5", "a space"]),
    ("q{8..1}", ["character 3", "goes down", "lower bound first"]),
    ("q{1..8*1}", ["never ends"]),
    ("q{0..8*2}", ["never ends", "start at 1"]),
    ("q{1..8+0}", ["step", "is 0"]),
    ("q{1..}", ["is no range", "low..high"]),
    ("q{1..4-1}", ["is no range"]),
    ("q1 block={16,a..b}", ["character 14", "'a..b' is no range"]),
    ("q{1..1000k}", ["more than 100000"]),
    ("{1..1000}q1s{1..1000}", ["character 13", "more than 100000"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_error_messages(text: str, parts: list[str]) -> None:
    with pytest.raises(WorkloadError) as caught:
        expand_ranges(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in [*parts, repr(text), "e.g. {1,8,64}q1s{1k..16k*2}"]:
        assert part in message


def test_what_means_the_same_comes_once() -> None:
    texts = ["{1,2}q1s4k", "2q1s4096 block=16", "q1s4k dtype={bf16,fp32}"]
    assert expand_workloads(texts) == tuple(
        Workload.parse(text) for text in ("q1s4k", "2q1s4k", "q1s4k dtype=fp32")
    )


def test_an_expanded_text_that_is_wrong_names_both() -> None:
    with pytest.raises(WorkloadError, match=r"'q\{4,8\}s4' stands for 'q8s4', and .*write s8"):
        expand_workloads(["q{4,8}s4"])
