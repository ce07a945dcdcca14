"""Thousands of points break in one night: one cause is one line, and nothing freezes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnbench.dashboard import render
from attnbench.history.panel import Panel
from attnbench.history.verdict import judge
from tests.dashboard.browsing import OpenSite, Reader, exported, in_browser
from tests.dashboard.reading import index_rows
from tests.history.fake import row, table_of

pytestmark = in_browser

ALIKE = 1550  # all of CPU_ATTN: one cause
APART = 450  # of 1,000 of TORCH_SDPA: too few to be one
LISTED = 50


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for run in range(2):
        for number in range(ALIKE):
            status, why = ("CRASH", (f"illegal access {number}",)) if run == 1 else ("OK", ())
            text = f"{number + 1}q1s1k"
            rows.append(row(run, workload=text, status=status, reasons=why))
        for number in range(1000):
            status = "INCORRECT" if run == 1 and number % 20 < 9 else "OK"
            text = f"{number + 1}q1s1k"
            rows.append(row(run, backend="TORCH_SDPA", workload=text, status=status))
    folder = tmp_path_factory.mktemp("broken")
    panel = Panel.of_table(table_of(rows))
    render(panel, panel.runs, judge(panel), folder)
    return folder


@pytest.fixture
def reader(opened: OpenSite, broken: Path) -> Reader:
    return opened(broken)


def nodes(page: Any) -> int:
    return int(page.evaluate("document.querySelectorAll('*').length"))


def test_the_overview_tells_one_cause_in_one_line_and_the_rest_by_its_number(
    reader: Reader,
) -> None:
    page = reader.open("index.html")
    head = reader.texts(".verdict .lead li")
    assert len(head) == 4
    assert head[0].startswith("CPU_ATTN OK → CRASH")
    assert "1550 of 1550 points" in head[0]
    assert head[-1] == f"and {APART + 1 - 3} more below"
    assert page.locator("#lost tbody tr").count() == LISTED
    assert f"and {APART + 1 - LISTED} more" in page.locator("#lost").inner_text()
    assert nodes(page) < 6000
    page.locator("#lost > p a").click()
    page.wait_for_function("document.querySelector('#series-count').textContent.includes('of')")
    assert page.locator("#series-count").inner_text() == f"{ALIKE + APART} of {ALIKE + 1000}"
    assert page.locator("#series-table tbody tr").count() == 100
    assert page.get_by_role("button", name=f"Show all {ALIKE + APART}").is_visible()
    lines = exported(page, "#series-export")
    broke = [one["id"] for one in index_rows(reader.site) if one["verdict"] == "REGRESSION"]
    assert sorted(line["series"] for line in lines) == sorted(broke)
    assert len(lines) == ALIKE + APART


def test_the_overview_is_small(broken: Path) -> None:
    files = ["index.html", "data/index.js", "assets/style.css"]
    files += [f"assets/{name}.js" for name in ("common", "tables", "charts", "overview")]
    assert sum((broken / name).stat().st_size for name in files) <= 1_000_000


def test_other_pages_show_some_and_give_all(reader: Reader) -> None:
    page = reader.open("conditions.html", "during")
    assert f"and {ALIKE + APART - LISTED} more" in page.locator("#untimed-more").inner_text()
    assert page.get_by_role("button", name=f"Show all {ALIKE + 1000}").is_visible()
    assert nodes(page) < 6000
    assert len(exported(page, "#export-rows")) == ALIKE + 1000
    page = reader.open("backends.html", "sides")
    assert page.locator("#sides-table tbody tr").count() == 100
    assert nodes(page) < 6000
    assert len(exported(page, "#refusals button.small")) == ALIKE + APART
    page = reader.open("support.html")
    assert page.locator("#changes tbody tr").count() == 2
    assert nodes(page) < 1000
    broke = next(one["id"] for one in index_rows(reader.site) if one["status"] == "CRASH")
    page = reader.open(f"series.html#{broke}", "history")
    assert "Status before: OK" in page.locator("#verdict").inner_text()


def test_of_a_crowd_only_dots_that_can_be_seen_are_drawn(reader: Reader) -> None:
    page = reader.open("index.html")
    drawn = page.evaluate("""() => {
      const rows = [...Array(20000).keys()].map((i) => ({ ratio: Math.exp(Math.sin(i) * 0.05), alike: i % 2 }));
      rows.push({ ratio: 1.3, alike: 0 });
      const how = { value: (row) => row.ratio, line: () => 0, alike: (row) => row.alike, widest: 1.35 };
      const { dots, left } = strip(rows, how);
      const ends = (list) => [Math.min(...list), Math.max(...list)];
      const bin = Math.log(1.35) / 150;
      const bins = (list) => new Set(list.map((row) => `${row.alike} ${Math.round(Math.log(row.ratio) / bin)}`)).size;
      return { kept: dots.length, left, count: rows.length, bins: [bins(rows), bins(dots.map(({ row }) => row))],
        ends: [ends(rows.map((row) => row.ratio))[1], ends(dots.map(({ row }) => row.ratio))[1]] };
    }""")  # noqa: E501
    assert drawn["kept"] + drawn["left"] == drawn["count"]
    assert drawn["kept"] < 1000
    assert drawn["bins"][0] == drawn["bins"][1]
    assert drawn["ends"] == [1.3, 1.3]


def test_of_very_many_rows_the_lowest_and_highest_of_each_moment_are_drawn(
    reader: Reader,
) -> None:
    page = reader.open("conditions.html")
    lowest, highest, count, is_sorted = page.evaluate("""() => {
      const value = (i) => (i === 31417 ? 99 : i === 2718 ? -99 : i % 10);
      const kept = outline([...Array(60000).keys()], value);
      return [kept.includes(2718), kept.includes(31417), kept.length, kept.every((i, at) => !at || kept[at - 1] < i)];
    }""")  # noqa: E501
    assert (lowest, highest, is_sorted) == (True, True, True)
    assert 500 < count <= 2000
