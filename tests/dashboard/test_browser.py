"""The pages in a real browser, opened from disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnbench.history.derived import QUANTITIES, Quantity, derive
from tests.dashboard.browsing import OpenSite, Reader, exported, in_browser
from tests.dashboard.reading import read_data, series_id
from tests.history.fake import LOST, REFUSED, SLOW

pytestmark = in_browser


@pytest.fixture
def reader(opened: OpenSite, site: Path) -> Reader:
    return opened(site)


def test_every_page_opens_and_hostile_names_do_nothing(reader: Reader) -> None:
    slow = series_id(reader.site, *SLOW)
    for address, chart in (
        ("index.html", "changes"),
        (f"series.html#{slow}", "history"),
        ("backends.html", "sides"),
        ("matrix.html", ""),
        ("conditions.html#run=3", "noise"),
    ):
        page = reader.open(address, chart)
        assert page.locator("img").count() == 0
        assert "attnbench" in page.title()
    assert "</script><img src=x onerror=alert(1)>" in page.locator("#measuring").inner_text()


def test_navigation_leads_to_every_page(reader: Reader) -> None:
    page = reader.open("index.html")
    for label, heading in (
        ("Series", "Series"),
        ("Backends", "Backends side by side"),
        ("Selection matrix", "Selection matrix"),
        ("Conditions", "Conditions of a run"),
    ):
        page.get_by_role("navigation").get_by_role("link", name=label, exact=True).click()
        page.get_by_role("heading", name=heading, level=1, exact=True).wait_for()


def test_overview_reads_before_plotly_has_loaded(reader: Reader) -> None:
    reader.page.route("**/plotly.min.js", lambda route: route.abort())
    page = reader.open("index.html")
    assert page.locator("#series-table tbody tr").count() == 21
    assert "REGRESSION" in page.locator(".verdict .word").inner_text()
    # The abort is this test's doing.
    reader.problems = [p for p in reader.problems if "plotly" not in p and "ERR_FAILED" not in p]


def test_search_and_filters(reader: Reader) -> None:
    page = reader.open("index.html")
    page.fill("#search", "cpu_attn 16Q1S4K fp32")
    assert reader.texts("#series-table tbody tr td:nth-child(2)") == ["16q1s4k dtype=fp32"]
    page.fill("#search", "")
    page.select_option("#filter-verdict", "REGRESSION")
    assert page.locator("#series-table tbody tr").count() == 2
    assert page.locator("#series-count").inner_text() == "2 of 21"
    page.fill("#search", "nothing like it")
    assert page.locator("#series-table tbody tr").count() == 0
    assert "take a word away" in page.locator("#series-more").inner_text()


def test_a_finding_leads_to_its_series_and_back_to_the_run(reader: Reader) -> None:
    page = reader.open("index.html")
    page.locator("#slower").get_by_role("link", name="CPU_ATTN decode 16q1s4k").click()
    reader.wait_for_chart("history")
    assert page.locator("#title").inner_text() == "CPU_ATTN 16q1s4k dtype=fp32"
    assert "Since 0ac0ffe" in page.locator("#verdict").inner_text()
    page.locator("#values tbody tr a").first.click()
    page.wait_for_url("**/conditions.html#run=11")
    assert "20261120T020000Z" in page.locator("#measuring").inner_text()


def test_series_switches_between_commits_and_stacks_and_keeps_it_in_the_address(
    reader: Reader,
) -> None:
    page = reader.open(f"series.html#{series_id(reader.site, *SLOW)}", "history")
    ticks = "#history .xtick text"
    assert len(reader.texts(ticks)) == 12
    marks = reader.texts("#history .annotation-text")
    assert [mark for mark in marks if mark.startswith("stack: + gxx 12.2.0")]
    assert "▲ +30.4 %" in marks
    page.get_by_role("button", name="Stacks").click()
    page.wait_for_function("document.querySelectorAll('#history .xtick').length === 2")
    assert "torch 2.13.0" in (page.locator(ticks).nth(1).text_content() or "")
    page.get_by_role("button", name="ITL").click()
    assert page.url.endswith("&q=itl&x=stack")
    assert "times 32 layers" in page.locator("#note").inner_text()
    assert "ITL, attention only (ms)" in (page.locator("#history .ytitle").text_content() or "")
    page.reload()
    reader.wait_for_chart("history")
    assert page.locator("#axis button[aria-pressed=true]").inner_text() == "Stacks"


def test_hash_navigation_changes_the_series(reader: Reader) -> None:
    page = reader.open(f"series.html#{series_id(reader.site, *SLOW)}", "history")
    page.evaluate(f"location.hash = '{series_id(reader.site, *LOST)}'")
    page.wait_for_function("document.querySelector('#title').textContent.startsWith('FLEX')")
    assert "no time" in reader.texts("#history .legendtext")
    assert "INCORRECT" in page.locator("#values tbody tr").first.inner_text()
    page.go_back()
    page.wait_for_function("document.querySelector('#title').textContent.startsWith('CPU')")
    page.evaluate("location.hash = 'no-such-series'")
    page.wait_for_selector("#finder:not([hidden])")


def test_a_series_that_was_never_timed_is_shown(reader: Reader) -> None:
    page = reader.open(f"series.html#{series_id(reader.site, *REFUSED)}", "history")
    assert "logits soft cap is not supported" in page.locator("#values").inner_text()


def test_csv_export_holds_the_stored_and_the_derived_numbers(reader: Reader) -> None:
    own_id = series_id(reader.site, *SLOW)
    page = reader.open(f"series.html#{own_id}", "history")
    rows = exported(page, "#export")
    series = read_data(reader.site, "series-all")[own_id]
    stored = [
        seconds
        for _, _, replicates, confirmations, *_ in series["values"]
        for seconds in (*replicates, *confirmations)
    ]
    assert [float(r["median_s"]) for r in rows] == stored
    assert [r["look"] for r in rows].count("again") == 10
    columns = {"tflop_s": "flop_per_s", "gb_s": "bytes_per_s", "tokens_s": "tokens_per_s"}
    for quantity in QUANTITIES:
        if quantity in (Quantity.LATENCY, Quantity.ROOFLINE):  # one ceiling for each run
            continue
        name = columns.get(quantity, "itl_attention_s")
        expected = [derive(quantity, seconds, series["identity"]) for seconds in stored]
        assert [float(r[name]) for r in rows] == pytest.approx(expected)
    assert rows[9]["subject"].startswith("</script><img")


def test_backends_side_by_side(reader: Reader) -> None:
    page = reader.open("backends.html", "sides")
    assert page.locator("#group").input_value() == "llama-3-8b fp32"
    assert reader.texts("#sides-table thead th")[2:] == ["CPU_ATTN", "FLEX_ATTENTION", "TORCH_SDPA"]
    best = reader.texts("#sides-table tbody tr:nth-child(1) td.best")
    assert len(best) == 1
    page.get_by_role("button", name="GB/s").click()
    page.wait_for_function("document.querySelector('#sides .ytitle').textContent.includes('GB/s')")
    page.get_by_role("button", name="Roofline").click()
    page.wait_for_function("document.querySelector('#sides .ytitle').textContent.includes('(%)')")
    shown = page.locator("#sides-table tbody tr:nth-child(1) td:nth-child(3) a").inner_text()
    spec = page.locator("#sides-table tbody tr:nth-child(1) td").first.inner_text()
    (row,) = [
        r
        for r in read_data(reader.site, "backends")
        if (r["batch_spec"], r["backend"], r["group"]) == (spec, "CPU_ATTN", "llama-3-8b fp32")
    ]
    assert float(shown.replace(",", "")) == pytest.approx(
        100 * row["attainable_s"] / row["median_s"], rel=0.01
    )
    page.select_option("#group", "llama-3-8b fp32 softcap=30")
    refusals = page.locator("#refusals tbody").inner_text()
    assert "UNSUPPORTED" in refusals
    assert "and a second <b>reason</b>" in refusals


def test_matrix_cell_gives_its_reasons(reader: Reader) -> None:
    page = reader.open("matrix.html")
    assert page.locator("#grid tbody tr").count() == 4
    page.select_option("#device", "sm90")
    page.select_option("#dtype", "bf16")
    page.locator("#grid button", has_text="none").click()
    assert page.locator("#cell-title").inner_text() == "sm90, bf16, alibi: none"
    assert "FLASHINFER: alibi not supported" in page.locator("#cell-reasons").inner_text()
    page.select_option("#backend", "FLASH_ATTN")
    assert reader.texts("#grid button") == ["FLASH_ATTN", "FLASH_ATTN"]


def test_conditions_of_a_run(reader: Reader) -> None:
    page = reader.open("conditions.html#run=7", "noise")
    assert "torch 2.12.0 -> 2.13.0" in page.locator("#change").inner_text()
    assert "2.13.0" in page.locator("#stack").inner_text()
    page.select_option("#condition", "temperature_c")
    page.wait_for_function(
        "document.querySelector('#during .ytitle').textContent === 'temperature (°C)'"
    )
    page.select_option("#run", "3")
    page.wait_for_function("document.querySelector('#measuring').textContent.includes('onerror')")
    assert page.locator("#change").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(opened: OpenSite, site: Path, scheme: str) -> None:
    reader = opened(site, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for address in (
        "index.html",
        f"series.html#{series_id(site, *SLOW)}",
        "backends.html",
        "matrix.html",
        "conditions.html",
    ):
        page = reader.open(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if address == "index.html":  # the list scrolls by itself, but its verdicts are in sight
            page.wait_for_selector("#series-table tbody tr")
            boxes = [cell.bounding_box() for cell in page.locator("#series-table .tag").all()]
            assert boxes
            assert max(box["x"] + box["width"] for box in boxes) <= 360
