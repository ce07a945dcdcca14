"""The page compares as `attnbench compare` does."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from attnbench.history.comparison import compare
from tests.dashboard.browsing import Reader, browses, exported
from tests.dashboard.reading import read_data
from tests.dashboard.watch_history import (
    OLD_WAY,
    commit_of,
)
from tests.history.fake import row

SIDES = [
    (row(20).run_id, row(39).run_id),
    (row(6).run_id, row(7).run_id),
    (row(35).run_id, row(36).run_id),
    (commit_of(12), commit_of(38)),
    (commit_of(38), commit_of(12)),
    (commit_of(12), row(39).run_id),
    (row(0).stack_id, row(20).stack_id),
]


@pytest.mark.parametrize(("a", "b"), SIDES)
@browses
def test_the_page_compares_as_the_command_does(
    reader: Reader, watched_table: pa.Table, a: str, b: str
) -> None:
    said = compare(watched_table, a, b)
    page = reader.open(f"compare.html#a={a}&b={b}", "ratios")
    rows = exported(page, "#export")
    shown = {one["series"]: one for one in rows}
    assert set(shown) == {one.series.id for one in said.rows}
    for one in said.rows:
        own = shown[one.series.id]
        assert own["verdict"] == one.verdict
        assert own["reason"] == ", ".join(one.reasons)
        assert (own["note"], own["a_status"], own["b_status"]) == (
            one.note,
            one.a_status or "",
            one.b_status or "",
        )
        assert (own["ratio"] != "") == (one.estimate is not None)
        if one.estimate is not None:
            assert float(own["ratio"]) == pytest.approx(one.estimate.ratio, rel=1e-6)
            assert float(own["a_s"]) == pytest.approx(one.a_s, rel=1e-6)
            assert float(own["b_s"]) == pytest.approx(one.b_s, rel=1e-6)
            assert (own["low"] != "") == one.estimate.enough
        if one.estimate is not None and one.estimate.enough:
            assert float(own["low"]) == pytest.approx(one.estimate.low, rel=1e-5)
            assert float(own["high"]) == pytest.approx(one.estimate.high, rel=1e-5)
    ends = [one.rsplit(" ", 1)[-1] for one in (said.a.runs[-1].commit, said.b.runs[-1].commit)]
    assert all(end[:7] in page.locator("#sides-text").inner_text() for end in ends)
    changed = page.locator("#stack-text")
    assert changed.is_visible() or said.environment is None
    if said.environment:
        for name, *_ in said.environment.changed:
            assert name in changed.inner_text()


def test_the_sides_of_this_test_cover_what_can_be_said(watched_table: pa.Table) -> None:
    said = {(r.verdict, *r.reasons) for a, b in SIDES for r in compare(watched_table, a, b).rows}
    assert {one[1] for one in said} >= {
        "slower_than_floor",
        "faster_than_floor",
        "within_floor",
        "too_few_replicates",
        "status_changed",
        "throttled",
        "incomparable:timer",
    }
    assert any(len(compare(watched_table, a, b).a.runs) >= 3 for a, b in SIDES)


@browses
def test_students_quantiles_are_scipys(reader: Reader) -> None:
    from scipy.special import stdtrit

    page = reader.open("compare.html")
    for confidence in (0.9, 0.99, 0.9995):
        for freedom in (1.0, 2.5, 4, 9, 31.7, 400):
            found = page.evaluate(f"tQuantile({confidence}, {freedom})")
            assert found == pytest.approx(stdtrit(freedom, 0.5 + confidence / 2), rel=1e-8)


@browses
def test_compare_sorts_filters_and_keeps_it_in_the_address(reader: Reader) -> None:
    page = reader.open(f"compare.html#a={commit_of(12)[:8]}&b={commit_of(38)[:8]}", "ratios")
    assert page.locator("#a").input_value() == commit_of(12)
    assert "4 runs" in page.locator("#sides-text").inner_text()
    assert reader.texts("#points tbody td:first-child")[0] == "▲ REGRESSION"
    page.get_by_role("button", name="Workload").click()
    names = reader.texts("#points tbody td:nth-child(5)")
    assert names == sorted(names)
    page.get_by_role("button", name="Workload").click()
    assert reader.texts("#points tbody td:nth-child(5)") == sorted(names, reverse=True)
    page.select_option("#backend", "TORCH_SDPA")
    page.fill("#search", "16q1s4k")
    assert reader.texts("#points tbody td:nth-child(4)") == ["TORCH_SDPA"]
    page.reload()
    reader.wait_for_chart("ratios")
    assert reader.texts("#points tbody td:nth-child(4)") == ["TORCH_SDPA"]
    page.click("#swap")
    page.wait_for_function(f"document.querySelector('#b').value === '{commit_of(12)}'")
    assert f"a={commit_of(38)[:8]}&b={commit_of(12)[:8]}" in page.url
    page.evaluate("location.hash = 'a=nothing&b=neither'")
    page.wait_for_selector("#problem:not([hidden])")
    assert "attnbench compare knows all" in page.locator("#problem").inner_text()
    page.evaluate(f"location.hash = 'a={commit_of(12)}&b={commit_of(12)}'")
    page.wait_for_function("document.querySelector('#problem').textContent.includes('same runs')")


def test_old_ways_are_refused_by_name(watched: Path) -> None:
    ways = read_data(watched, "compare")["series"]
    own = series_id_of(watched, OLD_WAY)
    assert {ways["timer"]["words"][ways["timer"]["at"][i]] for i in own} == {"event", "graph"}


def series_id_of(site: Path, workload: str) -> list[int]:
    from tests.dashboard.reading import index_rows

    return [i for i, one in enumerate(index_rows(site)) if one["workload"] == workload]
