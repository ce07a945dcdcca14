"""The page of an upgrade: what it says as text, and what it does in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnbench.dashboard import render
from attnbench.dashboard.upgrade_page import upgrade_page, write_upgrade_page
from attnbench.errors import ResultsFolderError
from attnbench.history.runs import runs_of
from attnbench.history.verdict import judge
from attnbench.upgrade.cells import Cell
from attnbench.upgrade.compare import compare
from attnbench.upgrade.probe import FACTS, CellAnswer, VersionAnswer
from attnbench.upgrade.report import to_json
from tests.dashboard.browsing import Reader, browses, exported
from tests.dashboard.upgrade_answer import answer, step
from tests.history.fake import HOSTILE, history, table_of

PLAIN_9 = "9.0 head_size=128"


class Seen(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("href", "src")]

    def handle_data(self, text: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.texts.append(text)


@pytest.fixture(scope="module")
def page() -> str:
    return upgrade_page(answer())


def test_everything_is_inside_and_nothing_is_loaded(page: str) -> None:
    seen = Seen(page)
    assert all(one.startswith(("#", "data:")) for one in seen.addresses)
    assert "link" in seen.tags
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page


def test_hostile_texts_are_text(page: str) -> None:
    seen = Seen(page)
    assert "img" not in seen.tags
    assert "<img" not in page
    assert HOSTILE in seen.texts
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert data
    assert f"9.0 {HOSTILE} head_size=128" in json.loads(data[1])["cells"]


def test_the_summary_reads_without_scripts(page: str) -> None:
    text = " ".join(Seen(page).texts)
    assert "SLOWER in 1 cell" in text
    assert "2 cells without a backend; 4 cells with another default." in text
    assert "0.22.1: 40 answers, executed; all certain" in text
    # Asked once a device although it stands in two steps of 9.0.
    assert "0.30.0: 40 answers, executed; 2 of 40 not certain" in text
    assert "ALPHA → no backend" in text
    assert "nobody reads it" in text
    assert "==2.13.0" in text


def test_slower_ones_stand_first_then_what_is_lost(page: str) -> None:
    rows = re.findall(r'<tr data-device="(.*?)".*?data-kind="(.*?)" data-cost="(.*?)"', page)
    assert rows[0] == ("9.0", "another default", "slower")
    assert [kind for _, kind, _ in rows[1:4]] == ["no backend any more"] * 3
    assert len(rows) == 9
    tallies = re.search(r'class="tallies">.*?<tbody>\s*<tr><td>(.*?)</td>', page, re.DOTALL)
    assert tallies
    assert tallies[1] == "9.0"


def test_without_costs_the_page_says_so() -> None:
    text = " ".join(Seen(upgrade_page(answer(judged=False))).texts)
    assert "NO BACKEND any more for 2 cells" in text
    assert "whether any is slower was not asked (--batch)" in text
    assert "For these batches" not in text


def test_nothing_changes() -> None:
    quiet = step("9.0", "0.22.1", "0.30.0") | {"groups": [], "changes": [], "pins": []}
    text = " ".join(Seen(upgrade_page({"steps": [quiet]})).texts)
    assert "NO DEFAULT CHANGES" in text
    assert "Nothing changes." in text
    assert "keep their pins" in text


def test_a_real_documents_keys_are_those_the_page_reads(tmp_path: Path) -> None:
    def side(version: str, backend: str) -> VersionAnswer:
        one = CellAnswer(Cell(), backend, "a.B", {}, (), "", (), (), (), (), "")
        cells = {one.cell.text: one}
        return VersionAnswer(version, "9.0", "executed", "cuda", (), {}, FACTS, 0.0, cells)

    document = to_json([compare(side("1.0", "ALPHA"), side("2.0", "BETA"))], {})
    made_up = answer()["steps"][0]
    assert document["steps"][0].keys() == made_up.keys()
    for key in ("from", "to"):
        assert document["steps"][0][key].keys() == made_up[key].keys()
    for key in ("groups", "changes"):
        assert document["steps"][0][key][0].keys() == made_up[key][0].keys()
    change = document["steps"][0]["changes"][0]
    assert change["before"].keys() == made_up["changes"][0]["before"].keys()
    write_upgrade_page(document, tmp_path / "upgrade.html")
    assert "ALPHA → BETA" in (tmp_path / "upgrade.html").read_text(encoding="utf-8")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResultsFolderError):
        write_upgrade_page(answer(), tmp_path / "none" / "upgrade.html")


def test_the_other_pages_link_to_it_and_it_to_them(tmp_path: Path) -> None:
    table = table_of(history())
    runs = runs_of(table)
    render(table, runs, judge(table), tmp_path)
    assert "upgrade.html" not in (tmp_path / "index.html").read_text(encoding="utf-8")
    write_upgrade_page(answer(), tmp_path / "upgrade.html")
    render(table, runs, judge(table), tmp_path)
    assert '<a href="upgrade.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert '<a href="index.html"' in (tmp_path / "upgrade.html").read_text(encoding="utf-8")


@browses
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(browser: Any, tmp_path: Path, width: int) -> None:
    write_upgrade_page(answer(), tmp_path / "upgrade.html")
    reader = Reader(browser, tmp_path, viewport={"width": width, "height": 740})
    asked: list[str] = []
    reader.page.on("request", lambda request: asked.append(request.url))
    page = reader.open("upgrade.html")
    shown = "#changes tbody tr:not([hidden])"

    assert page.locator(shown).count() == 9
    page.fill("#q", "alpha nvfp4")
    assert page.locator(shown).count() == 3
    assert page.locator("#count").inner_text() == "3 of 9"
    page.select_option("#device", "7.5")
    assert page.locator(shown).count() == 1
    assert "device=7.5" in page.url
    page.fill("#q", "nothing like it")
    assert page.locator("#none").is_visible()

    # What was chosen is in the address.
    page.fill("#q", "")
    page.reload()
    assert page.locator("#device").input_value() == "7.5"
    assert page.locator(shown).count() == 3

    rows = exported(page, "#export")
    assert [row["device"] for row in rows] == ["7.5"] * 3
    assert rows[0]["change"] == "ALPHA → no backend"
    assert rows[0]["which"] == "head_size=64 kv=nvfp4"
    assert rows[1]["cells"] == "2"

    # A cell opens, both steps of it, with costs and candidates; the filter stays.
    page.select_option("#device", "")
    row = page.locator(shown).first
    row.locator("summary").click()
    row.get_by_role("link", name="head_size=128", exact=True).click()
    page.wait_for_selector("#detail[open]")
    assert page.locator("#detail-title").inner_text() == PLAIN_9
    body = page.locator("#detail-body").inner_text()
    assert body.count("another default, ALPHA → BETA") == 2
    for text in (
        "+18.0 %",
        "nvidia-h200, event, L2 cold",
        "head_size not supported",
        "flashinfer-cubin; otherwise GAMMA",
    ):
        assert text in body
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail:not([open])", state="attached")
    # The address follows in an event of its own.
    page.wait_for_function("!location.href.includes('cell=')")

    page = reader.open("upgrade.html#cell=9.0+head_size%3D256")
    page.wait_for_selector("#detail[open]")
    body = page.locator("#detail-body").inner_text()
    for text in (
        "flashy is not installed",
        "flashinfer_decode: no such function",
        "attnbench run 32q1s4k --backend BETA",
    ):
        assert text in body
    page.evaluate(f"location.hash = '#cell=' + encodeURIComponent({json.dumps('9.0 ' + HOSTILE)})")
    page.wait_for_function("document.querySelector('#detail').textContent.includes('not change')")
    hostile = json.dumps(f"9.0 {HOSTILE} head_size=128")
    page.evaluate(f"location.hash = '#cell=' + encodeURIComponent({hostile})")
    page.wait_for_function("document.querySelector('#detail').textContent.includes('XQA')")
    assert page.locator("img").count() == 0
    page.evaluate("location.hash = '#cell=constructor&%ff'")
    page.wait_for_function("document.querySelector('#detail').textContent.includes('not change')")
    page.click("#detail-close")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert {one.partition("#")[0] for one in asked if not one.startswith("blob:")} <= {
        f"file://{tmp_path}/upgrade.html",
        "data:,",
    }
    assert reader.problems == []
    reader.page.close()
