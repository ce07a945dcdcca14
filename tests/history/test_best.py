"""The best backend of each workload, counted by hand; and the page of the documentation."""

from __future__ import annotations

import csv
import io
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from attnbench.cli import history as verbs
from attnbench.errors import UsageError
from attnbench.history.best import Best, best_backends
from attnbench.history.best_page import comparison_page
from attnbench.history.runs import runs_of
from attnbench.history.series_rows import series_of
from attnbench.store.record import Measurement, Status
from tests.history.fake import fill, row, table_of

ROOT = Path(__file__).resolve().parents[2]
DECODE = "4q1s4k dtype=fp32"
PREFILL = "2q1ks1k dtype=fp32"


def times(run: int, backend: str, *seconds: float, **more: Any) -> list[Measurement]:
    return [
        row(run, number, backend=backend, seconds=value, **more)
        for number, value in enumerate(seconds)
    ]


def best_of(rows: list[Measurement], **chosen: Any) -> list[Best]:
    return best_backends(series_of(table_of(rows)), **chosen)


def test_the_fastest_first_with_its_margin() -> None:
    rows = [
        *times(1, "CPU_ATTN", 2e-3, 2.02e-3, 2.01e-3),
        *times(1, "TORCH_SDPA", 1e-3, 1.01e-3, 0.99e-3),
        *times(1, "FLEX_ATTENTION", 4e-3, 4e-3, 4e-3),
        *times(1, "TRITON_ATTN", *(3 * (0.0,)), status="UNSUPPORTED"),
    ]
    (best,) = best_of(rows)
    assert [c.backend for c in best.contenders] == ["TORCH_SDPA", "CPU_ATTN", "FLEX_ATTENTION"]
    assert [c.seconds for c in best.contenders] == pytest.approx([1e-3, 2.01e-3, 4e-3])
    assert best.margin is not None
    assert best.margin.ratio == pytest.approx(2.01)
    assert best.margin.low > 1.5
    assert best.is_clear
    assert best.untimed == (("TRITON_ATTN", Status.UNSUPPORTED),)
    assert (best.phase, best.batch, best.query_len, best.seq_len) == ("decode", 4, 1, 4096)


@pytest.mark.parametrize(
    ("second", "more", "why"),
    [
        ((1.05e-3,) * 3, {}, "within the floor of the wall clock"),
        ((2e-3,), {}, "one process has no interval"),
        ((2e-3,) * 3, {"status": "NOISY"}, "a time that did not settle"),
    ],
)
def test_what_is_not_clear(second: tuple[float, ...], more: dict[str, Any], why: str) -> None:
    rows = times(1, "TORCH_SDPA", 1e-3, 1e-3, 1e-3) + times(1, "CPU_ATTN", *second, **more)
    (best,) = best_of(rows)
    assert best.winner.backend == "TORCH_SDPA"
    assert not best.is_clear, why


def test_other_metrics_are_no_contenders() -> None:
    rows = [
        *times(1, "TORCH_SDPA", 1e-3, 1e-3, 1e-3),
        *times(1, "CPU_ATTN", 1e-6, 1e-6, 1e-6, metric="metadata_build"),
    ]
    (best,) = best_of(rows)
    assert [c.backend for c in best.contenders] == ["TORCH_SDPA"]


def test_who_has_a_time_by_one_timer_is_not_listed_without() -> None:
    """By `graph` it failed in the run whose `event` times are compared."""
    rows = [
        *times(1, "TORCH_SDPA", 1e-3, 1e-3, timer="graph"),
        *times(2, "TORCH_SDPA", 1e-3, 1e-3, timer="event"),
        *times(2, "TORCH_SDPA", 0.0, timer="graph", status="ERROR"),
        *times(2, "CPU_ATTN", 2e-3, 2e-3, timer="event"),
    ]
    (best,) = best_of(rows, timer="event")
    assert [c.backend for c in best.contenders] == ["TORCH_SDPA", "CPU_ATTN"]
    assert best.untimed == ()


def test_only_times_of_one_run_stand_side_by_side() -> None:
    rows = [
        *times(1, "TORCH_SDPA", 1e-3, 1e-3, 1e-3),
        *times(1, "CPU_ATTN", 2e-3, 2e-3, 2e-3),
        *times(2, "CPU_ATTN", 0.5e-3, 0.5e-3, 0.5e-3),  # newer, and alone
    ]
    (best,) = best_of(rows)
    assert [c.backend for c in best.contenders] == ["TORCH_SDPA", "CPU_ATTN"]
    assert best.run_id == rows[0].run_id
    (alone,) = best_of(rows[-3:])
    assert (alone.winner.backend, alone.margin, alone.is_clear) == ("CPU_ATTN", None, False)
    newer = times(3, "TORCH_SDPA", 3e-3) + times(3, "CPU_ATTN", 2e-3)
    (best,) = best_of(rows + newer)
    assert best.run_id == newer[0].run_id


def test_what_was_timed_in_another_way_is_a_row_of_its_own() -> None:
    rows = [
        *times(1, "CPU_ATTN", 1e-3, workload=PREFILL),
        *times(1, "CPU_ATTN", 1e-3, workload=DECODE),
        *times(1, "FLASH_ATTN", 1e-5, timer="graph", l2_state="cold", device_class="nvidia-h200"),
        *times(1, "FLASH_ATTN", 8e-6, timer="graph", l2_state="hot", device_class="nvidia-h200"),
        *times(1, "CPU_ATTN", 1e-9, metric="metadata_build"),
    ]
    found = best_of(rows)
    assert [(b.how.timer, b.how.l2_state, b.phase) for b in found] == [
        ("wall", "hot", "decode"),
        ("wall", "hot", "prefill"),
        ("graph", "cold", "decode"),
        ("graph", "hot", "decode"),
    ]
    (hot,) = best_of(rows, device_class="nvidia-h200", l2_state="hot")
    assert hot.winner.seconds == pytest.approx(8e-6)
    assert len(best_of(rows, timer="wall")) == 2


def test_the_page_names_runs_and_what_is_awaited() -> None:
    rows = times(1, "TORCH_SDPA", 1e-3, 1e-3, 1e-3) + times(1, "CPU_ATTN", 2e-3, 2e-3, 2e-3)
    table = table_of(rows)
    bests = best_backends(series_of(table))
    page = comparison_page(bests, runs_of(table), "make it", {"nvidia-h200": "a\nb"})
    assert rows[0].run_id in page
    assert (
        "| decode | 4 | 1 | 4095 | `4q1s4k dtype=fp32` | TORCH_SDPA | 1000.0 | CPU_ATTN | **x2 "
        in page
    )
    assert "## Not run yet" in page
    assert "- `nvidia-h200`:\n\n  ```\n  a\n  b\n  ```\n" in page
    here = comparison_page(bests, runs_of(table), "make it", {bests[0].how.device_class: "a"})
    assert "Not run yet" not in here


def test_the_page_of_this_repository_is_that_of_its_published_runs() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "comparison.py"))
    page = script["page"](ROOT / "results" / "published")
    written = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert page == written, "run python benchmarks/comparison.py"


def test_the_verb(tmp_path: Path) -> None:
    fill(tmp_path)
    app = typer.Typer()
    app.command()(verbs.compare)
    app.command()(verbs.history)
    words = ["history", "--by", "backend", "--results", str(tmp_path), "--format", "csv"]
    rows = list(csv.DictReader(io.StringIO(CliRunner().invoke(app, words).stdout)))
    # Newest run of the made-up history: FLEX_ATTENTION is the fastest but where it is refused.
    assert {r["workload"]: r["best"] for r in rows} == {
        "q1s1k dtype=fp32": "FLEX_ATTENTION",
        "4q1s4k dtype=fp32": "FLEX_ATTENTION",
        "16q1s4k dtype=fp32": "FLEX_ATTENTION",
        "16q1s4k": "FLEX_ATTENTION",
        "2q1k dtype=fp32": "FLEX_ATTENTION",
        "4q1s4k dtype=fp32 shape=phi-3-mini": "TORCH_SDPA",
        "4q1s4k dtype=fp32 softcap=30": "FLEX_ATTENTION",
    }
    refused = next(r for r in rows if "softcap" in r["workload"])
    assert "CPU_ATTN UNSUPPORTED" in refused["no_time"]
    outcome = CliRunner().invoke(app, [*words, "--metric", "host"])
    assert isinstance(outcome.exception, UsageError)
    assert "leave out --metric" in str(outcome.exception)
