"""Saved answers of `itl` and `choose`, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnbench.dashboard import Answers, read_answers


def test_no_folder_is_no_answers(tmp_path: Path) -> None:
    assert read_answers(tmp_path / "none") == Answers()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", '"itl"', '{"kind": "itl"}', '{"kind": "choose"}', '{"kind": ["itl"]}',
        '{"kind": "matrix"}', '{"kind": "choose", "rankings": []}', "[" * 100_000, "\udcff",
        '{"kind": "itl", "shares": [NaN]}',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_told_and_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = read_answers(tmp_path)
    assert (found.traffic, found.advice) == ((), ())
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path}/a.json: ")
    assert problem.endswith("with --format json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("backends", 0, "curves", "itl_ms"), [1.0]),
        (("backends", 0, "itl_p50_ms", "value"), "<b>3</b>"),
        (("backends", 0, "loads", 0, "concurrency"), {}),
        (("shares",), None),
        (("versions",), None),
    ],
)
def test_a_damaged_answer_is_told(
    choices_folder: Path, tmp_path: Path, path: Any, value: Any
) -> None:
    answer = json.loads((choices_folder / "results" / "answers" / "day.json").read_text())
    place = answer
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (tmp_path / "day.json").write_text(json.dumps(answer))
    found = read_answers(tmp_path)
    assert not found.traffic
    assert "no answer of this version" in found.problems[0]
