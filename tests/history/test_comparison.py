"""Two runs, commits or stacks against each other; what may not be compared is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from attnbench.errors import DataError, ExitCode
from attnbench.history.comparison import compare
from attnbench.history.rule import Reason, Verdict
from tests.history.fake import history, row, table_of, timed


def test_compare_names_the_differing_field() -> None:
    for field, old, new in (
        ("timer", "event", "graph"),
        ("l2_state", "cold", "hot"),
        ("execution", "eager", "graph"),
        ("protocol_version", 1, 2),
        ("device_class", "h100", "h200"),
    ):
        before: dict[str, Any] = {field: old}
        after: dict[str, Any] = {field: new}
        rows = timed([1e-3], **before) + timed([1e-3], 1, **after)
        with pytest.raises(DataError, match=rf"they differ in {field} \({old}, {new}\)"):
            compare(table_of(rows), row(0).run_id, row(1).run_id)


def test_compare_keeps_what_can_be_compared() -> None:
    rows = timed([1e-3, 2e-3]) + timed([1e-3], backend="TORCH_SDPA", device_class="h100")
    rows += timed([1e-3], 1, backend="TORCH_SDPA", device_class="h200")
    found = compare(table_of(rows), row(0).run_id, row(1).run_id)
    assert [(r.verdict, r.reasons[0]) for r in found.rows] == [
        (Verdict.REGRESSION, Reason.SLOWER_THAN_FLOOR),
        (Verdict.INVALID, Reason.INCOMPARABLE_DEVICE_CLASS),
    ]
    assert found.exit_code is ExitCode.REGRESSION


def test_compare_finds_runs_commits_and_stacks() -> None:
    table = table_of(history(with_confirmations=False))
    for a, b in (
        (row(2).run_id, row(11).run_id),
        ("02c0ffe", "0bc0ffee"),
        (row(0).stack_id[:6], row(11).stack_id),
    ):
        found = compare(table, a, b)
        assert found.exit_code is ExitCode.REGRESSION
        assert found.environment is not None
    assert len(compare(table, row(0).stack_id, row(11).stack_id).a.runs) == 7
    with pytest.raises(DataError, match="no stored run, commit or stack; the newest run is"):
        compare(table, "feed", "02c0ffe")
    with pytest.raises(DataError, match="several things"):
        compare(table, "2026", "02c0ffe")
    with pytest.raises(DataError, match="same runs"):
        compare(table, "02c0ffe", "02c0f")


def test_compare_of_different_points_says_so() -> None:
    rows = timed([1e-3]) + timed([1e-3], 1, backend="TORCH_SDPA")
    with pytest.raises(DataError, match="share no point"):
        compare(table_of(rows), row(0).run_id, row(1).run_id)
