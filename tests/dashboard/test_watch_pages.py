"""Compare, support, the gate's record and change points: what the pages hold, in a real browser."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from attnbench.dashboard import Pages, render
from attnbench.dashboard.gate_page import rate_text
from attnbench.dashboard.level_changes import FILE_NAME, level_changes, restless
from attnbench.dashboard.watch import Watch
from attnbench.history.acknowledge import Acknowledgement, AlarmKind
from attnbench.history.alarms import alarms_of
from attnbench.history.change_points import change_points_of_panel
from attnbench.history.comparison import compare
from attnbench.history.panel import Panel
from attnbench.history.rule import Reason
from attnbench.history.runs import runs_of
from attnbench.history.self_record import gate_record, rate
from attnbench.history.verdict import judge
from attnbench.store import ResultsFolder, RunHeader
from tests.dashboard.reading import read_data, series_id
from tests.dashboard.test_browser import CHROMIUM, Reader, browser
from tests.dashboard.test_site import Links
from tests.dashboard.watch_history import (
    DRIVER_AT,
    LOST_AT,
    OLD_WAY,
    RUNS,
    STEP_AT,
    STEPPED,
    commit_of,
    watched_rows,
)
from tests.history.fake import HOSTILE, row, table_of

__all__ = ["browser"]

no_chromium = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="no /usr/bin/chromium: apt install chromium"
)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return table_of(watched_rows())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    panel = Panel.of_table(table)
    known = Acknowledgement(
        kind=AlarmKind.SLOWER,
        patterns={"workload": "4q1s4k*"},
        since="2026-12-01",
        reason=f"torch checks bounds {HOSTILE}",
        by="A. Person",
        expires=date(2027, 3, 1),
        up_to=1.4,
    )
    judgement = judge(panel)
    judgement = replace(judgement, alarms=alarms_of(judgement, panel, [known]))
    clocks = {run.run_id: "free" if i < 30 else "locked" for i, run in enumerate(panel.runs)}
    watch = Watch(record=gate_record(panel, nights=6), clocks=clocks)
    render(panel, panel.runs, judgement, folder, watch=watch)
    return folder


@pytest.fixture
def reader(browser: Any, watched: Path) -> Iterator[Reader]:
    one = Reader(browser, watched)
    yield one
    assert one.problems == []
    one.page.close()


# --- overview ------------------------------------------------------------------------------------
def test_one_cause_is_one_entry_and_what_is_known_is_not_an_alarm(watched: Path) -> None:
    text = " ".join(Links((watched / "index.html").read_text()).text.split())
    head = text[: text.index("Support lost")]
    assert "TORCH_SDPA +20." in head
    assert "3 of 3 points" in head
    assert "since 09c0ffe" in head
    assert "Slower 1 (3 points)" in text
    assert "Known and accepted 1" in text
    known = text[text.index("Known and accepted") : text.index("Change of every point")]
    assert "TORCH_SDPA 4q1s4k dtype=fp32" in known
    assert "by A. Person until 2027-03-01, up to +40.0 %" in known
    assert HOSTILE in known


def test_the_command_that_finds_the_change_is_told(tmp_path: Path) -> None:
    rows = [replace(one, commit=f"{int(one.run_id[-6:], 16):07x}abc") for one in watched_rows()]
    panel = Panel.of_table(table_of(rows))
    render(panel, panel.runs, judge(panel), tmp_path, pages=Pages(pages=("overview",)))
    text = " ".join(Links((tmp_path / "index.html").read_text()).text.split())
    worst = judge(panel).because(Reason.CONFIRMED)[0].series.identity["workload"]
    command = f"attnbench bisect '{worst}' --backend TORCH_SDPA --commits 0000025abc..0000026abc"
    assert command in text
    assert "Changed with it: commits 0000025..0000026" in text


def test_a_backend_that_fell_silent_is_on_the_overview(tmp_path: Path) -> None:
    rows = [
        one for one in watched_rows() if one.backend != "CPU_ATTN" or one.run_id < row(30).run_id
    ]
    panel = Panel.of_table(table_of(rows))
    render(panel, panel.runs, judge(panel), tmp_path, pages=Pages(pages=("overview",)))
    text = " ".join(Links((tmp_path / "index.html").read_text()).text.split())
    assert "Missing or silent 4" in text
    assert "not measured for 10 nights" in text


# --- change points -------------------------------------------------------------------------------
def test_the_series_data_has_its_change_points(watched: Path, table: pa.Table) -> None:
    own_id = series_id(watched, *STEPPED)
    digits = read_data(watched, "index")["chunk_digits"]
    changes = read_data(watched, f"series-{own_id[:digits] or 'all'}")[own_id]["changes"]
    assert [change[0] for change in changes] == [STEP_AT, DRIVER_AT]
    assert changes[0][3] == pytest.approx(1.08, rel=0.01)
    assert changes[1][3] == pytest.approx(0.93, rel=0.01)
    for first, low, high, *_ in changes:
        assert low < first <= high


def test_kept_change_points_are_those_found_from_nothing(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "results")
    rows = watched_rows()
    runs = list(dict.fromkeys(one.run_id for one in rows))

    def store(run_ids: list[str]) -> Panel:
        for run_id in run_ids:
            own = [one for one in rows if one.run_id == run_id]
            with folder.open_run(RunHeader(run_id=run_id, started_at=own[0].started_at)) as opened:
                for one in own:
                    opened.append(one)
        return Panel.of(folder)

    site = tmp_path / "data"
    site.mkdir()
    first = store(runs[:34])
    level_changes(first, site)
    kept = json.loads((site / FILE_NAME).read_text())
    assert kept["runs"] == 34
    # A series that nothing shakes keeps what was found; a mark in the file shows that it was kept.
    marked = {name: [[0, 0, 0, 1.0, 1.0]] for name in kept["changes"]}
    (site / FILE_NAME).write_text(json.dumps({**kept, "changes": marked}))
    panel = store(runs[34:])
    changes = level_changes(panel, site)
    fresh = change_points_of_panel(panel.log_s)
    again = [name for name, found in changes.items() if found != marked.get(name)]
    assert 0 < len(again) < len(changes)
    for index, name in enumerate(panel.ids):
        if name in again:
            assert [one[0] for one in changes[name]] == [one.index for one in fresh[index]]
    moved = {
        name
        for name, found in zip(panel.ids, fresh, strict=True)
        if any(one.index >= DRIVER_AT for one in found)
    }
    assert len(moved) > 8
    assert moved <= set(again)
    # Another history: nothing is believed.
    (site / FILE_NAME).write_text(json.dumps({**kept, "stamp": "0", "changes": marked}))
    anew = level_changes(panel, site)
    assert [[one[0] for one in anew[name]] for name in panel.ids] == [
        [one.index for one in found] for found in fresh
    ]


def test_a_step_makes_a_series_restless_and_noise_seldom_does() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.005, (2000, 60))
    assert restless(noise).mean() < 0.05
    noise[:, -4:] += 0.03
    assert restless(noise).mean() > 0.95
    assert not restless(np.full((1, 60), np.nan)).any()
    assert not restless(np.zeros((3, 2))).any()


# --- compare -------------------------------------------------------------------------------------
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
@pytest.mark.browser
@no_chromium
def test_the_page_compares_as_the_command_does(
    reader: Reader, table: pa.Table, a: str, b: str
) -> None:
    said = compare(table, a, b)
    page = reader.open(f"compare.html#a={a}&b={b}", "ratios")
    with page.expect_download() as download:
        page.click("#export")
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
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


def test_the_sides_of_this_test_cover_what_can_be_said(table: pa.Table) -> None:
    said = {(r.verdict, *r.reasons) for a, b in SIDES for r in compare(table, a, b).rows}
    assert {one[1] for one in said} >= {
        "slower_than_floor",
        "faster_than_floor",
        "within_floor",
        "too_few_replicates",
        "status_changed",
        "throttled",
        "incomparable:timer",
    }
    assert any(len(compare(table, a, b).a.runs) >= 3 for a, b in SIDES)


@pytest.mark.browser
@no_chromium
def test_students_quantiles_are_scipys(reader: Reader) -> None:
    from scipy.special import stdtrit

    page = reader.open("compare.html")
    for confidence in (0.9, 0.99, 0.9995):
        for freedom in (1.0, 2.5, 4, 9, 31.7, 400):
            found = page.evaluate(f"tQuantile({confidence}, {freedom})")
            assert found == pytest.approx(stdtrit(freedom, 0.5 + confidence / 2), rel=1e-8)


@pytest.mark.browser
@no_chromium
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


# --- series --------------------------------------------------------------------------------------
@pytest.mark.browser
@no_chromium
def test_levels_changes_and_marks_are_drawn_and_told(reader: Reader) -> None:
    own_id = series_id(reader.site, *STEPPED)
    page = reader.open(f"series.html#{own_id}&x=run", "history")
    texts = reader.texts("#history .annotation-text")
    assert [text for text in texts if text.startswith("▲ +7.")]
    assert [text for text in texts if text.startswith("▼ −6.")]
    assert [text for text in texts if "driver 580.1 → 590.2" in text]
    told = [" ".join(text.split()) for text in reader.texts("#changes tbody tr")]
    assert any("▼ level −6." in text and "driver 580.1 → 590.2" in text for text in told)
    assert any("environment" in text and "clocks free → locked" in text for text in told)
    # The band of a level holds nine tenths of its runs' medians.
    shapes = page.evaluate("document.getElementById('history').layout.shapes")
    bands = [one for one in shapes if one["type"] == "rect" and one.get("yref") != "paper"]
    assert len(bands) == 3
    data = read_data(reader.site, "values-all")[own_id]
    data += read_data(reader.site, "series-all")[own_id]["values"]
    medians = np.array([np.median(value[2]) for value in data[:STEP_AT]]) * 1e6
    low, high = np.quantile(medians, (0.05, 0.95))
    assert (bands[0]["y0"], bands[0]["y1"]) == pytest.approx((low, high), rel=1e-5)
    page.locator("#changes tbody a").first.click()
    page.wait_for_url(f"**/conditions.html#run={DRIVER_AT}")


@pytest.mark.browser
@no_chromium
def test_the_range_that_is_looked_at_is_in_the_address(reader: Reader) -> None:
    page = reader.open(f"series.html#{series_id(reader.site, *STEPPED)}&x=run", "history")
    page.get_by_role("button", name="30").click()
    assert f"&r={row(RUNS - 30).run_id}.." in page.url
    shown = "document.getElementById('history').layout.xaxis.range"
    assert page.evaluate(shown) == [RUNS - 30.5, RUNS - 0.5]
    # As a drag over the chart does.
    page.evaluate("Plotly.relayout('history', {'xaxis.range[0]': 21.6, 'xaxis.range[1]': 28.2})")
    page.wait_for_function(f"{shown}[0] === 21.5")
    assert page.evaluate(shown) == [21.5, 28.5]
    assert f"&r={row(22).run_id}..{row(28).run_id}" in page.url
    page.reload()
    reader.wait_for_chart("history")
    assert page.evaluate(shown) == [21.5, 28.5]
    page.get_by_role("button", name="All").click()
    assert "&r=" not in page.url


@pytest.mark.browser
@no_chromium
def test_a_series_may_be_named_in_the_address(reader: Reader) -> None:
    page = reader.open("series.html#backend=CPU_ATTN&workload=16q1s4k%20dtype%3Dfp32", "history")
    assert page.locator("#title").inner_text() == "CPU_ATTN 16q1s4k dtype=fp32"


# --- conditions ----------------------------------------------------------------------------------
@pytest.mark.browser
@no_chromium
def test_the_rows_of_a_night_can_be_sorted_searched_and_taken_away(reader: Reader) -> None:
    page = reader.open("conditions.html#run=7", "noise")
    told = [" ".join(text.split()) for text in reader.texts("#extremes tbody tr")]
    assert any(text.startswith("load 1m0.400 processes") for text in told)
    assert page.locator("#machine").inner_text().count("free") == 1
    page.fill("#search", "throttled")
    assert page.locator("#num-rows").inner_text().startswith("2 of ")
    page.fill("#search", "")
    page.get_by_role("button", name="Median").click()
    shown = page.evaluate("matchingRows().map((i) => details.median_s[i])")
    timed = [one for one in shown if one is not None]
    assert timed == sorted(timed, reverse=True)
    assert shown[: len(timed)] == timed
    page.fill("#search", "torch_sdpa 16q1s4k")
    with page.expect_download() as download:
        page.click("#export-rows")
    lines = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
    assert [line["replicate"] for line in lines] != []
    assert {line["backend"] for line in lines} == {"TORCH_SDPA"}
    assert {line["before_load_1m"] for line in lines} == {"0.4"}


# --- support -------------------------------------------------------------------------------------
def test_support_holds_every_cell_in_stretches(watched: Path) -> None:
    cells = {(c["backend"], c["group"]): c for c in read_data(watched, "support")["cells"]}
    plain = cells["FLEX_ATTENTION", "llama-3-8b fp32"]
    assert [stretch[:5] for stretch in plain["stretches"]] == [[0, RUNS - 1, "OK", 4, 4]]
    lost = cells["FLEX_ATTENTION", "llama-3-8b fp32 softcap=30"]["stretches"]
    assert [stretch[:3] for stretch in lost] == [
        [0, LOST_AT - 1, "OK"],
        [LOST_AT, RUNS - 1, "UNSUPPORTED"],
    ]
    assert lost[1][5] == [f"softcap is not supported {HOSTILE}"]
    assert lost[0][5] == []


@pytest.mark.browser
@no_chromium
def test_support_tells_what_changed_and_why(reader: Reader) -> None:
    page = reader.open("support.html")
    assert page.locator("#changes tbody tr").count() == 1
    change = " ".join(page.locator("#changes tbody tr").inner_text().split())
    assert "✓ OK → – UNSUPPORTED" in change
    assert f"softcap is not supported {HOSTILE}" in change
    page.check("#changed")
    assert reader.texts("#now tbody button") == ["– UNSUPPORTED •"]
    page.locator("#now tbody button").click()
    assert page.locator("#cell-list li").count() == 2
    page.reload()
    assert page.locator("#changed").is_checked()
    assert page.locator("#cell-line span").count() == 2
    page.uncheck("#changed")
    page.fill("#search", "no such cell")
    assert "take a word" in page.locator("#more-cells").inner_text()
    page.fill("#search", "flex softcap")
    with page.expect_download() as download:
        page.click("#export-changes")
    (line,) = csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8")))
    assert (line["before"], line["after"]) == ("OK", "UNSUPPORTED")


# --- the gate ------------------------------------------------------------------------------------
def test_the_gate_page_tells_its_record_without_a_script(watched: Path, table: pa.Table) -> None:
    record = gate_record(Panel.of_table(table), nights=6)
    text = " ".join(Links((watched / "gate.html").read_text()).text.split())
    found = record["false_alarms"]
    assert f"False alarms on {found['alarming']['count']} of {found['nights']} nights" in text
    for one in found["by_timer"]:
        assert rate_text(one["confirmed"]) in text
    for one in record["power"]["by_timer"]:
        assert rate_text(one["confirmed"][-1]) in text


def test_rates_are_told_with_their_limits() -> None:
    assert rate_text(rate(0, 0)) == "none seen yet"
    assert rate_text(rate(3, 1200)) == "3 of 1,200 = 0.25 % [0.052, 0.73]"
    assert rate_text(rate(0, 40)).startswith("0 of 40 = 0 % [0, 8.8]")


def test_without_a_record_there_is_no_gate_page(watched: Path, tmp_path: Path) -> None:
    rows = table_of([row(0)])
    render(rows, runs_of(rows), judge(rows), tmp_path)
    assert not (tmp_path / "gate.html").exists()
    assert "gate.html" not in (tmp_path / "index.html").read_text()
    assert "gate.html" in (watched / "index.html").read_text()


# --- all of them ---------------------------------------------------------------------------------
PAGES = ("index", "series", "compare", "backends", "support", "conditions", "gate")


@pytest.mark.browser
@no_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_them_and_everything_can_be_read(
    browser: Any, watched: Path, scheme: str
) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
    one = Reader(browser, watched, **options)
    for name in PAGES:
        address = (
            f"series.html#{series_id(watched, *STEPPED)}" if name == "series" else f"{name}.html"
        )
        page = one.open(address)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        assert page.locator("img").count() == 0
        assert page.evaluate(WORST_CONTRAST) >= 4.5, name
    assert one.problems == []
    one.page.close()


#: Contrast ratio of the least readable text of a page (WCAG 2.1, 1.4.3), backgrounds looked up.
WORST_CONTRAST = """() => {
  const channel = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const parse = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith('color(') ? 1 : 255;
    return { rgb: parts.slice(0, 3).map((v) => v / scale), alpha: parts.length > 3 ? parts[3] : 1 };
  };
  const shares = [0.2126, 0.7152, 0.0722];
  const light = (rgb) => shares.reduce((sum, share, i) => sum + share * channel(rgb[i]), 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.alpha === 1) return found.rgb;
    }
    return [1, 1, 1];
  };
  let worst = 21;
  for (const node of document.querySelectorAll('body *')) {
    if (node.closest('svg') || !node.checkVisibility()) continue;
    if (![...node.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color).rgb), light(ground(node))];
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst;
}"""


@pytest.mark.browser
@no_chromium
def test_every_table_can_be_taken_away_as_csv(reader: Reader) -> None:
    for name in PAGES:
        address = (
            f"series.html#{series_id(reader.site, *STEPPED)}"
            if name == "series"
            else f"{name}.html"
        )
        page = reader.open(address)
        page.wait_for_timeout(300)
        tables = page.locator("main table").count()
        buttons = page.get_by_role("button", name="Export CSV")
        exports = (
            page.locator("main table[data-csv=no]").count() + page.locator("p.csv button").count()
        )
        assert exports == tables, name
        for i in range(buttons.count()):
            if not buttons.nth(i).is_visible():
                continue
            with page.expect_download() as download:
                buttons.nth(i).click()
            lines = list(csv.reader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
            assert lines
            assert len({len(line) for line in lines}) == 1


def test_old_ways_are_refused_by_name(watched: Path) -> None:
    ways = read_data(watched, "compare")["series"]
    own = series_id_of(watched, OLD_WAY)
    assert {ways["timer"]["words"][ways["timer"]["at"][i]] for i in own} == {"event", "graph"}


def series_id_of(site: Path, workload: str) -> list[int]:
    from tests.dashboard.reading import index_rows

    return [i for i, one in enumerate(index_rows(site)) if one["workload"] == workload]
