"""What holds of every page: readable on a phone, in the dark; every table can be taken away."""

from __future__ import annotations

import csv
import io
from itertools import pairwise
from pathlib import Path

import pytest

from tests.dashboard.browsing import OpenSite, Reader, browses
from tests.dashboard.reading import series_id
from tests.dashboard.watch_history import STEPPED

PAGES = ("index", "series", "compare", "backends", "support", "conditions", "gate")


@browses
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_them_and_everything_can_be_read(
    opened: OpenSite, watched: Path, scheme: str
) -> None:
    one = opened(watched, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for name in PAGES:
        address = (
            f"series.html#{series_id(watched, *STEPPED)}" if name == "series" else f"{name}.html"
        )
        page = one.open(address)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
        assert page.locator("img").count() == 0
        assert page.evaluate(WORST_CONTRAST) >= 4.5, name


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


@browses
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


@browses
def test_without_scripts_nothing_stays_empty_and_a_page_says_what_prints_it(
    opened: OpenSite, watched: Path, choices_site: Path
) -> None:
    plain = opened(watched, java_script_enabled=False)
    others = opened(choices_site, java_script_enabled=False)
    for name in (*PAGES, "choices", "traffic"):
        page = (plain if name in PAGES else others).open(f"{name}.html")
        assert page.locator("h1").first.is_visible(), name
        for kind in ("button", "input", "select", "fieldset", ".chart", ".legend"):
            assert page.locator(f"main {kind}").filter(visible=True).count() == 0, (name, kind)
        for empty in ("table:not(:has(tbody td))", "dl:empty", "ol:empty"):
            assert page.locator(f"main {empty}").filter(visible=True).count() == 0, (name, empty)
        if name != "gate":
            told = page.locator("noscript p").filter(visible=True).last.inner_text()
            assert "needs JavaScript. attnbench " in told, name
    page = plain.open("index.html")
    assert page.locator("#slower tbody tr").first.is_visible()
    assert page.locator("h2", has_text="Runs").is_visible()
    assert plain.open("gate.html").locator("table[data-csv=power] tbody tr").first.is_visible()


@browses
def test_the_matrix_without_scripts_says_what_prints_it(opened: OpenSite, site: Path) -> None:
    page = opened(site, java_script_enabled=False).open("matrix.html")
    assert "attnbench matrix prints the same" in page.locator("main").inner_text()
    assert page.locator("#grid").is_hidden()


@browses
def test_on_a_phone_a_legend_leaves_room_and_names_do_not_cover_each_other(
    opened: OpenSite, watched: Path
) -> None:
    one = opened(watched, viewport={"width": 360, "height": 740})
    page = one.open("gate.html", "power")
    names = one.texts("#power .legendtext")
    # Four steps and two timers, not eight lines.
    assert names == ["+2 %", "+3 %", "+5 %", "+10 %", "event", "graph"]
    chart = page.locator("#power").bounding_box()["height"]
    assert page.locator("#power .legend").bounding_box()["height"] < chart / 3
    page = one.open("backends.html", "sides")
    assert len(one.texts("#sides .xtick text")) > 3
    boxes = [tick.bounding_box() for tick in page.locator("#sides .xtick text").all()]
    turned = page.locator("#sides .xtick text").first.get_attribute("transform") or ""
    pairs = pairwise(boxes)
    assert "rotate(-45" in turned or all(a["x"] + a["width"] <= b["x"] for a, b in pairs)
