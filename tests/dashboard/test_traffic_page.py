"""The page of traffic in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dashboard.browsing import Reader, exported, in_browser


class TestTraffic:
    pytestmark = in_browser

    def test_reads_before_plotly_has_loaded(self, choices_reader: Reader) -> None:
        choices_reader.page.route("**/plotly.min.js", lambda route: route.abort())
        page = choices_reader.open("traffic.html")
        assert choices_reader.texts("#numbers tbody th")[-1] == "roofline (lower bound)"
        assert len(choices_reader.texts("#numbers tbody tr")) == 4
        assert len(choices_reader.texts("#loads-table tbody tr")) == 16
        assert page.locator("#curve-values tbody tr").count() == 4
        choices_reader.problems = [
            p for p in choices_reader.problems if "plotly" not in p and "ERR_FAILED" not in p
        ]

    def test_what_is_made_up_is_marked_and_what_a_step_is_is_said(
        self, choices_reader: Reader
    ) -> None:
        page = choices_reader.open("traffic.html", "loads")
        assert page.locator("#made-up").is_visible()
        assert choices_reader.texts("#curves .annotation-text") == ["MADE UP"]
        assert "linear layers at the roofline" in page.locator("#scope").inner_text()
        page.select_option("#answer", "day-attention")
        assert "A step is attention only:" in page.locator("#scope").inner_text()
        assert page.locator("#loads-section").is_hidden()
        assert "--load 0.5" in page.locator("#no-loads").inner_text()
        assert "answer=day-attention" in page.url

    def test_choices_are_in_the_address(self, choices_reader: Reader) -> None:
        page = choices_reader.open("traffic.html", "curves")
        page.get_by_role("button", name="TTFT").click()
        page.get_by_role("button", name="ITL against throughput").click()
        page.wait_for_function(
            "document.querySelector('#loads .ytitle').textContent.includes('ITL p99')"
        )
        title = page.locator("#curves .xtitle").text_content()
        assert title == "time to first token (ms), log scale"
        page.reload()
        choices_reader.wait_for_chart("loads")
        assert page.locator("#quantity button[aria-pressed=true]").inner_text() == "TTFT"
        page = choices_reader.open("traffic.html#answer=none&q=constructor&x=%ff")
        assert page.locator("#answer").input_value() == "day"

    def test_tables_are_exported(self, choices_reader: Reader, choices_folder: Path) -> None:
        page = choices_reader.open("traffic.html", "curves")
        saved = json.loads((choices_folder / "results" / "answers" / "day.json").read_text())
        rows = exported(page, "#export-numbers")
        for row, one in zip(rows, saved["backends"], strict=True):
            for name in ("itl_p99_ms", "tokens_per_busy_s"):
                assert float(row[name]) == pytest.approx(one[name]["value"])
                low = one[name]["low"]
                assert (row[f"{name}_low"] == "") if low is None else float(row[f"{name}_low"])
            assert row["times"] == "made up"
        curves = exported(page, "#export-curves")
        name = saved["backends"][0]["backend"]
        assert [float(row[name]) for row in curves] == pytest.approx(
            saved["backends"][0]["curves"]["itl_ms"]
        )
        loads = exported(page, "#export-loads")
        assert [float(row["load"]) for row in loads] == [0.5, 1, 2, 4] * 4
        lacking = exported(page, "#export-not-measured")
        assert [(row["backend"], row["why"]) for row in lacking] == [
            (one["backend"], one["reason"]) for one in saved["not_measured"]
        ]
        assert len(lacking) == 1
